# SPDX-License-Identifier: Apache-2.0
"""Steps made by hand, of requests that nobody sent, in KV blocks that nobody has yet.

What may live here: SchedulerOutputs as vLLM's scheduler makes them, before there is a scheduler.
Who runs them, and what for, is in start.py and worker/proof.py. The scheduler, made later, never
hears of these requests: their rows are given back, and what they leave in the KV cache is
overwritten before it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from vllm_duet.anchors import DECODE_ROOM, StepLimits


@dataclass(slots=True)
class HandMadeRequest:
    """A request that is to compute what its prompt has beyond the ``computed`` tokens in the KV
    cache, and then a token a step."""

    data: NewRequestData
    computed: int

    @property
    def req_id(self) -> str:
        return str(self.data.req_id)

    @property
    def blocks(self) -> tuple[list[int], ...]:
        """By KV cache group."""
        return tuple(self.data.block_ids)

    @property
    def prompt_tokens(self) -> int:
        return len(self.data.prompt_token_ids or ())


class HandMadeSteps:
    """Makes requests and the steps that they are scheduled in."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        """
        Raises:
            ValueError: some layers keep neither keys and values nor a state.
        """
        groups = kv_cache_config.kv_cache_groups
        if not all(isinstance(group.kv_cache_spec, AttentionSpec | MambaSpec) for group in groups):
            raise ValueError("some layers keep neither keys and values nor a state")
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]
        self._vocabulary_size = vllm_config.model_config.get_vocab_size()
        scheduler = vllm_config.scheduler_config
        smallest = min(self._block_sizes)
        self.kv_cache_tokens = kv_cache_config.num_blocks // len(groups) * smallest
        # Block 0 is vLLM's null block, and each request may leave most of a block empty.
        num_blocks = kv_cache_config.num_blocks - 1 - len(groups) * (scheduler.max_num_seqs + 1)
        self.limits = StepLimits(
            max_seqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            max_context=vllm_config.model_config.max_model_len,
            cache_tokens=num_blocks // len(groups) * smallest,
        )
        self._made = 0
        self._next_block = 1
        self._alive = set[str]()
        self.most_blocks = 0
        """Requests were given none of a higher number."""

    def request(
        self,
        context: int,
        query: int,
        *,
        room: int = DECODE_ROOM,
        temperature: float = 1.0,
        like: HandMadeRequest | None = None,
    ) -> HandMadeRequest:
        """A request with ``context`` tokens in the KV cache, that is to compute ``query`` more and
        may then decode ``room`` tokens. ``like``: in the blocks of that one, with its tokens."""
        self._made += 1
        length = context + query
        if like is None:
            # Tokens that differ, or a mixture of experts would run a few of its experts only.
            tokens = [(self._made + 7919 * n) % self._vocabulary_size for n in range(length)]
            blocks = tuple(self._take(-(-(length + room) // size)) for size in self._block_sizes)
        else:
            tokens, blocks = list(like.data.prompt_token_ids or ())[:length], like.blocks
        data = NewRequestData(
            req_id=f"vllm-duet-{self._made}",
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=SamplingParams(
                max_tokens=room, ignore_eos=True, temperature=temperature
            ),
            pooling_params=None,
            block_ids=blocks,
            num_computed_tokens=context,
            lora_request=None,
            prefill_token_ids=tokens,
        )
        return HandMadeRequest(data, context)

    def _take(self, count: int) -> list[int]:
        first = self._next_block
        self._next_block += count
        self.most_blocks = max(self.most_blocks, self._next_block - 1)
        return list(range(first, self._next_block))

    def step(
        self,
        new: Sequence[HandMadeRequest] = (),
        decodes: Sequence[HandMadeRequest] = (),
        ended: Sequence[HandMadeRequest] = (),
    ) -> SchedulerOutput:
        """Compute what ``new`` have to, and a token of each of ``decodes``; ``ended`` are gone."""
        output, known = SchedulerOutput.make_empty(), CachedRequestData.make_empty()
        output.finished_req_ids = {request.req_id for request in ended}
        for request in decodes:
            known.req_ids.append(request.req_id)
            known.new_block_ids.append(None)
            known.num_computed_tokens.append(request.computed)
            known.num_output_tokens.append(request.computed - request.prompt_tokens + 1)
            output.num_scheduled_tokens[request.req_id] = 1
            request.computed += 1
        for request in new:
            query = request.prompt_tokens - request.computed
            output.num_scheduled_tokens[request.req_id] = query
            request.computed += query
        output.scheduled_new_reqs = [request.data for request in new]
        output.scheduled_cached_reqs = known
        output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
        output.num_common_prefix_blocks = [0] * len(self._block_sizes)
        self._alive |= output.num_scheduled_tokens.keys()
        self._alive -= output.finished_req_ids
        return output

    def end(self) -> SchedulerOutput:
        """A step of nothing, after which all requests are gone and all blocks are free."""
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, self._alive = self._alive, set()
        self._next_block = 1
        return output
