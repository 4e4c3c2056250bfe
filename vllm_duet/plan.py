# SPDX-License-Identifier: Apache-2.0
"""What one engine step does: the decision, and the two halves of a split step.

This file imports neither torch nor vLLM at run time: splitting works on any
dataclass with the fields of ``vllm.v1.core.sched.output.SchedulerOutput``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")


MAX_IN_FLIGHT = 2
"""One prefill that runs, and one behind it, so that its lane never waits for a join."""


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
    ``prefill_ms`` the forecast time until the prefill tokens are computed,
    ``tokens_per_s`` the forecast throughput, and ``decode_ms`` what the decodes would take
    alone on all SMs. ``whole_step_ms`` and ``whole_prefill_ms`` are what one of a SPLIT's decode
    steps and its prefill would cost, corrected, by the best plan that does not split; 0 where
    none keeps the bound. ``joins_late``: two decode steps of a SPLIT break the bound, so a
    request that joins may wait longer than the bound for its second token.
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
    decode_ms: float = 0.0
    whole_step_ms: float = 0.0
    whole_prefill_ms: float = 0.0
    joins_late: bool = False


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """Start this prefill on its own lane and leave it in flight.

    ``launch_id`` grows by one with every launch and names the prefill in the
    join. ``output`` is a SchedulerOutput that holds only the prefill requests.
    ``after_decode``: it reads KV blocks that this step's decode part writes, and so has to
    run after it. Otherwise it may run beside it.
    """

    launch_id: int
    output: Any
    decode_sms: int
    prefill_sms: int
    after_decode: bool = False


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
    SchedulerOutput itself holds only the decode requests. There may be none of them beside
    a prefill in flight. Prefills join in the order of their launches; with both ``launch``
    and ``join``, the launch comes first.
    """

    launch: PrefillLaunch | None = None
    join: Join | None = None
    decode_sms: int = 0


@dataclass(frozen=True, slots=True)
class JoinedPrefill:
    """The result of a finished prefill, on its way back to the scheduler.

    It travels as the attribute ``duet`` of the ModelRunnerOutput of whichever
    step found the prefill done. ``output`` is a ModelRunnerOutput; ``None`` with
    ``error``, which says why there is none. The milliseconds are those for which the
    lanes were busy, the decode lanes since the join before.
    """

    launch_id: int
    output: Any
    error: str | None = None
    prefill_busy_ms: float = 0.0
    decode_busy_ms: float = 0.0


def directive_of(scheduler_output: Any) -> StepDirective | None:
    """The directive a SchedulerOutput carries, if any."""
    return getattr(scheduler_output, "duet", None)


def _prefill_rows(scheduler_output: Any) -> list[int]:
    """Which cached requests of a SchedulerOutput belong to the prefill of this step.

    A request that has sampled nothing yet does even when a single token of its
    prompt is left, as after a full prefix-cache hit; so does one that resumes, since
    what it finds in the prefix cache may be in flight.
    """
    tokens = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    sampled, resumed = cached.num_output_tokens, cached.resumed_req_ids
    if not resumed and 0 not in sampled:
        new = sum(tokens[request.req_id] for request in scheduler_output.scheduled_new_reqs)
        if scheduler_output.total_num_scheduled_tokens - new == len(sampled):
            return []  # as most often; a loop over all decodes takes its time
    return [
        row
        for row, req_id in enumerate(cached.req_ids)
        if sampled[row] == 0 or tokens[req_id] != 1 or req_id in resumed
    ]


def has_prefill(scheduler_output: Any) -> bool:
    """Whether a step computes any prompt."""
    return bool(scheduler_output.scheduled_new_reqs) or bool(_prefill_rows(scheduler_output))


def batch_of(scheduler_output: Any) -> tuple[list[int], list[int], list[int]]:
    """The batch as a policy wants it: the decodes' context lengths [num_decodes],
    the prefills' query lengths [num_prefills] and context lengths [num_prefills]."""
    tokens = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    prefill_rows = _prefill_rows(scheduler_output)
    query_lens = [tokens[cached.req_ids[i]] for i in prefill_rows]
    context_lens = [cached.num_computed_tokens[i] for i in prefill_rows]
    decode_context_lens = _without(cached.num_computed_tokens, prefill_rows)
    for request in scheduler_output.scheduled_new_reqs:
        query_lens.append(tokens[request.req_id])
        context_lens.append(request.num_computed_tokens)
    return decode_context_lens, query_lens, context_lens


def split_output(scheduler_output: Any) -> tuple[Any, Any] | None:
    """Split one SchedulerOutput by request into its decode and prefill parts.

    Everything that must happen before either part runs stays with the decode
    part, which the runner executes first: finished and preempted requests,
    blocks to zero, copy-on-write copies, encoder outputs to free.

    The decode part may be empty. Returns ``None`` when the prefill part would be.
    """
    tokens = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    prefill_rows = _prefill_rows(scheduler_output)
    if not prefill_rows and not scheduler_output.scheduled_new_reqs:
        return None
    prefill_tokens = {cached.req_ids[i]: tokens[cached.req_ids[i]] for i in prefill_rows}
    for request in scheduler_output.scheduled_new_reqs:
        prefill_tokens[request.req_id] = tokens[request.req_id]
    # The decodes are many and the prefills few: take these out of a copy.
    decode_tokens = tokens.copy()
    for req_id in prefill_tokens:
        del decode_tokens[req_id]

    decode, prefill = _copy(scheduler_output), _copy(scheduler_output)
    decode.scheduled_new_reqs = []
    decode.scheduled_cached_reqs = _select_cached(
        cached, _without(range(len(cached.req_ids)), prefill_rows)
    )
    _set_tokens(decode, decode_tokens)
    prefill.scheduled_cached_reqs = _select_cached(cached, prefill_rows)
    _set_tokens(prefill, prefill_tokens)
    prefill.finished_req_ids = set()
    prefill.preempted_req_ids = set()
    prefill.free_encoder_mm_hashes = []
    prefill.new_block_ids_to_zero = None
    prefill.kv_cache_block_copies = None
    # Structured output keeps a step aggregated when a prefill request uses it.
    prefill.has_structured_output_requests = False
    prefill.pending_structured_output_tokens = False
    return decode, prefill


def _without(items: Sequence[T], rows: list[int]) -> list[T]:
    """All items but those of ``rows``, which are few and ascending."""
    kept = list(items)
    for row in reversed(rows):
        del kept[row]
    return kept


def without_requests(scheduler_output: Any, req_ids: Collection[str]) -> Any:
    """The same SchedulerOutput as if ``req_ids`` had not been scheduled.

    Only for the scheduler's own bookkeeping: the worker has run them.
    """
    if not req_ids:
        return scheduler_output
    tokens = scheduler_output.num_scheduled_tokens
    kept = _copy(scheduler_output)
    _set_tokens(kept, {i: n for i, n in tokens.items() if i not in req_ids})
    return kept


def _copy(scheduler_output: T) -> T:
    """As copy.copy, which takes pickle's way round and four times as long."""
    twin = object.__new__(type(scheduler_output))
    twin.__dict__.update(scheduler_output.__dict__)
    return twin


def _set_tokens(scheduler_output: Any, tokens: dict[str, int]) -> None:
    scheduler_output.num_scheduled_tokens = tokens
    scheduler_output.total_num_scheduled_tokens = sum(tokens.values())


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
