# SPDX-License-Identifier: Apache-2.0
"""Steps that a GPU's worker runs before its first request, with lanes and without."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from fake_gpu import ANY_STREAM, FakeGpu
from gpu.engines import SPLIT, clients, running
from gpu.process import on_fake_gpu
from vllm.platforms import current_platform

from vllm_duet.start import MeasuredSteps
from vllm_duet.support import reported_roofline

MEASURE = {"mode": "auto", "measure_at_start": "always"}
KERNEL_US = 20


def assert_measured(engine) -> None:
    assert "vllm-duet measured " in engine.log
    assert engine.core.scheduler._policy._roofline is reported_roofline(engine.vllm_config)
    assert len(engine.runner.req_states.free_indices) == engine.runner.max_num_reqs
    engine.serve(clients(0))


@on_fake_gpu(kernel_us=KERNEL_US)
def test_with_lanes(tmp_path):
    with running(tmp_path, SPLIT | MEASURE) as engine:
        assert engine.runner.lanes is not None
        assert_measured(engine)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA New"])
@on_fake_gpu(kernel_us=KERNEL_US)
def test_without_lanes(tmp_path, name):
    """On a GPU without a profile, too."""
    named = patch.object(type(current_platform), "get_device_name", lambda *_: name)
    with named, running(tmp_path, MEASURE) as engine:
        assert_measured(engine)


@on_fake_gpu()
def test_a_launch_that_fails_ends_no_start(tmp_path):
    stock = MeasuredSteps.measure

    def failing(steps, shape):
        if shape.prefill:
            FakeGpu().fail_launch(ANY_STREAM)
        return stock(steps, shape)

    with (
        patch.object(MeasuredSteps, "measure", failing),
        running(tmp_path, SPLIT | MEASURE) as engine,
    ):
        (said,) = (line for line in engine.said if "could not measure steps at start" in line)
        assert "CUDA" in said and "\n" not in said
        assert reported_roofline(engine.vllm_config) is None
        assert engine.runner.lanes is not None
        engine.serve(clients(0))
