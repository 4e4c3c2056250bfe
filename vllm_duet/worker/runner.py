# SPDX-License-Identifier: Apache-2.0
"""DuetModelRunnerMixin: Model Runner V2 with a prefill left in flight on a second lane.

What may live here: executing a StepDirective, on whatever device. What a step should do is
decided in scheduler.py; what a prefill owns until its join is in lane_state.py; how a lane
runs its work is in lanes/; what only a GPU or only a CPU has is in gpu.py and cpu.py.

Stock steps pass straight through. For a launch, the stock ``execute_model``
prepares the prefill batch into the lane's own state; in place of the model it
meets a recorder, so the forward can run on the lane at any later moment. At the join, the
caller's thread samples from the hidden states, on the caller's stream: vLLM's samplers keep
scratch memory of which there is one in the process.
"""

from __future__ import annotations

import copy
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.forward_context import override_forward_context
from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.workspace import use_workspace_lane

from vllm_duet.config import CHECK_VARIABLE
from vllm_duet.lanes import InFlight, LanePair
from vllm_duet.plan import (
    MAX_IN_FLIGHT,
    Join,
    JoinedPrefill,
    PrefillLaunch,
    StepDirective,
    directive_of,
)
from vllm_duet.worker.lane_state import (
    ForwardRecorder,
    GivingWay,
    LaneCheck,
    PrefillLaneState,
    RecordedForward,
    prefill_workspace_lane,
)

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's


class DuetModelRunnerMixin:
    """Executes step directives on top of a Model Runner V2 class.

    ``lanes`` is ``None`` where no step is split: every step is then a stock one.
    """

    lanes: LanePair | None
    prefill_states: list[PrefillLaneState]
    execute_model_state: Any
    _in_flight: deque[InFlightPrefill]
    _directive: StepDirective | None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        self.lanes = None
        self.prefill_states = []
        self.checks_lanes = os.environ.get(CHECK_VARIABLE) == "1"
        self._in_flight = deque()
        self._directive = None

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(  # type: ignore[misc]
            kv_cache_config, is_profiling=is_profiling, **kwargs
        )
        if self.lanes is not None:
            self.prefill_states = self.make_prefill_states()

    def make_prefill_states(self) -> list[PrefillLaneState]:
        """One for each prefill that may be in flight."""
        return [PrefillLaneState(self) for _ in range(MAX_IN_FLIGHT)]

    # A step: the decode batch first, then whatever the directive adds.

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        directive = self._directive = directive_of(scheduler_output)
        if directive is None:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        assert self.lanes is not None
        launch = directive.launch
        if launch and not launch.after_decode and not _touches_blocks(scheduler_output):
            self.lanes.fork()
        if self.needs_forward_context(scheduler_output, directive.decode_sms):
            self.wait_until_queued()
        with self.lanes.exclusive(), self.decoding(directive.decode_sms):
            output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if scheduler_output.total_num_scheduled_tokens == 0:
            # No sampling will follow: nothing is left to decode.
            return self._launch_and_join(self.lanes, output, directive)
        return output

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        directive, self._directive = self._directive, None
        if directive is None:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        assert self.lanes is not None
        with self.lanes.exclusive(), self.decoding(directive.decode_sms):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        # After the decode step is queued, so that preparing a prefill does not hold it up.
        return self._launch_and_join(self.lanes, output, directive)

    def needs_forward_context(self, scheduler_output: SchedulerOutput, decode_sms: int) -> bool:
        """Whether a step beside a prefill needs what the prefill may hold (rule 3).

        No: lanes that share one thread or take turns by whole steps give it back.
        """
        return False

    def decoding(self, decode_sms: int) -> AbstractContextManager[None]:
        """Run what the block queues on the decode lane of ``decode_sms`` SMs."""
        assert self.lanes is not None
        return self.lanes.decoding(decode_sms)

    # The prefill: prepared at its launch, run by its lane, sampled at the join.

    def _launch_and_join(
        self,
        lanes: LanePair,
        step: ModelRunnerOutput | AsyncModelRunnerOutput | None,
        directive: StepDirective,
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        if directive.launch is not None:
            self._launch(lanes, directive.launch)
        return self._join(lanes, step, directive.join)

    def _launch(self, lanes: LanePair, launch: PrefillLaunch) -> None:
        assert len(self._in_flight) < MAX_IN_FLIGHT
        lane_state = self.prefill_states[launch.launch_id % MAX_IN_FLIGHT]
        recorder = ForwardRecorder()
        self.wait_until_queued()
        with lanes.exclusive(), lanes.preparing(), lane_state.installed(self, recorder):
            super().execute_model(launch.output)  # type: ignore[misc]
            state, self.execute_model_state = self.execute_model_state, None
            check = LaneCheck(lane_state) if self.checks_lanes else None
        assert recorder.recorded is not None
        run = partial(self._run_prefill, lanes, recorder.recorded)
        in_flight = lanes.launch(run, launch.prefill_sms)
        self._in_flight.append(InFlightPrefill(launch, in_flight, state, check))

    @property
    def prefills_in_flight(self) -> list[InFlight[torch.Tensor]]:
        """In the order of their launches."""
        return [prefill.in_flight for prefill in self._in_flight]

    def wait_until_queued(self) -> None:
        """Have the forward context, one global, given back by the prefills in flight."""
        for prefill in self._in_flight:
            prefill.in_flight.wait_until_queued()

    @torch.inference_mode()
    def _run_prefill(self, lanes: LanePair, forward: RecordedForward) -> torch.Tensor:
        """The prefill's forward, on whatever thread its lane chose.

        Returns its hidden states [num_tokens, hidden_size].
        """
        context = forward.context
        if isinstance(context.attn_metadata, dict):
            context.attn_metadata = GivingWay(context.attn_metadata, lanes.give_way)
        with use_workspace_lane(prefill_workspace_lane()), override_forward_context(context):
            return self.model(**forward.inputs)  # type: ignore[attr-defined, no-any-return]

    def _sample_prefill(self, lanes: LanePair, prefill: InFlightPrefill) -> AsyncModelRunnerOutput:
        """The stock sampling of a prefill that has run, on the caller's thread and stream."""
        hidden_states = prefill.in_flight.result()
        with lanes.exclusive():
            self.execute_model_state = prefill.state._replace(hidden_states=hidden_states)
            try:
                return super().sample_tokens(None)  # type: ignore[misc, no-any-return]
            finally:
                self.execute_model_state = None

    def _join(
        self,
        lanes: LanePair,
        step: ModelRunnerOutput | AsyncModelRunnerOutput | None,
        join: Join | None,
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        if not self._in_flight or join is None:
            return step
        prefill = self._in_flight[0]
        with _named(prefill.launch):
            if join is Join.IF_DONE and not prefill.in_flight.done():
                return step
        self._in_flight.popleft()
        assert step is not None
        try:
            result, error = self._sample_prefill(lanes, prefill), None
        except Exception as raised:
            result, error = None, self._survived(lanes, raised, prefill.launch)
        if prefill.check is not None:
            prefill.check.verify(prefill.launch.launch_id)
        return JoinedStep(step, prefill, result, error, lanes.decode_busy_ms())

    def _survived(self, lanes: LanePair, error: Exception, launch: PrefillLaunch) -> str:
        """What went wrong with a prefill, in a sentence, where the engine can go on without it.

        Raises:
            RuntimeError: the GPU does not go on.
        """
        sentence = (
            f"A prefill of {launch.output.total_num_scheduled_tokens} tokens failed on its lane of"
            f" {launch.prefill_sms} SMs, beside a decode lane of {launch.decode_sms}:"
            f" {in_a_clause(error)}"
        )
        if not lanes.is_usable():
            raise RuntimeError(sentence) from error
        logger.error("vllm-duet: %s", sentence, exc_info=error)
        return sentence

    def shutdown(self) -> None:
        if self.lanes is not None:
            self.lanes.shutdown()
        super().shutdown()  # type: ignore[misc]


def in_a_clause(error: Exception) -> str:
    """What ``error`` says, for the end of a sentence.

    Of memory that ran out torch says how much there was of each kind and what to read about it,
    a paragraph.
    """
    if not isinstance(error, torch.OutOfMemoryError):
        return f"{type(error).__name__}: {str(error).rstrip('.')}"
    tried = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return "CUDA out of memory" + (f", for {tried[1]} more" if tried else "")


def _touches_blocks(scheduler_output: SchedulerOutput) -> bool:
    """Whether the step zeroes or copies KV blocks, which comes before both lanes (rule 4)."""
    return bool(scheduler_output.new_block_ids_to_zero or scheduler_output.kv_cache_block_copies)


@contextmanager
def _named(launch: PrefillLaunch) -> Iterator[None]:
    """Errors of the block tell of ``launch``: what a kernel does wrong is found out later."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"There was a prefill on a lane of {launch.prefill_sms} SMs, beside a decode lane of"
            f" {launch.decode_sms}."
        )
        raise


class InFlightPrefill(NamedTuple):
    """``state`` is vLLM's ExecuteModelState of the prepared batch, without hidden states."""

    launch: PrefillLaunch
    in_flight: InFlight[torch.Tensor]
    state: Any
    check: LaneCheck | None


class JoinedStep(AsyncModelRunnerOutput):
    """A step's output with the result of the prefill that ended by then, or its error."""

    def __init__(
        self,
        step: ModelRunnerOutput | AsyncModelRunnerOutput,
        prefill: InFlightPrefill,
        result: AsyncModelRunnerOutput | None,
        error: str | None,
        decode_busy_ms: float,
    ) -> None:
        self._step = step
        self._prefill = prefill
        self._result = result
        self._error = error
        self._decode_busy_ms = decode_busy_ms

    def get_kv_connector_output(self) -> None:
        """vLLM 0.33 asks for it when ``get_output`` has failed; SPLIT has no KV connector."""

    def get_output(self) -> ModelRunnerOutput:
        with _named(self._prefill.launch):
            if isinstance(self._step, AsyncModelRunnerOutput):
                output = self._step.get_output()
            else:
                # vLLM returns one shared empty output for steps without tokens.
                output = copy.copy(self._step)
            output.duet = JoinedPrefill(  # type: ignore[attr-defined]
                self._prefill.launch.launch_id,
                self._result.get_output() if self._result is not None else None,
                self._error,
                self._prefill.in_flight.busy_ms(),
                self._decode_busy_ms,
            )
            return output
