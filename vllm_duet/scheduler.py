# SPDX-License-Identifier: Apache-2.0
"""DuetScheduler: vLLM's AsyncScheduler that may leave a prefill in flight.

What may live here: asking the policy, splitting a step, and the bookkeeping of
the one prefill in flight. The decision itself is policy.py's, its execution
model_runner.py's.

A step goes one of three ways through ``schedule``:

* nothing is waiting to be prefilled: the stock step, untouched;
* decodes and prefill compete: the policy decides, and a SPLIT takes the prefill
  requests out of the stock step and leaves them in flight;
* a prefill is in flight: a stock step of the decodes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_duet.config import DuetConfig
from vllm_duet.plan import (
    DuetPlan,
    Join,
    JoinedPrefill,
    Mode,
    PrefillLaunch,
    StepDirective,
    split_output,
    without_requests,
)
from vllm_duet.policy import FixedModePolicy, Policy, RandomPolicy
from vllm_duet.support import split_blockers

logger = init_logger(__name__)

MAX_WAITING_LOOKED_AT = 16
"""How many waiting requests the policy is told of; a step rarely admits more."""


@dataclass(slots=True)
class InFlightPrefill:
    """The prefill between its launch and its join.

    ``held`` are the requests kept out of ``Scheduler.running`` until the join:
    those in flight and any other prompt that is only partly computed.
    ``finished`` are requests in flight that ended meanwhile, as by an abort;
    their KV blocks and request rows are given back at the join.
    """

    launch_id: int
    output: SchedulerOutput
    held: list[Request]
    finished: list[Request] = field(default_factory=list)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self.output.num_scheduled_tokens


class DuetScheduler(AsyncScheduler):
    """Runs prefill and decode side by side when the forecast says it pays.

    Use: ``vllm serve MODEL --scheduler-cls vllm_duet.DuetScheduler``.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.duet_config = DuetConfig.load(vllm_config.additional_config)
        self._blockers = split_blockers(vllm_config, self.kv_cache_config)
        self._policy = make_policy(self.duet_config, vllm_config)
        self._prefill: InFlightPrefill | None = None
        self._num_launches = 0
        self.num_steps = dict.fromkeys(Mode, 0)
        if self._blockers:
            logger.info("vllm-duet does not split here: %s.", "; ".join(self._blockers))

    # Deciding

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._prefill is not None:
            return self._schedule_beside_prefill()
        if self._policy is None or not (self.waiting or self._inflight_prefills):
            return super().schedule(throttle_prefills)
        decodes = [request for request in self.running if not request.is_prefill_chunk]
        if not decodes:
            return super().schedule(throttle_prefills)
        plan = self._decide(self._policy, decodes)
        self.num_steps[plan.mode] += 1
        if plan.mode is Mode.AGGREGATED:
            return super().schedule(throttle_prefills)
        # Decodes first: a cut budget must not run out on a prompt before them.
        self.running = decodes + [r for r in self.running if r.is_prefill_chunk]
        with self._prefill_tokens_capped(len(decodes), plan.max_prefill_tokens):
            output = super().schedule(throttle_prefills)
        return self._split(output, plan) if plan.mode is Mode.SPLIT else output

    def _decide(self, policy: Policy, decodes: list[Request]) -> DuetPlan:
        """Ask the policy about the batch the stock scheduler is about to build."""
        budget = self.max_num_scheduled_tokens - len(decodes)
        prompts = [request for request in self.running if request.is_prefill_chunk]
        prompts += islice(self.waiting, MAX_WAITING_LOOKED_AT)
        query_lens: list[int] = []
        context_lens: list[int] = []
        for request in prompts:
            if budget <= 0:
                break
            tokens = min(budget, request.num_tokens - request.num_computed_tokens)
            query_lens.append(tokens)
            context_lens.append(request.num_computed_tokens)
            budget -= tokens
        if not query_lens:
            return DuetPlan(Mode.AGGREGATED, reason="no room for prefill in this step")
        return policy.decide(
            [request.num_computed_tokens for request in decodes],
            query_lens,
            context_lens,
            can_split=not self._blockers and not self.kv_holding_waiting,
        )

    @contextmanager
    def _prefill_tokens_capped(self, num_decodes: int, tokens: int | None) -> Iterator[None]:
        budget = self.max_num_scheduled_tokens
        if tokens is not None:
            self.max_num_scheduled_tokens = min(budget, num_decodes + tokens)
        try:
            yield
        finally:
            self.max_num_scheduled_tokens = budget

    # Splitting

    def _split(self, output: SchedulerOutput, plan: DuetPlan) -> SchedulerOutput:
        parts = split_output(output)
        if parts is None or not self._can_be_in_flight(parts[1]):
            return output
        decode, prefill = parts
        launch = PrefillLaunch(self._num_launches, prefill, plan.decode_sms, plan.prefill_sms)
        self._num_launches += 1
        held = [
            request
            for request in self.running
            if request.is_prefill_chunk or request.request_id in prefill.num_scheduled_tokens
        ]
        self._prefill = InFlightPrefill(launch.launch_id, prefill, held)
        self.running = [r for r in self.running if r.request_id not in {h.request_id for h in held}]
        decode.duet = StepDirective(launch=launch, decode_sms=plan.decode_sms)
        self._decode_sms = plan.decode_sms
        return decode

    def _can_be_in_flight(self, prefill: SchedulerOutput) -> bool:
        # Structured output needs the grammar's bitmask when it samples, and a
        # resumable session may change its prompt at any time.
        requests = (self.requests[req_id] for req_id in prefill.num_scheduled_tokens)
        return not any(r.use_structured_output or r.resumable for r in requests)

    def _schedule_beside_prefill(self) -> SchedulerOutput:
        """A decode step while a prefill is in flight.

        The requests in flight are not in ``running``, so the stock step can
        neither schedule nor preempt them, and it admits nobody: a newcomer
        would prefill on the decode lane, and might read prefix-cache blocks
        that the prefill in flight has registered but not written.
        """
        pause_state, kv_holding = self._pause_state, self.kv_holding_waiting
        if pause_state is PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW
        self.kv_holding_waiting = create_request_queue(self.policy)
        try:
            output = super().schedule()
        finally:
            self._pause_state, self.kv_holding_waiting = pause_state, kv_holding
        join = Join.IF_DONE if output.total_num_scheduled_tokens else Join.WAIT
        output.duet = StepDirective(join=join, decode_sms=self._decode_sms)
        self.num_steps[Mode.SPLIT] += 1
        return output

    # Joining

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        joined: JoinedPrefill | None = getattr(model_runner_output, "duet", None)
        if joined is not None:
            merge_outputs(outputs, self._join(joined))
        return outputs

    def _join(self, joined: JoinedPrefill) -> dict[int, EngineCoreOutputs]:
        prefill, self._prefill = self._prefill, None
        assert prefill is not None and prefill.launch_id == joined.launch_id
        self.running = self.running + prefill.held
        finished = {request.request_id for request in prefill.finished}
        outputs = super().update_from_output(
            without_requests(prefill.output, finished), joined.output
        )
        for request in prefill.finished:
            super()._free_request(request)
        return outputs

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        prefill = self._prefill
        if prefill is not None and request in prefill.held:
            prefill.held.remove(request)
            if request in prefill:
                # The lane still reads and writes its blocks and its row.
                prefill.finished.append(request)
                return None, None
        return super()._free_request(request, delay_free_blocks)

    # What vLLM asks of a scheduler, counting what is in flight

    def get_request_counts(self) -> tuple[int, int]:
        num_running, num_waiting = super().get_request_counts()
        if self._prefill is not None:
            num_running += len(self._prefill.held)
        return num_running, num_waiting

    def has_requests(self) -> bool:
        return self._prefill is not None or super().has_requests()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if self._prefill is not None:
            logger.warning("The prefix cache was not reset: a prefill is in flight. Try again.")
            return False
        return super().reset_prefix_cache(reset_running_requests, reset_connector)


def make_policy(config: DuetConfig, vllm_config: Any) -> Policy | None:
    """The policy ``config.mode`` names; ``None`` leaves every step to vLLM."""
    decode_sms = config.decode_sms or (16,)
    num_sms = 132
    if config.mode in ("aggregated", "auto"):
        return None
    if config.mode == "random":
        return RandomPolicy(config.seed, decode_sms, num_sms)
    return FixedModePolicy(
        Mode(config.mode), decode_sms[0], num_sms - decode_sms[0], max_prefill_tokens=256
    )


def merge_outputs(
    outputs: dict[int, EngineCoreOutputs], more: dict[int, EngineCoreOutputs]
) -> None:
    """Add the outputs of a join to those of the step that carried it back."""
    for client_index, theirs in more.items():
        # Statistics were drained by the step's own update.
        theirs.scheduler_stats = None
        ours = outputs.setdefault(client_index, theirs)
        if ours is theirs:
            continue
        ours.outputs = [*ours.outputs, *theirs.outputs]
        if theirs.finished_requests:
            ours.finished_requests = (ours.finished_requests or set()) | theirs.finished_requests
