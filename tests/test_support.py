# SPDX-License-Identifier: Apache-2.0
"""What keeps steps whole: asked of vLLM's own configuration, as worker and scheduler do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_duet.support import (
    LanesReport,
    deciding_blockers,
    report_lanes,
    reported_lanes,
    split_blockers,
)

MODEL = Path(__file__).parent.parent / "eval" / "models" / "qwen3-8b"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def on_a_gpu() -> Callable[..., Any]:
    """A VllmConfig as it is for an H100 with the lanes switched on, with other duet options."""
    made = EngineArgs(
        model=str(MODEL), skip_tokenizer_init=True, scheduler_cls="vllm_duet.DuetScheduler"
    ).create_engine_config()

    def config(**duet: Any) -> Any:
        gpu = copy.deepcopy(made)
        gpu.device_config.device_type = "cuda"
        gpu.parallel_config.worker_cls = "vllm_duet.worker.gpu.DuetWorker"
        gpu.parallel_config.distributed_executor_backend = "uni"
        gpu.model_config.enforce_eager = False
        gpu.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        gpu.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8, 16]
        gpu.additional_config = {"duet": {"cuda_lanes": True, **duet}}
        return gpu

    return config


@pytest.mark.parametrize("mode", ["auto", "split", "random"])
def test_a_gpu_that_is_known_can_split(on_a_gpu, mode: str) -> None:
    assert split_blockers(on_a_gpu(mode=mode), H100) == []


@pytest.mark.parametrize("mode", ["aggregated", "capped"])
def test_no_lanes_for_a_mode_that_never_splits(on_a_gpu, mode: str) -> None:
    assert split_blockers(on_a_gpu(mode=mode), H100) == [f"mode {mode}"]


def test_no_lanes_where_no_step_can_be_forecast(on_a_gpu) -> None:
    [said] = split_blockers(on_a_gpu(), "NVIDIA GeForce RTX 5090")
    assert said.startswith("there is no GPU profile for 'NVIDIA GeForce RTX 5090'")
    unknown = on_a_gpu()
    unknown.model_config.hf_config.architectures = ["MambaForCausalLM"]
    [said] = split_blockers(unknown, H100)
    assert "MambaForCausalLM" in said


def prefetches(config: Any) -> None:
    config.offload_config.prefetch.offload_group_size = 8


def has_a_worker_of_its_own(config: Any) -> None:
    config.parallel_config.distributed_executor_backend = "mp"


def decodes_in_pieces(config: Any) -> None:
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def is_switched_off(config: Any) -> None:
    config.additional_config = {"duet": {"cuda_lanes": False}}


def proves_nothing(config: Any) -> None:
    config.additional_config = {"duet": {"measure_at_start": "never"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (prefetches, "weights offloaded by prefetch"),
        (has_a_worker_of_its_own, "a worker in a process of its own"),
        (decodes_in_pieces, "no full CUDA graphs of decode steps"),
        (is_switched_off, "the CUDA lanes are switched off"),
        (proves_nothing, "the CUDA lanes are not proved at start"),
    ],
)
def test_one_thing_keeps_steps_whole(on_a_gpu, change: Callable[[Any], None], said: str) -> None:
    config = on_a_gpu()
    change(config)
    assert split_blockers(config, H100) == [said]
    assert deciding_blockers(config) == []


def test_ranks_of_a_dense_model_are_engines_of_their_own(on_a_gpu) -> None:
    config = on_a_gpu()
    config.parallel_config.data_parallel_size = 2
    assert split_blockers(config, H100) == []
    with patch.object(type(config.model_config), "is_moe", True):
        assert deciding_blockers(config) == ["data parallelism"]


def test_lanes_are_proved_by_default_unless_a_mode_is_forced(on_a_gpu) -> None:
    config = on_a_gpu()
    config.additional_config = {"duet": {"measure_at_start": "auto"}}
    assert split_blockers(config, H100) == []
    config.additional_config["duet"]["mode"] = "split"
    assert split_blockers(config, H100) == ["the CUDA lanes are not proved at start"]


def test_the_scheduler_is_told_what_became_of_the_lanes(on_a_gpu) -> None:
    config = on_a_gpu()
    assert reported_lanes(config).obstacle == "the worker has made no lanes"
    report_lanes(config, LanesReport(most_decodes=77))
    # vLLM hands the scheduler a copy.
    assert reported_lanes(copy.copy(config)) == LanesReport(77)
