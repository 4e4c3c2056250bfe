# SPDX-License-Identifier: Apache-2.0
"""Schedulers with one rule of docs/design.md broken, or with one error of old."""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.plan import Join, StepDirective, split_output
from vllm_duet.scheduler import DuetScheduler


class ForgetsRowsOfTheAborted(DuetScheduler):
    """Does not count the row of a request that was aborted while its prefill is in flight."""

    def _plan_to_follow(self, prefill):
        left = [other.left for other in self._in_flight]
        for other in self._in_flight:
            other.left = {}
        try:
            return super()._plan_to_follow(prefill)
        finally:
            for other, theirs in zip(self._in_flight, left, strict=True):
                other.left = theirs


class PrefillsOnTheDecodeLane(DuetScheduler):
    """Leaves newcomers in a step that turns out to have no decodes, beside a prefill."""

    def _split(self, output, plan, num_decodes):
        parts = split_output(output)
        if self._in_flight and parts is not None and not parts[0].num_scheduled_tokens:
            return None
        return super()._split(output, plan, num_decodes)


class LetsNewcomersOvertake(DuetScheduler):
    """Launches newcomers behind a prompt that is partly computed, again and again."""

    def _plan_to_follow(self, prefill):
        partly, self._inflight_prefills = self._inflight_prefills, set()
        try:
            return super()._plan_to_follow(prefill)
        finally:
            self._inflight_prefills = partly


class ReadsBeforeItIsDecoded(DuetScheduler):
    """Lets a prefill run before the decode step that writes what it reads."""

    def _reads_what_is_decoded(self, prefill, decode):
        return False


class DoesNotReset(DuetScheduler):
    """Refuses to reset the prefix cache while a prefill is in flight."""

    def reset_prefix_cache(self, *args, **kwargs):
        return not self._in_flight and super().reset_prefix_cache(*args, **kwargs)


class KeepsTheId(DuetScheduler):
    """Knows the id of an aborted request until its prefill joins."""

    def add_request(self, request):
        assert self._in_flight_with(request.request_id) is None, "duplicate request id"
        super().add_request(request)


class GivesBlocksAway(DuetScheduler):
    """Frees the blocks of an aborted request although its prefill is in flight."""

    _free_request_blocks = AsyncScheduler._free_request_blocks


class GivesRowsAway(DuetScheduler):
    """Gives back the row of an aborted request although its prefill is in flight."""

    def _free_request(self, request, delay_free_blocks=False):
        freed = super()._free_request(request, delay_free_blocks)
        self.finished_req_ids.add(request.request_id)
        return freed


class AdmitsBesidePrefill(DuetScheduler):
    """Lets newcomers in while a prefill is in flight."""

    def _schedule_beside(self, prefill):
        output = AsyncScheduler.schedule(self)
        join = Join.IF_DONE if output.total_num_scheduled_tokens else Join.WAIT
        output.duet = StepDirective(join=join)
        return output


class TrustsAFailedPrefill(DuetScheduler):
    """Leaves the blocks of a prefill that failed in the prefix cache."""

    def _fail(self, prefill, error):
        manager = self.kv_cache_manager
        manager.evict_blocks = lambda blocks: None
        try:
            return super()._fail(prefill, error)
        finally:
            del manager.evict_blocks
