# SPDX-License-Identifier: Apache-2.0
"""DuetScheduler: vLLM's AsyncScheduler that may leave a prefill in flight.

What may live here: asking the policy, splitting a step, and joining a prefill. The
decision itself is policy.py's, its execution model_runner.py's; what a prefill keeps
while it is in flight is in_flight.py's.

A step goes one of three ways through ``schedule``:

* nothing is waiting to be prefilled: the stock step, untouched;
* decodes and prefill compete: the policy decides, and a SPLIT takes the prefill
  requests out of the stock step and leaves them in flight;
* a prefill is in flight: a stock step of the decodes alone, which may launch newcomers
  to follow it. Prompt tokens are then computed by a launch and never by the step itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_duet.config import DuetConfig
from vllm_duet.forecast import NoForecastError, lane_profile, roofline_for
from vllm_duet.in_flight import InFlightPrefill, KVBlocks
from vllm_duet.metrics import DuetCounters, DuetTotals
from vllm_duet.plan import (
    MAX_IN_FLIGHT,
    DuetPlan,
    Join,
    JoinedPrefill,
    Mode,
    PrefillLaunch,
    StepDirective,
    batch_of,
    has_prefill,
    split_output,
    without_requests,
)
from vllm_duet.policy import (
    AGGREGATED_STEP,
    DECODE_LANE,
    DECODE_ONLY,
    IDLE,
    PREFILL_LANE,
    FixedModePolicy,
    ForecastPolicy,
    Policy,
    PolicyLimits,
    RandomPolicy,
    decode_lanes,
)
from vllm_duet.roofline import StepTimeCorrection
from vllm_duet.step_times import StepTimes
from vllm_duet.support import deciding_blockers, reported_lanes, reported_roofline, split_blockers
from vllm_duet.version import __version__
from vllm_duet.watch import LaneWatch

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

MAX_WAITING_LOOKED_AT = 16
"""How many waiting requests the policy is told of; a step rarely admits more."""

MAX_FAILURES = 3
"""Prefills that may fail on their lane before steps are left whole."""

FORCED_CAP = 256
"""The prefill tokens of mode=capped."""


class DuetScheduler(AsyncScheduler):
    """Runs prefill and decode side by side when the forecast says it pays.

    Use: ``vllm serve MODEL --scheduler-cls vllm_duet.DuetScheduler``.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.duet_config = DuetConfig.load(vllm_config.additional_config)
        device_name = current_platform.get_device_name()
        self._blockers = split_blockers(vllm_config, device_name, self.kv_cache_config)
        lanes = reported_lanes(vllm_config)
        self._most_decodes = lanes.most_decodes
        if lanes.obstacle and not self._blockers:
            self._blockers.append(lanes.obstacle)
        learns = self.duet_config.correction and self.duet_config.mode == "auto"
        correction = StepTimeCorrection() if learns else None
        policy = make_policy(self.duet_config, vllm_config, correction, lanes.decode_sms)
        self._decide_by(policy, correction, time.monotonic)
        self._kv_blocks = KVBlocks(self.kv_cache_manager, self.kv_cache_config, lanes.lost_blocks)
        self._capped_decode_tokens = 0
        self._load, self._lane_step_ms = IDLE, 0.0
        self._in_flight: list[InFlightPrefill] = []
        self._held: list[Request] = []
        """Kept out of ``running`` while prefills are in flight: their requests, and any
        other prompt that is only partly computed."""
        self._joining = False
        self.totals = DuetTotals()
        self._counters = DuetCounters()
        if self._policy is None:
            pass  # what leaves every step to vLLM has been said
        elif self._blockers:
            logger.info("vllm-duet does not split here: %s.", "; ".join(self._blockers))
        else:
            logger.info(
                "vllm-duet %s: mode %s, a bound of %g ms between tokens.",
                __version__,
                self.duet_config.mode,
                self.duet_config.tbt_slo_ms,
            )

    # Deciding

    def _decide_by(
        self,
        policy: Policy | None,
        correction: StepTimeCorrection | None,
        clock: Callable[[], float],
    ) -> None:
        """Ask ``policy`` from now on, and compare steps with its forecasts."""
        watch = None
        if isinstance(policy, ForecastPolicy) and policy.decode_sms and not self._blockers:
            watch = LaneWatch(policy.decode_sms, policy.use_lanes, correction, clock)
        self._policy: Policy | None = policy
        self._step_times = StepTimes(correction, clock, self.duet_config.tbt_slo_ms, watch)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._in_flight:
            return self._schedule_beside(self._in_flight[-1])
        if self._policy is None:
            return super().schedule(throttle_prefills)
        if not (self.waiting or self._inflight_prefills):
            return self._schedule_whole(throttle_prefills)
        decodes, prompts = self.running, list[Request]()
        if self._inflight_prefills:
            decodes = [request for request in self.running if not request.is_prefill_chunk]
            prompts = [request for request in self.running if request.is_prefill_chunk]
        if not decodes:
            return self._schedule_whole(throttle_prefills)
        num_decodes, decode_tokens = len(decodes), self._decode_tokens(decodes)
        plan, prefill_tokens = self._decide(self._policy, decodes, decode_tokens, prompts)
        if plan.mode is not Mode.AGGREGATED and prompts:
            # Decodes first: a cut budget must not run out on a prompt before them.
            self.running = decodes + prompts
        with self._prefill_tokens_capped(decode_tokens, plan.max_prefill_tokens):
            output = super().schedule(throttle_prefills)
        as_planned = output.total_num_scheduled_tokens == decode_tokens + prefill_tokens
        if plan.mode is Mode.SPLIT:
            if not as_planned and all(batch := batch_of(output)):
                # The prefix cache held some of it, or the KV cache had no room.
                plan = self._policy.decide(*batch, can_split=True, can_cap=False, load=self._load)
            if (
                plan.mode is Mode.SPLIT
                and (decode := self._split(output, plan, num_decodes)) is not None
            ):
                return decode
            plan, as_planned = replace(plan, mode=Mode.AGGREGATED), False
        forecast_ms = plan.tbt_ms if as_planned else 0.0
        self._step_times.scheduled(
            output, _kind_of(output), forecast_ms, plan, prompts_wait=bool(self.waiting)
        )
        self.totals.steps[plan.mode] += 1
        return output

    def _schedule_whole(self, throttle_prefills: bool) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        self._step_times.scheduled(output, _kind_of(output))
        return output

    def _decode_tokens(self, decodes: Sequence[Request]) -> int:
        """How many tokens ``decodes`` take in the next step: each one, and its drafts."""
        if not self.num_spec_tokens:
            return len(decodes)
        return sum(
            request.num_tokens_with_spec
            + request.num_output_placeholders
            - request.num_computed_tokens
            for request in decodes
        )

    def _decide(
        self,
        policy: Policy,
        decodes: Sequence[Request],
        decode_tokens: int,
        prompts: Sequence[Request] = (),
        decode_sms: int | None = None,
    ) -> tuple[DuetPlan, int]:
        """Ask the policy about the batch the stock scheduler is about to build.

        It has ``decodes``, of ``decode_tokens`` in all, then what is left of ``prompts``, then
        those that wait.
        ``decode_sms`` are the decode lane's if it is in use. Returns the plan, and how
        many prefill tokens the step should have by it.
        """
        free_tokens = self.kv_cache_manager.block_pool.get_num_free_blocks() * self.block_size
        # What the KV cache has no room for will wait.
        budget = min(self.max_num_scheduled_tokens - decode_tokens, free_tokens)
        query_lens: list[int] = []
        context_lens: list[int] = []
        waiting_tokens, can_split = 0.0, not (self._blockers or self.kv_holding_waiting)
        for request in chain(prompts, islice(self.waiting, MAX_WAITING_LOOKED_AT)):
            if budget <= 0:
                break
            tokens = request.num_tokens - request.num_computed_tokens
            if tokens <= 0:
                continue
            if request.has_encoder_inputs:
                # An image that does not fit into a cut step would wait for a larger one, and
                # what the encoder takes is in no forecast.
                return DuetPlan(Mode.AGGREGATED, reason="a prompt is more than text"), 0
            waiting_tokens += tokens
            query_lens.append(min(budget, tokens))
            context_lens.append(request.num_computed_tokens)
            can_split &= _can_be_in_flight(request)
            budget -= tokens
        if not query_lens:
            return DuetPlan(Mode.AGGREGATED, reason="no room for prefill in this step"), 0
        # Those that were not looked at are taken to be as long as the others.
        waiting_tokens *= (len(prompts) + len(self.waiting)) / len(query_lens)
        # Who has just joined is not in the step that is queued.
        first, last = decodes[0].num_output_placeholders, decodes[-1].num_output_placeholders
        self._load = self._step_times.load._replace(
            backlog=min(waiting_tokens, free_tokens) / self.max_num_scheduled_tokens,
            kv_usage=self.kv_cache_manager.usage,
            waited_ms=self._lane_step_ms if first and not last else 0.0,
        )
        plan = policy.decide(
            [request.num_computed_tokens for request in decodes],
            query_lens,
            context_lens,
            can_split=can_split and len(decodes) <= self._most_decodes,
            load=self._load,
            lane_in_use=decode_sms,
        )
        self._step_times.forecast(plan.decode_ms)
        prefill_tokens = sum(query_lens)
        if plan.max_prefill_tokens is not None:
            prefill_tokens = min(prefill_tokens, plan.max_prefill_tokens)
        return plan, prefill_tokens

    @contextmanager
    def _prefill_tokens_capped(self, decode_tokens: int, tokens: int | None) -> Iterator[None]:
        budget = self.max_num_scheduled_tokens
        if tokens is not None:
            # vLLM ends no chunk so near to the end of a prompt that drafts would lack tokens.
            tokens = max(tokens, self.num_prefill_lookahead)
            self.max_num_scheduled_tokens = min(budget, decode_tokens + tokens)
            self._capped_decode_tokens = decode_tokens
        try:
            yield
        finally:
            self.max_num_scheduled_tokens, self._capped_decode_tokens = budget, 0

    def _mamba_block_aligned_split(self, *args: Any, **kwargs: Any) -> int:
        # It asks whether a whole block fits into one step, where a prompt that is shorter
        # than a block goes unaligned. In a capped step the decodes' tokens are not for it.
        budget = self.max_num_scheduled_tokens
        self.max_num_scheduled_tokens -= self._capped_decode_tokens
        try:
            tokens: int = super()._mamba_block_aligned_split(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = budget
        return tokens

    # Splitting

    def _split(
        self, output: SchedulerOutput, plan: DuetPlan, num_decodes: int
    ) -> SchedulerOutput | None:
        """Take the prefill out of ``output`` and leave it in flight.

        The first ``num_decodes`` requests of ``running`` were decoding before this step.
        Returns the decode step, or ``None`` when this step has to stay whole. Beside a
        prefill in flight the decode step may have nothing to decode.
        """
        parts = split_output(output)
        if parts is None:
            return None
        decode, prefill = parts
        behind = bool(self._in_flight)
        if not behind and not decode.num_scheduled_tokens:
            return None
        if not all(_can_be_in_flight(self.requests[i]) for i in prefill.num_scheduled_tokens):
            return None
        # The decodes that were running are still the first, unless one was preempted.
        first = 0 if output.preempted_req_ids else num_decodes
        decodes = self.running[:first]
        for request in self.running[first:]:
            in_flight = request.request_id in prefill.num_scheduled_tokens
            (self._held if in_flight or request.is_prefill_chunk else decodes).append(request)
        self.running = decodes
        launch = PrefillLaunch(
            self.totals.launched,
            prefill,
            plan.decode_sms,
            plan.prefill_sms,
            after_decode=self._reads_what_is_decoded(prefill, decode),
        )
        self._in_flight.append(
            InFlightPrefill(launch.launch_id, prefill, plan, self._step_times.clock())
        )
        self.totals.launched += 1
        self.totals.steps[Mode.SPLIT] += 1
        join = None
        if behind:
            join = Join.IF_DONE if decode.num_scheduled_tokens else Join.WAIT
        decode.duet = StepDirective(launch=launch, join=join, decode_sms=plan.decode_sms)
        self._step_times.scheduled(decode, DECODE_LANE, plan=plan)
        return decode

    def _reads_what_is_decoded(self, prefill: SchedulerOutput, decode: SchedulerOutput) -> bool:
        """Whether ``prefill`` finds a block in the prefix cache that ``decode`` completes.

        vLLM registers such a block while it schedules the decode, and may admit a request
        that finds it within the same call.
        """
        found = self._kv_blocks.read_from_cache(prefill)
        return bool(found) and not found.isdisjoint(self._kv_blocks.completed_by(decode))

    def _schedule_beside(self, prefill: InFlightPrefill) -> SchedulerOutput:
        """A decode step while ``prefill`` is the last in flight.

        The requests in flight are not in ``running``, so the stock step can neither
        schedule nor preempt them. It admits nobody, unless a prefill is launched to
        follow: a newcomer would prefill on the decode lane, and might read
        prefix-cache blocks that a prefill in flight has registered but not written.
        """
        if (plan := self._plan_to_follow(prefill)) is not None:
            return self._launch_behind(prefill, plan)
        pause_state, kv_holding = self._pause_state, self.kv_holding_waiting
        if pause_state is PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW
        self.kv_holding_waiting = create_request_queue(self.policy)
        try:
            output = super().schedule()
        finally:
            self._pause_state, self.kv_holding_waiting = pause_state, kv_holding
        return self._beside(output, prefill)

    def _beside(self, output: SchedulerOutput, prefill: InFlightPrefill) -> SchedulerOutput:
        # Nobody was admitted, and whoever is partly computed is held.
        assert not has_prefill(output), "prompt tokens beside a prefill in flight"
        join, forecast_ms = Join.WAIT, 0.0
        if output.total_num_scheduled_tokens:
            join, forecast_ms = Join.IF_DONE, prefill.plan.tbt_ms
            self.totals.steps[Mode.SPLIT] += 1
        self._step_times.scheduled(output, DECODE_LANE, forecast_ms, prefill.plan)
        output.duet = StepDirective(join=join, decode_sms=prefill.plan.decode_sms)
        return output

    def _plan_to_follow(self, prefill: InFlightPrefill) -> DuetPlan | None:
        """The plan for newcomers as the next prefill on the lane, where there is to be one.

        Only newcomers: a prompt in flight has its rows updated when its chunk is joined.
        So nobody follows while a prompt is partly computed, or newcomers would overtake it
        for ever.
        """
        if len(self._in_flight) == MAX_IN_FLIGHT or not self.waiting or not self.running:
            return None
        if self._policy is None or self._pause_state is not PauseState.UNPAUSED:
            return None
        if self.kv_holding_waiting or self._inflight_prefills or self._ends_later(prefill):
            return None
        if any(other.left for other in self._in_flight):
            # Their rows are taken until the join, and their ids may be those of newcomers.
            return None
        rooms = self.max_num_active_reqs - len(self.running) - len(self._held)
        if rooms <= 0 or not all(map(_can_be_in_flight, self.waiting)):
            return None
        # Those in flight decode beside it once they have joined.
        if len(self.running) + len(self._held) > self._most_decodes:
            return None
        # Nobody may be preempted now for a block, least of all who is in flight.
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if free <= len(self.running) * len(self.kv_cache_config.kv_cache_groups):
            return None
        plan, _ = self._decide(
            self._policy, self.running, len(self.running), decode_sms=prefill.plan.decode_sms
        )
        return plan if plan.mode is Mode.SPLIT else None

    def _ends_later(self, prefill: InFlightPrefill) -> bool:
        """Whether the lane stays busy past the step that is about to be scheduled."""
        correction, plan = self._step_times.correction, prefill.plan
        factor = correction.factor(PREFILL_LANE) if correction else 1.0
        # The step before it may have just begun.
        soon = prefill.started_at + 1e-3 * (plan.prefill_ms * factor - 2 * plan.tbt_ms)
        return self._step_times.clock() < soon

    def _launch_behind(self, prefill: InFlightPrefill, plan: DuetPlan) -> SchedulerOutput:
        """A decode step that also launches newcomers, to run when ``prefill`` is done."""
        num_decodes, rooms = len(self.running), self.max_num_active_reqs
        self.max_num_active_reqs = rooms - len(self._held)
        try:
            with self._prefill_tokens_capped(num_decodes, plan.max_prefill_tokens):
                output = super().schedule()
        finally:
            self.max_num_active_reqs = rooms
        decode = self._split(output, plan, num_decodes)
        return self._beside(output, prefill) if decode is None else decode

    # Joining

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._step_times.ended(scheduler_output)
        joined: JoinedPrefill | None = getattr(model_runner_output, "duet", None)
        if joined is not None:
            # Before the stock update, which makes this step's statistics.
            self._count(joined)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if joined is not None:
            merge_outputs(outputs, self._join(joined))
        return outputs

    def _count(self, joined: JoinedPrefill) -> None:
        totals = self.totals
        totals.joined += 1
        totals.failed += joined.error is not None
        # One behind another begins when that joins, so no time counts twice.
        totals.split_ms += 1e3 * (self._step_times.clock() - self._in_flight[0].started_at)
        totals.lane_busy_ms["prefill"] += joined.prefill_busy_ms
        totals.lane_busy_ms["decode"] += joined.decode_busy_ms

    def _join(self, joined: JoinedPrefill) -> dict[int, EngineCoreOutputs]:
        prefill = self._in_flight.pop(0)
        assert prefill.launch_id == joined.launch_id
        held, self._held = self._held, []
        if joined.error is None:
            decoding = sum(r.request_id in prefill and not r.is_prefill_chunk for r in held)
            correction = self._step_times.correction
            factor = correction.factor(DECODE_LANE) if correction else 1.0
            self._lane_step_ms = prefill.plan.tbt_ms * factor
            self._step_times.prefill_ended(prefill.plan, joined.prefill_busy_ms, decoding)
        for request in held:
            behind = any(request.request_id in other for other in self._in_flight)
            stays = behind or (self._in_flight and request.is_prefill_chunk)
            (self._held if stays else self.running).append(request)
        for other in self._in_flight:
            other.started_at = self._step_times.clock()
        if joined.error is not None:
            outputs = self._fail(prefill, joined.error)
        else:
            self._joining = True
            try:
                outputs = super().update_from_output(
                    without_requests(prefill.output, prefill.finished), joined.output
                )
            finally:
                self._joining = False
        self._kv_blocks.free_left(prefill)
        # The model runner gives their rows back before it runs the next step.
        self.finished_req_ids |= prefill.left.keys()
        return outputs

    def _fail(self, prefill: InFlightPrefill, error: str) -> dict[int, EngineCoreOutputs]:
        """End the requests of a prefill that was not computed, and those that rely on it.

        The prefix cache has its blocks as if they had been written.
        """
        failed = set(prefill.output.num_scheduled_tokens)
        unwritten = set[int]().union(*(self._kv_blocks.written(prefill, i) for i in failed))
        failed -= prefill.finished
        for behind in self._in_flight:
            for request_id in behind.output.num_scheduled_tokens.keys() - behind.left.keys():
                if unwritten & self._kv_blocks.of(request_id):
                    failed.add(request_id)
                    unwritten |= self._kv_blocks.written(behind, request_id)
        self.kv_cache_manager.evict_blocks(unwritten)
        requests = self.finish_requests(failed, RequestStatus.FINISHED_ERROR)
        logger.error("vllm-duet: %d requests failed. %s", len(requests), error)
        if self.totals.failed == MAX_FAILURES:
            self._blockers.append(f"{MAX_FAILURES} prefills have failed on their lane")
            logger.error("vllm-duet splits no more steps: %s.", self._blockers[-1])
        outputs: dict[int, EngineCoreOutputs] = {}
        for request in requests:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    # Leaving a prefill in flight

    def _in_flight_with(self, request_id: str) -> InFlightPrefill | None:
        return next((prefill for prefill in self._in_flight if request_id in prefill), None)

    def _free_request_blocks(self, request: Request) -> None:
        prefill = self._in_flight_with(request.request_id) if self._in_flight else None
        if prefill is None or request.request_id in prefill.left:
            super()._free_request_blocks(request)
            return
        # The lane still reads and writes them.
        self._kv_blocks.leave(prefill, request)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        freed = super()._free_request(request, delay_free_blocks)
        self._step_times.finished(request.num_output_tokens)
        if self._in_flight:
            self._held = [other for other in self._held if other is not request]
            if (prefill := self._in_flight_with(request.request_id)) is not None:
                # Its row is in use, or that of an earlier request of the same id.
                prefill.finished.add(request.request_id)
                self.finished_req_ids.discard(request.request_id)
        return freed

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if self._in_flight and self._in_flight_with(request.request_id) is not None:
            self.reset_preempted_req_ids.discard(request.request_id)

    # What vLLM asks of a scheduler, counting what is in flight

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        # The statistics of a join are those of the step that carried it back.
        stats = None if self._joining else super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.num_kv_fetch_reqs_by_stage |= self._counters.entries(
                self.totals, self._blockers, self._step_times
            )
        return stats

    def get_request_counts(self) -> tuple[int, int]:
        num_running, num_waiting = super().get_request_counts()
        return num_running + len(self._held), num_waiting

    def has_requests(self) -> bool:
        return bool(self._in_flight) or super().has_requests()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if reset_running_requests:
            # As vLLM preempts who is running. What the lane computes for them is dropped.
            while self._held:
                request = self._held.pop()
                self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        with self._kv_blocks.only_of_requests(self._in_flight):
            return super().reset_prefix_cache(reset_running_requests, reset_connector)


def _can_be_in_flight(request: Request) -> bool:
    # Structured output needs the grammar's bitmask when it samples, and a
    # resumable session may change its prompt at any time.
    return not (request.use_structured_output or request.resumable)


def _kind_of(output: SchedulerOutput) -> str:
    """Whether a whole step has any prefill; one token of a prompt passes for a decode."""
    drafts = sum(map(len, output.scheduled_spec_decode_tokens.values()))
    prefill = output.total_num_scheduled_tokens > len(output.num_scheduled_tokens) + drafts
    return AGGREGATED_STEP if prefill or output.scheduled_new_reqs else DECODE_ONLY


def make_policy(
    config: DuetConfig,
    vllm_config: Any,
    correction: StepTimeCorrection | None,
    decode_sms: tuple[int, ...] | None = None,
) -> Policy | None:
    """The policy ``config.mode`` names; ``None`` leaves every step to vLLM.

    ``decode_sms`` are the decode lanes that it may use; ``None``, all that there are.

    Raises:
        ValueError: the GPU profile or the SM counts in ``config`` are wrong.
    """
    if config.mode == "aggregated":
        return None
    if blockers := deciding_blockers(vllm_config):
        logger.info("vllm-duet leaves every step to vLLM: %s.", "; ".join(blockers))
        return None
    if config.mode != "auto":
        # A forced mode needs SM counts but no forecast.
        profile = lane_profile(config, current_platform.get_device_name())
        lanes = decode_lanes(profile, config.decode_sms)
        if config.mode == "random":
            return RandomPolicy(config.seed, lanes, profile.num_sms)
        return FixedModePolicy(
            Mode(config.mode),
            lanes[0],
            profile.num_sms - lanes[0],
            max_prefill_tokens=FORCED_CAP,
        )
    try:
        roofline = reported_roofline(vllm_config) or roofline_for(
            vllm_config, config, current_platform.get_device_name()
        )
    except NoForecastError as reason:
        logger.warning("vllm-duet leaves every step to vLLM: %s.", reason)
        return None
    limits = PolicyLimits(
        tbt_slo_ms=config.tbt_slo_ms,
        decode_sms=decode_sms or config.decode_sms,
        max_lookahead=config.max_lookahead,
        split_for_throughput=config.split_for_throughput,
        throughput_margin=config.throughput_margin,
        decode_tokens=1 + vllm_config.num_speculative_tokens,
    )
    return ForecastPolicy(roofline, limits, correction)


def merge_outputs(
    outputs: dict[int, EngineCoreOutputs], more: dict[int, EngineCoreOutputs]
) -> None:
    """Add the outputs of a join to those of the step that carried it back."""
    for client_index, theirs in more.items():
        ours = outputs.setdefault(client_index, theirs)
        if ours is theirs:
            continue
        ours.outputs = [*ours.outputs, *theirs.outputs]
        if theirs.finished_requests:
            ours.finished_requests = (ours.finished_requests or set()) | theirs.finished_requests
