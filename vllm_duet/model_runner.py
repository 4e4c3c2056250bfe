# SPDX-License-Identifier: Apache-2.0
"""DuetModelRunner: Model Runner V2 with a prefill left in flight on a second lane.

What may live here: executing a StepDirective. What a step should do is decided
in scheduler.py; how a lane runs its work is in lanes/.

Stock steps pass straight through. For a launch, the stock ``execute_model``
prepares the prefill batch into the lane's own state; in place of the model it
meets a recorder, so the forward can run on the lane at any later moment.
"""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    override_forward_context,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup
from vllm.v1.worker.workspace import use_workspace_lane

from vllm_duet.config import CHECK_VARIABLE, DuetConfig
from vllm_duet.forecast import lane_profile
from vllm_duet.lane_graphs import LaneGraphs, lane_sizes
from vllm_duet.lanes import InFlight, LanePair
from vllm_duet.lanes.cuda import CudaLanePair
from vllm_duet.lanes.serial import SerialLanePair
from vllm_duet.plan import (
    MAX_IN_FLIGHT,
    Join,
    JoinedPrefill,
    PrefillLaunch,
    StepDirective,
    directive_of,
)
from vllm_duet.policy import decode_lanes
from vllm_duet.support import split_blockers

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

PREFILL_WORKSPACE_LANE = 1
"""The decode lane keeps vLLM's workspace lane 0."""

LONG_CAPTURE_S = 60.0
"""For the CUDA graphs of all decode lanes, beyond which a hint is due."""

SLOT_MAPPINGS = "slot_mappings"
NUM_DIRTY_ROWS = "_num_dirty_rows"
"""Since vLLM 0.33, how many rows of its block tables are of an earlier batch."""


class DuetModelRunnerMixin:
    """Executes step directives on top of a Model Runner V2 class."""

    lanes: LanePair
    execute_model_state: Any
    output_copy_stream: Any
    _in_flight: deque[InFlightPrefill]
    _directive: StepDirective | None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        self.lanes = make_lanes(vllm_config, device)
        self.prefill_copy_stream = self.output_copy_stream
        self.checks_lanes = os.environ.get(CHECK_VARIABLE) == "1"
        self._in_flight = deque()
        self._directive = None

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)  # type: ignore[misc]
        # One for each prefill that may be in flight.
        self.prefill_states = [PrefillLaneState(self) for _ in range(MAX_IN_FLIGHT)]

    # A step: the decode batch first, then whatever the directive adds.

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        directive = self._directive = directive_of(scheduler_output)
        if directive is None:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if directive.launch is not None and not _touches_blocks(scheduler_output):
            self.lanes.fork()
        if self.needs_forward_context(scheduler_output, directive.decode_sms):
            self.wait_until_queued()
        with self.lanes.exclusive(), self.decoding(directive.decode_sms):
            output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if scheduler_output.total_num_scheduled_tokens == 0:
            # No sampling will follow: this is the pure join step.
            return self._join(output, directive.join)
        return output

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        directive, self._directive = self._directive, None
        if directive is None:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        with self.lanes.exclusive(), self.decoding(directive.decode_sms):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if directive.launch is not None:
            # After the decode step is queued, so that preparing the prefill
            # does not hold it up.
            self._launch(directive.launch)
        return self._join(output, directive.join)

    def needs_forward_context(self, scheduler_output: SchedulerOutput, decode_sms: int) -> bool:
        """Whether a step beside a prefill needs what the prefill may hold (rule 3).

        No: lanes that share one thread or take turns by whole steps give it back.
        """
        return False

    def decoding(self, decode_sms: int) -> AbstractContextManager[None]:
        """Run what the block queues on the decode lane of ``decode_sms`` SMs."""
        return self.lanes.decoding(decode_sms)

    # The prefill: prepared at its launch, run by its lane, taken along at the join.

    def _launch(self, launch: PrefillLaunch) -> None:
        assert len(self._in_flight) < MAX_IN_FLIGHT
        lane_state = self.prefill_states[launch.launch_id % MAX_IN_FLIGHT]
        recorder = ForwardRecorder()
        self.wait_until_queued()
        with (
            self.lanes.exclusive(),
            self.lanes.preparing(),
            lane_state.installed(self, recorder),
        ):
            super().execute_model(launch.output)  # type: ignore[misc]
            state, self.execute_model_state = self.execute_model_state, None
            check = LaneCheck(lane_state) if self.checks_lanes else None
        assert recorder.recorded is not None
        run = partial(self._run_prefill, recorder.recorded, state)
        in_flight = self.lanes.launch(run, launch.prefill_sms)
        self._in_flight.append(InFlightPrefill(launch, in_flight, check))

    def wait_until_queued(self) -> None:
        """Have the forward context, one global, given back by the prefills in flight."""
        for prefill in self._in_flight:
            prefill.in_flight.wait_until_queued()

    @torch.inference_mode()
    def _run_prefill(self, forward: RecordedForward, state: Any) -> Any:
        """The prefill's forward and sampling, on whatever thread its lane chose."""
        context = forward.context
        if isinstance(context.attn_metadata, dict):
            context.attn_metadata = GivingWay(context.attn_metadata, self.lanes.give_way)
        with use_workspace_lane(PREFILL_WORKSPACE_LANE), override_forward_context(context):
            hidden_states = self.model(**forward.inputs)  # type: ignore[attr-defined]
        with self.lanes.exclusive():
            # A decode step may stand between its forward and its sampling, and its output
            # must not wait behind the prefill's on one stream.
            theirs = self.execute_model_state, self.output_copy_stream
            self.execute_model_state = state._replace(hidden_states=hidden_states)
            self.output_copy_stream = self.prefill_copy_stream
            try:
                return super().sample_tokens(None)  # type: ignore[misc]
            finally:
                self.execute_model_state, self.output_copy_stream = theirs

    def _join(
        self, step: ModelRunnerOutput | AsyncModelRunnerOutput | None, join: Join | None
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
            result, error = prefill.in_flight.result(), None
        except Exception as raised:
            result, error = None, self._survived(raised, prefill.launch)
        if prefill.check is not None:
            prefill.check.verify(prefill.launch.launch_id)
        return JoinedStep(step, prefill, result, error, self.lanes.decode_busy_ms())

    def _survived(self, error: Exception, launch: PrefillLaunch) -> str:
        """What went wrong with a prefill, in a sentence, where the engine can go on without it.

        Raises:
            RuntimeError: the GPU does not go on.
        """
        sentence = (
            f"A prefill of {launch.output.total_num_scheduled_tokens} tokens failed on its lane of"
            f" {launch.prefill_sms} SMs, beside a decode lane of {launch.decode_sms}:"
            f" {type(error).__name__}: {error}"
        )
        if not self.lanes.is_usable():
            raise RuntimeError(sentence) from error
        logger.error("vllm-duet: %s", sentence, exc_info=error)
        return sentence

    def shutdown(self) -> None:
        self.lanes.shutdown()
        super().shutdown()  # type: ignore[misc]


class DuetModelRunner(DuetModelRunnerMixin, GPUModelRunner):  # type: ignore[misc]
    """Two lanes on vLLM's GPU model runner."""

    cudagraph_manager: Any

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.prefill_copy_stream = torch.cuda.Stream(device)
        self.lane_graphs: dict[int, LaneGraphs] = {}
        """By the SM count of the decode lane; empty until captured."""
        self.prefill_activation_bytes = 0
        """What the largest batch takes beside weights and KV cache; 0 until profiled.
        A lane's is its own: torch's allocator keeps freed memory for the stream it was on."""

    @property
    def main_stream(self) -> torch.cuda.Stream:
        # vLLM keeps the first it sees; outputs would be copied, and the step go on, on
        # that stream and not on the lane.
        return torch.cuda.current_stream(self.device)

    @property
    def decode_streams(self) -> Mapping[int, torch.cuda.Stream]:
        """The decode lanes' streams, by their SM counts."""
        return self.lanes.decode_streams if isinstance(self.lanes, CudaLanePair) else {}

    def needs_forward_context(self, scheduler_output: SchedulerOutput, decode_sms: int) -> bool:
        graphs = self.lane_graphs.get(decode_sms)
        num_decodes = len(scheduler_output.num_scheduled_tokens)
        return num_decodes > 0 and not (graphs and graphs.covers(num_decodes))

    @contextmanager
    def decoding(self, decode_sms: int) -> Iterator[None]:
        stock = self.cudagraph_manager
        self.cudagraph_manager = self.lane_graphs.get(decode_sms, stock)
        try:
            with super().decoding(decode_sms):
                yield
        finally:
            self.cudagraph_manager = stock

    # The memory of the second lane is there, or foreseen, before vLLM sizes the KV cache.

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        if self.decode_streams:
            # vLLM locks the workspaces once graphs are captured.
            with use_workspace_lane(PREFILL_WORKSPACE_LANE):
                super().profile_run(*args, **kwargs)
            peak = torch.cuda.max_memory_allocated(self.device)
            self.prefill_activation_bytes = peak - torch.cuda.memory_allocated(self.device)

    def profile_cudagraph_memory(self) -> int:
        estimate: int = super().profile_cudagraph_memory()
        sizes = self.compilation_config.cudagraph_capture_sizes
        if estimate and self.decode_streams and sizes:
            # In proportion to their number: those of mixed batches count too, and are
            # larger, so this is rather too much.
            estimate += estimate * len(self.decode_streams) * len(lane_sizes(sizes)) // len(sizes)
        return estimate

    def capture_model(self, *, profile_only: bool = False) -> int:
        size: int = super().capture_model(profile_only=profile_only)
        if profile_only or not self.decode_streams:
            return size
        started, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
        for decode_sms, stream in self.decode_streams.items():
            graphs = LaneGraphs(self.vllm_config, self.device, self.decode_query_len, stream)
            graphs.capture(
                self.model,
                self.model_state,
                self.input_buffers,
                self.intermediate_tensors,
                self.block_tables,
                self.attn_groups,
                self.kv_cache_config,
                progress_bar_desc=f"Capturing CUDA graphs of {decode_sms} SMs",
            )
            self.lane_graphs[decode_sms] = graphs
        taken = free - torch.cuda.mem_get_info(self.device)[0]
        took_s = time.perf_counter() - started
        logger.info(
            "vllm-duet: CUDA graphs of %d decode lanes took %.0f s and %.2f GiB.",
            len(self.lane_graphs),
            took_s,
            taken / 2**30,
        )
        if took_s > LONG_CAPTURE_S:
            logger.warning("vllm-duet: fewer SM counts in the option decode_sms start faster.")
        return size + taken

    def shutdown(self) -> None:
        # Captured on streams that go with the lanes.
        self.lane_graphs.clear()
        super().shutdown()


class DuetCPUModelRunner(DuetModelRunnerMixin, CPUModelRunner):  # type: ignore[misc]
    """The same on the CPU, for machines without a GPU."""


def make_lanes(vllm_config: Any, device: torch.device) -> LanePair:
    """The lanes of an engine; serial ones where its steps are never split, too.

    Raises:
        GreenContextError: the GPU, its driver or an SM count does not allow of them.
        ValueError: the GPU has not the SMs that its profile says.
    """
    config = DuetConfig.load(vllm_config.additional_config)
    if device.type == "cpu" or split_blockers(vllm_config):
        return SerialLanePair(config.serial_timing, config.serial_hold_steps)
    profile = lane_profile(config, current_platform.get_device_name())
    decode_sms = decode_lanes(profile, config.decode_sms)
    lanes = CudaLanePair.create(decode_sms, device, slices=config.prefill_launch == "slices")
    if lanes.prefill_sms != {profile.num_sms - sms for sms in decode_sms}:
        lanes.shutdown()
        raise ValueError(
            f"The GPU profile says {profile.num_sms} SMs, and the GPU has others: name or"
            " calibrate the right one with the option gpu_profile."
        )
    return lanes


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
    launch: PrefillLaunch
    in_flight: InFlight[Any]
    check: LaneCheck | None


class RecordedForward(NamedTuple):
    inputs: dict[str, Any]
    context: ForwardContext


class GivingWay(dict[str, Any]):
    """Attention metadata by layer. Whoever asks for a layer's lets decode steps go first.

    Attention is where Python gets a word in between the layers, compiled or not.
    """

    def __init__(self, by_layer: Mapping[str, Any], give_way: Callable[[], None]) -> None:
        super().__init__(by_layer)
        self._give_way = give_way

    def __getitem__(self, layer: str) -> Any:
        self._give_way()
        return super().__getitem__(layer)


class ForwardRecorder:
    """Stands in for the model while a prefill is prepared; keeps its arguments."""

    def __init__(self) -> None:
        self.recorded: RecordedForward | None = None

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.recorded = RecordedForward(inputs, get_forward_context())
        return torch.empty(0)


class EagerDispatch:
    """Stands in for the CUDA graph manager: a prefill on its lane runs eagerly.

    Kernels captured on another stream would run on that stream's SMs (CUDA
    programming guide, green contexts).
    """

    def dispatch(
        self, num_reqs: int, num_tokens: int, *args: Any, num_active_loras: int = 0, **kwargs: Any
    ) -> BatchExecutionDescriptor:
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_active_loras=num_active_loras,
        )


class PrefillLaneState:
    """Everything a prefill reads between its launch and its join.

    The decode lane overwrites its own copies of these at every step; sharing
    any of them is a silent data race (design, rule 2).
    """

    def __init__(self, runner: Any) -> None:
        self.input_buffers = InputBuffers(
            max_num_reqs=runner.max_num_reqs,
            max_num_tokens=runner.max_num_tokens,
            device=runner.device,
        )
        tables = runner.block_tables
        self.block_tables = tuple(torch.zeros_like(t) for t in tables.input_block_tables)
        self.block_table_ptrs = tables._make_ptr_tensor(self.block_tables)
        self.slot_mappings = torch.zeros_like(tables.slot_mappings)
        self.num_dirty_rows = 0
        self.attn_groups = [
            [_with_own_builders(group, runner) for group in groups] for groups in runner.attn_groups
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a prefill reads, by name; all of it is the lane's own."""
        named = {
            name: value
            for name, value in vars(self.input_buffers).items()
            if isinstance(value, torch.Tensor)
        }
        named |= {f"block table {i}": table for i, table in enumerate(self.block_tables)}
        return named | {SLOT_MAPPINGS: self.slot_mappings}

    @contextmanager
    def installed(self, runner: Any, model: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Let ``runner`` prepare a batch into this state, with ``model`` for its model."""
        of_runner = {
            "input_buffers": self.input_buffers,
            "attn_groups": self.attn_groups,
            "cudagraph_manager": EagerDispatch(),
            "model": model,
        }
        of_tables = {
            "input_block_tables": list(self.block_tables),
            "input_block_table_ptrs": self.block_table_ptrs,
            "slot_mappings": self.slot_mappings,
        }
        tables = runner.block_tables
        if hasattr(tables, NUM_DIRTY_ROWS):
            of_tables[NUM_DIRTY_ROWS] = self.num_dirty_rows
        with _replaced(runner, of_runner), _replaced(tables, of_tables):
            yield
            self.num_dirty_rows = getattr(tables, NUM_DIRTY_ROWS, 0)


class LaneCheck:
    """VLLM_DUET_CHECK=1: nobody has written to a lane's buffers while its prefill was in
    flight, and nobody reads them afterwards and gets away with it (rule 2).

    Made when the prefill has been prepared. Costs a copy of the buffers and waits for the
    device, so it is for tests and for hunting races.
    """

    def __init__(self, state: PrefillLaneState) -> None:
        self._tensors = state.tensors()
        self._copies = {name: tensor.clone() for name, tensor in self._tensors.items()}

    def verify(self, launch_id: int) -> None:
        """Compare the buffers with what they were, then poison them.

        Raises:
            RuntimeError: one has changed; names it.
        """
        for name, tensor in self._tensors.items():
            if not torch.equal(tensor, self._copies[name]):
                raise RuntimeError(
                    f"VLLM_DUET_CHECK: {name} of prefill {launch_id} changed while it was in flight"
                )
        for name, tensor in self._tensors.items():
            # Wrong, and yet in bounds: block 0 is vLLM's null block, slot -1 its padding.
            tensor.fill_(-1 if name == SLOT_MAPPINGS else 0)


@contextmanager
def _replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Have other ``attributes`` in ``owner`` within the block."""
    own = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(own)


def _with_own_builders(group: AttentionGroup, runner: Any) -> AttentionGroup:
    # Metadata builders keep persistent buffers, so the lane gets its own set.
    own = replace(group, metadata_builders=[])
    own.create_metadata_builders(
        runner.vllm_config,
        runner.device,
        kernel_block_size=runner.kernel_block_sizes[group.kv_cache_group_id],
    )
    return own


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
