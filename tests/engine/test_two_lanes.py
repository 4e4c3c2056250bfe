# SPDX-License-Identifier: Apache-2.0
"""What the CUDA lanes ask of vLLM's objects, as far as there are some without a GPU."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_duet import model_runner
from vllm_duet.lane_graphs import MAX_SIZES, LaneGraphs, lane_sizes
from vllm_duet.model_runner import DuetModelRunner
from vllm_duet.support import most_decodes_beside
from vllm_duet.worker import DuetWorker

VLLM_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


@given(st.sets(st.integers(1, 1024), min_size=1))
def test_lanes_have_some_of_vllms_sizes(sizes: set[int]) -> None:
    chosen = lane_sizes(sorted(sizes, reverse=True))
    assert chosen == sorted(set(chosen)) and set(chosen) <= sizes
    assert len(chosen) <= MAX_SIZES and chosen[-1] == max(sizes)
    if len(sizes) == 1:
        assert chosen == list(sizes)


def test_padding_is_a_like_share_of_every_batch() -> None:
    chosen = lane_sizes(VLLM_SIZES)
    ratio = VLLM_SIZES[-1] ** (1 / (MAX_SIZES - 1))
    for decodes in range(1, 513):
        padded = min(size for size in chosen if size >= decodes)
        assert padded <= ratio * decodes + 8  # the step between vLLM's own


@pytest.fixture
def graphs(roomy, monkeypatch) -> LaneGraphs:
    from vllm.platforms import current_platform

    monkeypatch.setattr(
        type(current_platform), "get_global_graph_pool", lambda *_: "pool", raising=False
    )
    config = copy.copy(roomy.runner.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_capture_sizes = VLLM_SIZES
    config.compilation_config.max_cudagraph_capture_size = VLLM_SIZES[-1]
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = 300
    lane = LaneGraphs(config, roomy.runner.device, 1, "the lane's stream")
    assert config.compilation_config.cudagraph_capture_sizes == VLLM_SIZES
    return lane


def test_graphs_are_captured_on_the_lane(graphs: LaneGraphs) -> None:
    [descriptions] = graphs._capture_descs.values()
    assert {d.cg_mode for d in descriptions} == {CUDAGraphMode.FULL}
    assert [d.num_reqs for d in descriptions] == [d.num_tokens for d in descriptions]
    assert max(d.num_tokens for d in descriptions) <= 300
    assert graphs._capture_stream(descriptions[0]) == "the lane's stream"


def test_decodes_with_a_graph_are_covered(graphs: LaneGraphs) -> None:
    assert not graphs.covers(4)  # not captured yet
    graphs._graphs_captured = True
    most = max(n for n in lane_sizes(VLLM_SIZES) if n <= 300)
    for decodes in (1, 5, most, most + 1, 600):
        found: BatchExecutionDescriptor = graphs.dispatch(decodes, decodes, 1, 0)
        assert graphs.covers(decodes) == (found.cg_mode is CUDAGraphMode.FULL)
    assert graphs.covers(most) and not graphs.covers(most + 1)


def test_a_step_beside_a_prefill_uses_its_lanes_graphs(graphs: LaneGraphs, roomy) -> None:
    runner = DuetModelRunner.__new__(DuetModelRunner)
    runner.lanes, runner.cudagraph_manager = roomy.runner.lanes, "stock"
    runner.lane_graphs = {16: graphs}
    step = SimpleNamespace(num_scheduled_tokens={"a": 1, "b": 1})
    assert runner.needs_forward_context(step, 16)
    graphs._graphs_captured = True
    assert not runner.needs_forward_context(step, 16)
    assert runner.needs_forward_context(step, 24)
    assert not runner.needs_forward_context(SimpleNamespace(num_scheduled_tokens={}), 24)
    with pytest.raises(ZeroDivisionError), runner.decoding(16):
        assert runner.cudagraph_manager is graphs
        raise ZeroDivisionError
    with runner.decoding(24):
        assert runner.cudagraph_manager == "stock"
    assert runner.cudagraph_manager == "stock"


def test_a_step_goes_on_on_its_lane(monkeypatch) -> None:
    """vLLM's own main_stream is the first that it was asked for."""
    runner = DuetModelRunner.__new__(DuetModelRunner)
    runner.device = "cuda:0"
    for stream in ("the caller's", "the lane's"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        assert runner.main_stream == stream


class Lanes:
    def __init__(self, num_sms: int, decode_sms: tuple[int, ...]) -> None:
        self.prefill_sms = {num_sms - sms for sms in decode_sms}
        self.is_shut_down = False

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.mark.parametrize("num_sms", [132, 114])
def test_a_profile_of_another_gpu_stops_the_start(monkeypatch, num_sms: int) -> None:
    made: list[Lanes] = []

    def create(decode_sms: tuple[int, ...], device: object, slices: bool) -> Lanes:
        made.append(Lanes(num_sms, decode_sms))
        return made[-1]

    monkeypatch.setattr(model_runner, "split_blockers", lambda config: [])
    monkeypatch.setattr(model_runner.CudaLanePair, "create", create)
    config = SimpleNamespace(
        additional_config={"duet": {"gpu_profile": "h100-sxm", "decode_sms": [16, 32]}}
    )
    device = SimpleNamespace(type="cuda")
    if num_sms == 132:
        assert model_runner.make_lanes(config, device) is made[0]
        return
    with pytest.raises(ValueError, match="profile says 132 SMs, and the GPU has others"):
        model_runner.make_lanes(config, device)
    assert made[0].is_shut_down


GIB = 2**30


@pytest.mark.parametrize("streams", [{}, {16: "its stream"}])
def test_the_activations_of_a_second_lane_are_profiled(monkeypatch, streams) -> None:
    runs: list[int] = []
    monkeypatch.setattr(
        GPUModelRunner,
        "profile_run",
        lambda self, **_: runs.append(workspace._workspace_lane.get()),
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 19 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16 * GIB)
    monkeypatch.setattr(DuetModelRunner, "decode_streams", streams)
    runner = DuetModelRunner.__new__(DuetModelRunner)
    runner.device, runner.prefill_activation_bytes = "cuda:0", 0
    runner.profile_run(randomize_inputs=True)
    assert runs == ([0, 1] if streams else [0])
    assert runner.prefill_activation_bytes == (3 * GIB if streams else 0)


@pytest.mark.parametrize("seconds", [4.0, 90.0])
def test_every_decode_lane_has_its_graphs_captured(monkeypatch, vllm_log, seconds: float) -> None:
    captured: list[tuple[str, str]] = []

    class Graphs:
        def __init__(self, config, device, decode_query_len, stream) -> None:
            self.stream = stream

        def capture(self, *prepared, progress_bar_desc: str) -> None:
            captured.append((self.stream, progress_bar_desc))

    times, free = iter([100.0, 100.0 + seconds]), iter([30 * GIB, 28 * GIB])
    monkeypatch.setattr(model_runner, "LaneGraphs", Graphs)
    monkeypatch.setattr(GPUModelRunner, "capture_model", lambda self, **_: GIB)
    monkeypatch.setattr(model_runner.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80 * GIB))
    monkeypatch.setattr(DuetModelRunner, "decode_streams", {16: "one", 32: "other"})
    runner = DuetModelRunner.__new__(DuetModelRunner)
    for needed in (
        *("vllm_config", "device", "decode_query_len", "model", "model_state", "input_buffers"),
        *("intermediate_tensors", "block_tables", "attn_groups", "kv_cache_config"),
    ):
        setattr(runner, needed, needed)
    runner.lane_graphs = {}
    assert runner.capture_model(profile_only=True) == GIB and not captured
    # vLLM is told of all the memory that graphs have taken.
    assert runner.capture_model() == 3 * GIB
    assert captured == [
        ("one", "Capturing CUDA graphs of 16 SMs"),
        ("other", "Capturing CUDA graphs of 32 SMs"),
    ]
    assert set(runner.lane_graphs) == {16, 32}
    assert f"2 decode lanes took {seconds:.0f} s and 2.00 GiB" in vllm_log.text
    assert ("start faster" in vllm_log.text) == (seconds > 60)


@pytest.mark.parametrize(
    ("needed", "users_own", "left"),
    [(0, None, 50), (3, None, 47), (3, 50 * GIB, 50)],
)
def test_the_second_lane_is_counted_before_the_cache_is_sized(
    monkeypatch, needed: int, users_own: int | None, left: int
) -> None:
    def stock(self) -> int:
        self.available_kv_cache_memory_bytes = 50 * GIB
        return 50 * GIB

    monkeypatch.setattr(Worker, "determine_available_memory", stock)
    worker = DuetWorker.__new__(DuetWorker)
    worker.model_runner = SimpleNamespace(prefill_activation_bytes=needed * GIB)
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=users_own)
    assert worker.determine_available_memory() == left * GIB
    assert worker.available_kv_cache_memory_bytes == left * GIB


def gpu_config(**changes):
    compilation = dict(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, max_cudagraph_capture_size=512
    )
    compilation |= {k: v for k, v in changes.items() if k in compilation}
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=changes.get("device", "cuda")),
        scheduler_config=SimpleNamespace(max_num_seqs=77),
        model_config=SimpleNamespace(enforce_eager=changes.get("enforce_eager", False)),
        compilation_config=SimpleNamespace(**compilation),
    )


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 512),
        ({"cudagraph_mode": CUDAGraphMode.FULL}, 512),
        ({"cudagraph_mode": CUDAGraphMode.PIECEWISE}, 0),
        ({"cudagraph_mode": CUDAGraphMode.NONE}, 0),
        ({"enforce_eager": True}, 0),
        ({"max_cudagraph_capture_size": None}, 0),
        ({"device": "cpu", "enforce_eager": True}, 77),
    ],
)
def test_only_decodes_with_a_graph_run_beside_a_prefill(changes, most) -> None:
    assert most_decodes_beside(gpu_config(**changes)) == most


def test_a_workspace_and_buffers_for_two_lanes() -> None:
    """In a process of its own, as it changes vLLM's for good."""
    code = """
from types import SimpleNamespace
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu import buffer_utils, model_runner
from vllm_duet.plugin import make_room_for_two_lanes
config = SimpleNamespace(speculative_config=None)
before = gpu_worker._num_workspace_lanes(config, True)
make_room_for_two_lanes()
make_room_for_two_lanes()
model_runner.set_default_max_concurrency(3)
print(before, gpu_worker._num_workspace_lanes(config, True), buffer_utils._DEFAULT_MAX_CONCURRENCY)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.split() == ["1", "2", "6"], shown.stderr
