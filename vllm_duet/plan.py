# SPDX-License-Identifier: Apache-2.0
"""What one engine step does: the decision, and the two halves of a split step.

This file imports neither torch nor vLLM at run time: splitting works on any
dataclass with the fields of ``vllm.v1.core.sched.output.SchedulerOutput``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Mode(StrEnum):
    """How one step is executed."""

    AGGREGATED = "aggregated"
    """vLLM's mixed batch, untouched."""
    CAPPED = "capped"
    """vLLM's mixed batch with the prefill tokens cut so the step fits the bound."""
    SPLIT = "split"
    """Decode on one SM group, prefill in flight on the other."""


@dataclass(frozen=True, slots=True)
class DuetPlan:
    """The policy's decision for one step, and the forecast it rests on.

    ``decode_sms`` and ``prefill_sms`` are SM counts of disjoint groups, zero
    unless the mode is SPLIT. ``lookahead`` is the paper's k: how many decode
    steps fit beside the prefill. ``max_prefill_tokens`` limits the prefill
    tokens of the step; ``None`` leaves vLLM's own budget. ``tbt_ms`` is the
    forecast time between tokens that a decoding user sees in this step,
    ``prefill_ms`` the forecast time until the prefill tokens are computed, and
    ``tokens_per_s`` the forecast throughput the modes were compared by.
    """

    mode: Mode
    reason: str
    decode_sms: int = 0
    prefill_sms: int = 0
    lookahead: int = 0
    max_prefill_tokens: int | None = None
    tbt_ms: float = 0.0
    prefill_ms: float = 0.0
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """Start this prefill on its own lane and leave it in flight.

    ``launch_id`` grows by one with every launch and names the prefill in the
    join. ``output`` is a SchedulerOutput that holds only the prefill requests.
    """

    launch_id: int
    output: Any
    decode_sms: int
    prefill_sms: int


class Join(StrEnum):
    """What a step does about the prefill in flight."""

    IF_DONE = "if_done"
    """Take its result along when it is already there; never wait."""
    WAIT = "wait"
    """Nothing else is left to run: wait for it."""


@dataclass(frozen=True, slots=True)
class StepDirective:
    """What the scheduler asks of the model runner besides the stock step.

    It travels as the attribute ``duet`` of a SchedulerOutput; a step without
    that attribute is a stock step. On a split step, ``launch`` is set and the
    SchedulerOutput itself holds only the decode requests.
    """

    launch: PrefillLaunch | None = None
    join: Join | None = None
    decode_sms: int = 0


@dataclass(frozen=True, slots=True)
class JoinedPrefill:
    """The result of a finished prefill, on its way back to the scheduler.

    It travels as the attribute ``duet`` of the ModelRunnerOutput of whichever
    step found the prefill done.
    """

    launch_id: int
    output: Any


def directive_of(scheduler_output: Any) -> StepDirective | None:
    """The directive a SchedulerOutput carries, if any."""
    return getattr(scheduler_output, "duet", None)


def _decode_rows(scheduler_output: Any) -> list[int]:
    """Which cached requests of a SchedulerOutput decode in this step.

    A request that has sampled nothing yet belongs to the prefill even when a
    single token of its prompt is left, as after a full prefix-cache hit.
    """
    tokens = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    sampled = zip(cached.req_ids, cached.num_output_tokens, strict=True)
    return [i for i, (req_id, n) in enumerate(sampled) if n > 0 and tokens[req_id] == 1]


def batch_of(scheduler_output: Any) -> tuple[list[int], list[int], list[int]]:
    """The batch as a policy wants it: the decodes' context lengths [num_decodes],
    the prefills' query lengths [num_prefills] and context lengths [num_prefills]."""
    tokens = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    decode_rows = set(_decode_rows(scheduler_output))
    decode_context_lens, query_lens, context_lens = [], [], []
    for i, req_id in enumerate(cached.req_ids):
        if i in decode_rows:
            decode_context_lens.append(cached.num_computed_tokens[i])
        else:
            query_lens.append(tokens[req_id])
            context_lens.append(cached.num_computed_tokens[i])
    for request in scheduler_output.scheduled_new_reqs:
        query_lens.append(tokens[request.req_id])
        context_lens.append(request.num_computed_tokens)
    return decode_context_lens, query_lens, context_lens


def split_output(scheduler_output: Any) -> tuple[Any, Any] | None:
    """Split one SchedulerOutput by request into its decode and prefill parts.

    Everything that must happen before either part runs stays with the decode
    part, which the runner executes first: finished and preempted requests,
    blocks to zero, copy-on-write copies, encoder outputs to free.

    Returns ``None`` when one of the parts would be empty.
    """
    tokens = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    decode_rows = _decode_rows(scheduler_output)
    if not decode_rows or len(decode_rows) == len(tokens):
        return None
    in_decode = set(decode_rows)
    prefill_rows = [i for i in range(len(cached.req_ids)) if i not in in_decode]
    new_ids = [request.req_id for request in scheduler_output.scheduled_new_reqs]

    decode_ids = [cached.req_ids[i] for i in decode_rows]
    prefill_ids = [cached.req_ids[i] for i in prefill_rows] + new_ids
    decode = replace(
        scheduler_output,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=_select_cached(cached, decode_rows),
        **_select_tokens(scheduler_output, decode_ids),
    )
    prefill = replace(
        scheduler_output,
        scheduled_cached_reqs=_select_cached(cached, prefill_rows),
        **_select_tokens(scheduler_output, prefill_ids),
        finished_req_ids=set(),
        preempted_req_ids=set(),
        free_encoder_mm_hashes=[],
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
        # Structured output keeps a step aggregated when a prefill request uses it.
        has_structured_output_requests=False,
        pending_structured_output_tokens=False,
    )
    return decode, prefill


def without_requests(scheduler_output: Any, req_ids: Collection[str]) -> Any:
    """The same SchedulerOutput as if ``req_ids`` had not been scheduled.

    Only for the scheduler's own bookkeeping: the worker has run them.
    """
    if not req_ids:
        return scheduler_output
    kept = [i for i in scheduler_output.num_scheduled_tokens if i not in req_ids]
    return replace(scheduler_output, **_select_tokens(scheduler_output, kept))


def _select_tokens(scheduler_output: Any, req_ids: list[str]) -> dict[str, Any]:
    tokens = {i: scheduler_output.num_scheduled_tokens[i] for i in req_ids}
    return {"num_scheduled_tokens": tokens, "total_num_scheduled_tokens": sum(tokens.values())}


def _select_cached(cached: Any, rows: list[int]) -> Any:
    if len(rows) == len(cached.req_ids):
        return cached  # most often all of them decode
    ids = [cached.req_ids[i] for i in rows]
    return replace(
        cached,
        req_ids=ids,
        resumed_req_ids=cached.resumed_req_ids.intersection(ids),
        new_token_ids=[cached.new_token_ids[i] for i in rows] if cached.new_token_ids else [],
        all_token_ids={i: cached.all_token_ids[i] for i in ids if i in cached.all_token_ids},
        new_block_ids=[cached.new_block_ids[i] for i in rows],
        num_computed_tokens=[cached.num_computed_tokens[i] for i in rows],
        num_output_tokens=[cached.num_output_tokens[i] for i in rows],
    )
