# SPDX-License-Identifier: Apache-2.0
"""Where steps cannot be split the engine starts and serves, and says why in one sentence."""

from __future__ import annotations

from unittest.mock import Mock, patch

import pytest
import torch
from fake_gpu import FakeGpu
from gpu.engines import SPLIT, clients, running
from gpu.process import on_fake_gpu
from vllm.platforms import current_platform

from vllm_duet.support import reported_lanes
from vllm_duet.worker.gpu import DuetModelRunner

SENTENCES = ("vllm-duet does not split here: ", "vllm-duet leaves every step to vLLM: ")


def assert_serves_whole(engine, why: str) -> None:
    """All by vLLM's own steps; one line of the log says ``why``."""
    (said,) = (line for line in engine.said if line.startswith(SENTENCES))
    assert why in said and ". " not in said.removesuffix(".")
    assert engine.gpu.count("green_contexts") == 0
    engine.serve(clients(0))
    assert engine.totals.launched == 0


@on_fake_gpu(sms=114)
def test_another_number_of_sms_than_the_profile_says(tmp_path):
    with running(tmp_path) as engine:
        assert_serves_whole(engine, "the GPU profile says 132 SMs and the GPU has 114")


@on_fake_gpu(driver=12040)
def test_a_driver_too_old_for_green_contexts(tmp_path):
    with running(tmp_path) as engine:
        assert_serves_whole(engine, "The NVIDIA driver is one of CUDA 12.4")


@on_fake_gpu(driver=13000)
def test_a_driver_without_work_queues_splits_all_the_same(tmp_path):
    with running(tmp_path) as engine:
        assert not any(split.separate_work_queues for split in engine.runner.lanes._splits)
        engine.serve(clients(0))
        assert engine.totals.joined


@on_fake_gpu()
def test_a_gpu_without_a_profile(tmp_path):
    named = patch.object(type(current_platform), "get_device_name", lambda *_: "NVIDIA New")
    with named, running(tmp_path, SPLIT | {"mode": "auto"}) as engine:
        assert_serves_whole(engine, "there is no GPU profile for 'NVIDIA New'")


@on_fake_gpu()
def test_a_model_on_marlin_kernels(tmp_path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # whole groups
    model = {"quantization_config": awq, "dtype": "float16", **sizes}
    marlin = {"linear_backend": "marlin"}
    with running(tmp_path, model=model, dtype="float16", kernel_config=marlin) as engine:
        assert_serves_whole(engine, "Marlin kernels, which take all SMs")


@pytest.mark.parametrize("step", ["_make_lanes", "_capture_lanes"])
@on_fake_gpu()
def test_no_memory_for_the_lanes(tmp_path, step):
    stock = getattr(DuetModelRunner, step)

    def without_memory(runner, *args):
        torch.cuda.empty_cache()
        FakeGpu().fail_malloc(times=2)  # torch tries again with its caches freed
        return stock(runner, *args)

    with patch.object(DuetModelRunner, step, without_memory), running(tmp_path) as engine:
        assert_serves_whole(engine, "the lanes find no room on the GPU: CUDA out of memory, for ")


@on_fake_gpu()
def test_no_memory_for_what_a_prefill_owns(tmp_path):
    raises = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with patch("vllm_duet.worker.runner.PrefillLaneState", raises), running(tmp_path) as engine:
        assert raises.called
        assert_serves_whole(engine, "out of memory")


CUBLAS_WORKSPACE_BYTES = 32 << 20
"""What torch takes on this GPU for each stream with a product on it."""


@on_fake_gpu(sms=132)  # as by default, and a process of its own: its caches are empty
def test_lanes_cover_every_decode_and_take_their_memory_from_the_kv_cache(tmp_path):
    with running(tmp_path) as engine:
        assert reported_lanes(engine.vllm_config).most_decodes == engine.runner.max_num_reqs
        lane_bytes, with_lanes = engine.runner.lane_bytes, kv_cache_bytes(engine)
        unused = unused_bytes(engine)
    with running(tmp_path, {}) as engine:
        assert_serves_whole(engine, "the CUDA lanes are not proved at start")
        assert 0 < lane_bytes <= kv_cache_bytes(engine) - with_lanes
        # Stock vLLM 0.33 takes more than it was given; with lanes it is not to take more still.
        assert min(0, unused_bytes(engine)) <= unused < CUBLAS_WORKSPACE_BYTES, f"{unused} bytes"


@on_fake_gpu()
def test_what_a_lane_keeps_in_use_is_not_taken_from_the_kv_cache_twice(tmp_path):
    """cuBLAS's workspaces, say: vLLM's profile sees them, too."""
    stock, profiled = DuetModelRunner._run_lanes, []

    def run_lanes(runner, *, skip_attn):
        stock(runner, skip_attn=skip_attn)
        lanes = runner.lanes
        streams = *lanes.decode_streams.values(), *lanes._prefill_streams.values()
        handles = {stream.cuda_stream for stream in streams}
        if skip_attn:
            segments = torch.cuda.memory_snapshot()
            profiled.extend(s for s in segments if s["stream"] in handles)

    with patch.object(DuetModelRunner, "_run_lanes", run_lanes), running(tmp_path) as engine:
        total, in_use = (
            sum(segment[size] for segment in profiled) for size in ("total_size", "allocated_size")
        )
        assert in_use > 0
        assert engine.runner._activation_bytes == total - in_use


def unused_bytes(engine) -> int:
    """What vLLM was given of the GPU's memory and has not taken, when all kinds of steps ran."""
    engine.serve(clients(0))
    given = engine.llm_engine.model_executor.driver_worker.worker.requested_memory
    return given - engine.gpu.count("device_bytes")


def kv_cache_bytes(engine) -> int:
    return sum(tensor.size for tensor in engine.core.scheduler.kv_cache_config.kv_cache_tensors)
