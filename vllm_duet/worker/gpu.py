# SPDX-License-Identifier: Apache-2.0
"""The worker and the model runner of a GPU; everything else is vLLM's.

What may live here: making the lanes, their CUDA graphs and their memory. The lanes are made
when the model has been loaded, since the model may be what forbids them. Whatever does so is
one sentence in the log and in the LanesReport; the engine then runs as stock vLLM's.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.workspace import current_workspace_manager, use_workspace_lane

from vllm_duet.config import DuetConfig
from vllm_duet.forecast import lane_profile
from vllm_duet.lanes import LaneError
from vllm_duet.lanes.cuda import CudaLanePair
from vllm_duet.lanes.green_context import GreenContextError
from vllm_duet.plugin import make_room_for_two_lanes
from vllm_duet.policy import decode_lanes
from vllm_duet.start_file import StartFile
from vllm_duet.support import LanesReport, lane_sizes, report_lanes, split_blockers
from vllm_duet.worker.lane_graphs import LaneGraphs
from vllm_duet.worker.lane_state import PrefillLaneState, prefill_workspace_lane
from vllm_duet.worker.runner import DuetModelRunnerMixin, in_a_clause

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

LONG_CAPTURE_S = 60.0
"""For the CUDA graphs of all decode lanes, beyond which a hint is due."""

MAX_LANE_SHARE = 0.25
"""Of the KV cache's memory that the lanes may take. Beyond it there are no lanes: a KV cache
that is much smaller costs more than they bring."""

SWITCH_INTERVAL_S = 5e-4
"""How long a thread may keep Python's interpreter while another waits for it. A prefill is
launched from a second thread; with Python's 5 ms each decode step would wait that long."""


class DuetWorker(Worker):  # type: ignore[misc]
    """vLLM's GPU worker, with a DuetModelRunner where steps can be split."""

    def _init_workspace_and_model_runner(self) -> None:
        device_name = current_platform.get_device_name()
        self._can_split = not split_blockers(self.vllm_config, device_name)
        if self._can_split:
            make_room_for_two_lanes()
        super()._init_workspace_and_model_runner()

    def _make_model_runner(self) -> Any:
        if self._can_split:
            return DuetModelRunner(self.vllm_config, self.device)
        return super()._make_model_runner()

    def sleep(self, level: int = 1) -> None:
        runner = self.model_runner
        if isinstance(runner, DuetModelRunner):
            # Nothing may still be launched over the memory that vLLM is about to give back.
            runner.wait_until_queued()
            torch.cuda.synchronize(self.device)
        super().sleep(level)

    def determine_available_memory(self) -> int:
        available: int = super().determine_available_memory()
        runner = self.model_runner
        if not isinstance(runner, DuetModelRunner) or self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own figure is kept
        if runner.lane_bytes > MAX_LANE_SHARE * available:
            runner.stay_whole(
                f"the lanes would take {runner.lane_bytes / 2**30:.2f} GiB of the"
                f" {available / 2**30:.2f} GiB that are there for the KV cache"
            )
        if (needed := runner.lane_bytes) == 0:
            return available
        logger.info(
            "vllm-duet: the lanes take %.2f GiB of the KV cache's %.2f.",
            needed / 2**30,
            available / 2**30,
        )
        # What vLLM prints, and what it saves for the next start, is made of these.
        self.peak_activation_memory += needed
        self.available_kv_cache_memory_bytes -= needed
        return available - needed


class DuetModelRunner(DuetModelRunnerMixin, GPUModelRunner):  # type: ignore[misc]
    """Two lanes on vLLM's GPU model runner, for as long as nothing forbids them."""

    lanes: CudaLanePair | None
    cudagraph_manager: Any

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.lane_graphs: dict[int, LaneGraphs] = {}
        """By the SM count of the decode lane; empty until captured."""
        self._activation_bytes = self._state_bytes = 0
        self._workspace_bytes = 0
        """Of cuBLAS, on one stream."""
        self._stuck: tuple[CudaLanePair, Any, Any, Any] | None = None
        """Lanes that have not ended, and what they use."""

    @property
    def lane_bytes(self) -> int:
        """What the lanes take beside weights, KV cache and CUDA graphs; 0 until profiled."""
        return self._activation_bytes + self._state_bytes

    @property
    def main_stream(self) -> torch.cuda.Stream:
        # vLLM keeps the first it sees; outputs would be copied, and the step go on, on
        # that stream and not on the lane.
        return torch.cuda.current_stream(self.device)

    # A step

    def needs_forward_context(self, scheduler_output: SchedulerOutput, decode_sms: int) -> bool:
        num_decodes = len(scheduler_output.num_scheduled_tokens)
        return num_decodes > self.lane_graphs[decode_sms].most_decodes

    @contextmanager
    def decoding(self, decode_sms: int) -> Iterator[None]:
        stock = self.cudagraph_manager
        self.cudagraph_manager = self.lane_graphs.get(decode_sms, stock)
        try:
            with super().decoding(decode_sms):
                yield
        finally:
            self.cudagraph_manager = stock

    # The start: lanes, their memory before vLLM sizes the KV cache, their graphs

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        with self._or_whole():
            self._refuse_marlin()
            self.lanes = self.lanes or self._make_lanes()
            torch.accelerator.empty_cache()
            cached, used = self._cached_bytes(), torch.cuda.memory_allocated(self.device)
            self._run_lanes(skip_attn=True)
            # torch's allocator keeps freed memory for the stream that it was on. What is still
            # in use, each lane's workspace of cuBLAS, vLLM's profile has seen.
            self._activation_bytes = self._cached_bytes() - cached
            used = torch.cuda.memory_allocated(self.device) - used
            num_streams = len(self.lanes.decode_streams) + len(self.lanes.prefill_sms)
            self._workspace_bytes = used // num_streams

    def _cached_bytes(self) -> int:
        """What torch's allocator holds and nothing uses."""
        reserved, used = torch.cuda.memory_reserved, torch.cuda.memory_allocated
        return int(reserved(self.device) - used(self.device))

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:
            self.prefill_states = []
        elif self.lanes is not None:
            with self._or_whole():
                self._refuse_shared_workspaces()

    def make_prefill_states(self) -> list[PrefillLaneState]:
        states: list[PrefillLaneState] = []
        before = torch.cuda.memory_allocated(self.device)
        with self._or_whole():
            states = super().make_prefill_states()
            self._state_bytes = torch.cuda.memory_allocated(self.device) - before
        return states

    def profile_cudagraph_memory(self) -> int:
        estimate: int = super().profile_cudagraph_memory()
        sizes = self.compilation_config.cudagraph_capture_sizes
        if estimate and self.lanes is not None and sizes:
            # vLLM warms up for each capture on a stream of its own, where cuBLAS takes a
            # workspace. The rest is in proportion to the number of graphs: those of mixed
            # batches count too, and are larger, so this is rather too much.
            captures = len(self.lanes.decode_streams)
            graphs = captures * len(lane_sizes(self.vllm_config))
            of_graphs = max(0, estimate - self._workspace_bytes)
            estimate += captures * self._workspace_bytes + of_graphs * graphs // len(sizes)
        return estimate

    def capture_model(self, *, profile_only: bool = False) -> int:
        if profile_only or self.lanes is None:
            return super().capture_model(profile_only=profile_only)  # type: ignore[no-any-return]
        taken = 0
        with self._or_whole():
            # Before vLLM's own, after which workspaces no longer grow.
            taken = self._capture_lanes(self.lanes)
        size: int = super().capture_model()
        with self._or_whole():
            # vLLM has emptied torch's caches; serving should find them filled.
            self._run_lanes(skip_attn=False)
        if self.lanes is not None:
            most_decodes = min(graphs.most_decodes for graphs in self.lane_graphs.values())
            report_lanes(self.vllm_config, LanesReport(most_decodes))
        return size + taken

    def _make_lanes(self) -> CudaLanePair:
        """
        Raises:
            GreenContextError: the GPU, its driver or an SM count does not allow of them.
            LaneError: the GPU has not the SMs that its profile says, or an earlier start has
                found that steps are better not split.
        """
        config = DuetConfig.load(self.vllm_config.additional_config)
        if config.cuda_lanes == "auto" and config.measure_at_start == "auto":
            stored = StartFile.of(self.vllm_config).read()
            if stored is not None and (refusal := stored.refusal(config.throughput_margin)):
                raise LaneError(
                    f"an earlier start has found that {refusal} (measure_at_start always tries"
                    " again)"
                )
        profile = lane_profile(config, current_platform.get_device_name())
        decode_sms = decode_lanes(profile, config.decode_sms)
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        if num_sms != profile.num_sms:
            raise LaneError(
                f"the GPU profile says {profile.num_sms} SMs and the GPU has {num_sms}: name the"
                " right one with the option gpu_profile"
            )
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return CudaLanePair.create(decode_sms, self.device, config.prefill_launch == "slices")

    def _run_lanes(self, *, skip_attn: bool) -> None:
        """Run the largest batch on every lane, so that its memory has been taken."""
        if self.lanes is None:
            return
        for decode_sms in self.lanes.decode_streams:
            with self.decoding(decode_sms), torch.inference_mode():
                rows = self.max_num_reqs, self.model_config.get_hidden_size()
                self._dummy_sampler_run(torch.zeros(rows, dtype=self.dtype, device=self.device))
        for prefill_sms in self.lanes.prefill_sms:
            self.lanes.launch(partial(self._dummy_prefill, skip_attn), prefill_sms).result()
        torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def _dummy_prefill(self, skip_attn: bool) -> None:
        with use_workspace_lane(prefill_workspace_lane()):
            self._dummy_run(self.max_num_tokens, skip_attn=skip_attn, is_profile=True)

    def _capture_lanes(self, lanes: CudaLanePair) -> int:
        """Capture the decode graphs of every lane; returns the bytes that they take.

        Raises:
            LaneError: vLLM has no full CUDA graphs of this model's decode steps.
        """
        if not self.compilation_config.cudagraph_mode.decode_mode().has_full_cudagraphs():
            raise LaneError("vLLM has no full CUDA graphs of decode steps for this model")
        self._run_lanes(skip_attn=False)
        torch.accelerator.empty_cache()
        started, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
        with freeze_gc_for_cudagraph_capture():
            for decode_sms, stream in lanes.decode_streams.items():
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
        return int(taken)

    # What only the loaded model can tell

    def _refuse_marlin(self) -> None:
        # Its blocks wait for each other, and it makes as many as the device has SMs: in a
        # smaller group some would wait for ever for one that finds no SM.
        resources = current_workspace_manager()._persistent_resources
        if any("marlin_locks" in repr(key) for keys in resources for key in keys):
            raise LaneError("the model's quantisation runs on Marlin kernels, which take all SMs")

    def _refuse_shared_workspaces(self) -> None:
        for group in (group for groups in self.attn_groups for group in groups):
            if (name := group.backend.get_name()).startswith("FLASHINFER"):
                raise LaneError(f"attention by {name} has one workspace for the whole process")

    # Staying whole

    @contextmanager
    def _or_whole(self) -> Iterator[None]:
        """Whatever goes wrong with the lanes in the block, vLLM starts without them."""
        try:
            yield
        except (GreenContextError, LaneError) as error:
            self.stay_whole(str(error).rstrip("."))
        except torch.OutOfMemoryError as error:
            self.stay_whole(f"the lanes find no room on the GPU: {in_a_clause(error)}")
        except Exception as error:
            logger.warning("vllm-duet: the lanes failed at start.", exc_info=error)
            self.stay_whole(f"the lanes failed at start: {in_a_clause(error)}")

    def stay_whole(self, obstacle: str, written_blocks: int = 0) -> None:
        """Give the lanes up, for the reason that the clause ``obstacle`` gives.

        What they have been given wrote to the first ``written_blocks`` blocks of the KV cache.
        Where the device has not come to its end all of it is kept, so that nothing else is ever
        where a lane may still read or write.
        """
        report = LanesReport(obstacle=obstacle)
        self._activation_bytes = self._state_bytes = 0
        lanes, self.lanes = self.lanes, None
        if lanes is not None and not lanes.is_idle():
            report = LanesReport(obstacle=obstacle, lost_blocks=written_blocks)
            self._stuck = lanes, self.lane_graphs, self.prefill_states, self._in_flight
            self.lane_graphs, self._in_flight = {}, deque()
        self.lane_graphs.clear()
        self.prefill_states = []
        report_lanes(self.vllm_config, report)
        if lanes is not None and self._stuck is None:
            lanes.shutdown()

    def shutdown(self) -> None:
        # Captured on streams that go with the lanes.
        self.lane_graphs.clear()
        stuck, self._stuck = self._stuck, None
        if stuck is not None and stuck[0].is_idle():
            stuck[0].shutdown()
        super().shutdown()
