# SPDX-License-Identifier: Apache-2.0
"""What the CUDA lanes ask of vLLM's objects, as far as there are some without a GPU.

tests/gpu starts the real worker on vLLM's CUDA build.
"""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform

from vllm_duet.support import MAX_GRAPHS, lane_sizes, most_decodes_beside
from vllm_duet.worker.lane_graphs import LaneGraphs

VLLM_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


def gpu_config(max_num_seqs: int = 77, sizes: list[int] = VLLM_SIZES, **changes):
    compilation = dict(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=sizes
    )
    compilation |= {k: v for k, v in changes.items() if k in compilation}
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=changes.get("device", "cuda")),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        model_config=SimpleNamespace(enforce_eager=changes.get("enforce_eager", False)),
        compilation_config=SimpleNamespace(**compilation),
    )


@given(st.sets(st.integers(1, 1024), min_size=1), st.integers(1, 1024))
def test_lanes_have_some_of_vllms_sizes_and_the_largest_batch(sizes: set[int], most: int) -> None:
    chosen = lane_sizes(gpu_config(most, sorted(sizes, reverse=True)))
    assert chosen == sorted(set(chosen)) and set(chosen) <= sizes | {most}
    assert len(chosen) <= MAX_GRAPHS and all(size <= most for size in chosen)
    # Every batch that one of vLLM's own graphs takes fits one of a lane's.
    assert max(chosen, default=0) == min(most, max(sizes))


@pytest.mark.parametrize("most", [256, 100, 64])
def test_every_batch_of_the_usual_sizes_has_a_graph(most: int) -> None:
    """vLLM's sizes go up to twice max_num_seqs, and those above it are never captured."""
    sizes = [size for size in VLLM_SIZES if size <= 2 * most]
    assert most_decodes_beside(gpu_config(most, sizes)) == most


def test_padding_is_a_like_share_of_every_batch() -> None:
    chosen = lane_sizes(gpu_config(512))
    ratio = VLLM_SIZES[-1] ** (1 / (MAX_GRAPHS - 1))
    for decodes in range(1, 513):
        padded = min(size for size in chosen if size >= decodes)
        assert padded <= ratio * decodes + 8  # the step between vLLM's own


@pytest.fixture
def graphs(roomy, monkeypatch) -> LaneGraphs:
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
    assert max(d.num_tokens for d in descriptions) == 300
    assert graphs._capture_stream(descriptions[0]) == "the lane's stream"


def test_decodes_with_a_graph_are_covered(graphs: LaneGraphs) -> None:
    assert graphs.most_decodes == 0  # not captured yet
    [descriptions] = graphs._capture_descs.values()
    graphs.graphs = dict.fromkeys(descriptions, "its graph")
    graphs._graphs_captured = True
    assert graphs.most_decodes == 300
    for decodes in (1, 5, 299, 300, 301, 600):
        found = graphs.dispatch(decodes, decodes, 1, 0)
        assert (found.cg_mode is CUDAGraphMode.FULL) == (decodes <= graphs.most_decodes)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 77),
        ({"cudagraph_mode": CUDAGraphMode.FULL}, 77),
        ({"cudagraph_mode": CUDAGraphMode.PIECEWISE}, 0),
        ({"cudagraph_mode": CUDAGraphMode.NONE}, 0),
        ({"enforce_eager": True}, 0),
        ({"cudagraph_capture_sizes": None}, 0),
        ({"cudagraph_capture_sizes": [1, 2, 4]}, 4),
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
