# SPDX-License-Identifier: Apache-2.0
"""The scheduler's bookkeeping of prefills between their launch and their join.

Rule 1 of docs/design.md lives here: as long as a prefill is in flight, the KV blocks and
the request rows of its requests are nobody else's, also those of a request that has left
it: one that was aborted, or preempted so that the prefix cache could be reset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_duet.plan import DuetPlan


@dataclass(slots=True)
class InFlightPrefill:
    """A prefill between its launch and its join.

    ``started_at`` is when its lane could begin with it. ``left`` are the KV blocks, by
    request id, of requests that have left it, and ``written_by_left`` the numbers of those
    that it writes to. ``finished`` are the ids that stand for no request any more, or for
    another one that came later.
    """

    launch_id: int
    output: SchedulerOutput
    plan: DuetPlan
    started_at: float
    left: dict[str, list[KVCacheBlock]] = field(default_factory=dict)
    written_by_left: dict[str, set[int]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.output.num_scheduled_tokens


class KVBlocks:
    """Which KV blocks a request has, and which of them a prefill writes to.

    The first ``num_lost`` blocks of a new KV cache are nobody's from the beginning.
    """

    def __init__(self, manager: KVCacheManager, config: KVCacheConfig, num_lost: int = 0) -> None:
        self._manager = manager
        self.lost = manager.block_pool.get_new_blocks(num_lost)
        self._block_sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
        # Stands for what has left a sliding window, of everybody.
        self._null = {manager.block_pool.null_block.block_id}

    def of(self, request_id: str, begin: int = 0) -> set[int]:
        """Those with tokens of a request from position ``begin`` on."""
        by_group = self._manager.get_block_ids(request_id)
        blocks = (
            ids[begin // size :] for ids, size in zip(by_group, self._block_sizes, strict=True)
        )
        return set(chain.from_iterable(blocks)) - self._null

    def written(self, prefill: InFlightPrefill, request_id: str) -> set[int]:
        """Those that a prefill writes to for one of its requests."""
        if (written := prefill.written_by_left.get(request_id)) is not None:
            return written
        return self.of(request_id, _begin_of(prefill.output, request_id))

    def read_from_cache(self, prefill: SchedulerOutput) -> set[int]:
        """Those that its new requests have found in the prefix cache."""
        found = (
            ids[: new.num_computed_tokens // size]
            for new in prefill.scheduled_new_reqs
            if new.num_computed_tokens
            for ids, size in zip(new.block_ids, self._block_sizes, strict=True)
        )
        return set(chain.from_iterable(found)) - self._null

    def completed_by(self, decode: SchedulerOutput) -> Iterator[int]:
        """Those whose last slot is written by a decode of the step."""
        cached = decode.scheduled_cached_reqs
        for request_id, position in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            for group, size in enumerate(self._block_sizes):
                if (position + 1) % size == 0:
                    yield self._manager.get_block_ids(request_id)[group][position // size]

    def leave(self, prefill: InFlightPrefill, request: Any) -> None:
        """Keep the blocks of ``request`` until the join; the request has them no more."""
        request_id = request.request_id
        prefill.written_by_left[request_id] = self.written(prefill, request_id)
        prefill.left[request_id] = self._manager.pop_blocks_for_free(request)

    def free_left(self, prefill: InFlightPrefill) -> None:
        """The prefill has joined: give back what was kept."""
        for blocks in prefill.left.values():
            # In vLLM's order: the tail of a prompt leaves the prefix cache first.
            self._manager.block_pool.free_blocks(reversed(blocks))

    @contextmanager
    def only_of_requests(self, prefills: Iterable[InFlightPrefill]) -> Iterator[None]:
        """Within the block, only what requests have counts as used, and not what is kept.

        Nothing may be allocated within it.
        """
        pool = self._manager.block_pool
        kept = [block for prefill in prefills for block in chain(*prefill.left.values())]
        kept += self.lost
        pool.free_blocks(reversed(kept))
        try:
            yield
        finally:
            pool.touch(kept)


def _begin_of(output: SchedulerOutput, request_id: str) -> int:
    """The position at which a step goes on with a request."""
    cached = output.scheduled_cached_reqs
    if request_id in cached.req_ids:
        return int(cached.num_computed_tokens[cached.req_ids.index(request_id)])
    return next(
        int(new.num_computed_tokens)
        for new in output.scheduled_new_reqs
        if new.req_id == request_id
    )
