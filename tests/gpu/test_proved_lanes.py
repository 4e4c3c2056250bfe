# SPDX-License-Identifier: Apache-2.0
"""The default, ``cuda_lanes: auto``: lanes are proved and measured at start, and used where they
pay. What is wrong with them is one sentence, and the engine serves all the same."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from engine.scenarios import CountingScheduler
from fake_gpu import FakeGpu
from gpu.engines import clients, running
from gpu.process import on_fake_gpu
from gpu.test_start import assert_serves_whole
from vllm import envs

from vllm_duet.start import MeasuredSteps, found_at_start
from vllm_duet.support import reported_lanes, reported_roofline
from vllm_duet.worker import proof

AUTO = {"measure_at_start": "always"}
ONE_LANE = AUTO | {"decode_sms": [16]}
KERNEL_US = 500
SLOW = 30.0
"""Times as slow: nothing that runs beside it makes up for that."""


@contextmanager
def lanes_that(break_lanes):
    """``break_lanes(gpu)`` when they are about to be proved."""
    stock = MeasuredSteps.prove_lanes

    def prove_lanes(steps, *args):
        break_lanes(FakeGpu())
        return stock(steps, *args)

    with (
        patch.object(MeasuredSteps, "prove_lanes", prove_lanes),
        patch.object(proof, "TIMEOUT_S", 2.0),
    ):
        yield


@contextmanager
def cache_in(folder):
    with patch.object(envs, "VLLM_CACHE_ROOT", str(folder), create=True):
        yield


@on_fake_gpu(kernel_us=KERNEL_US)
def test_lanes_that_pay_are_used_and_the_next_start_knows(tmp_path):
    options = {"measure_at_start": "auto"}
    with cache_in(tmp_path), running(tmp_path, options) as engine:
        assert "vllm-duet measured its lanes in" in engine.log
        factors = assert_lanes_used(engine)
    again = patch.object(MeasuredSteps, "measure", side_effect=AssertionError("measured again"))
    with cache_in(tmp_path), again, running(tmp_path, options) as engine:
        assert "vllm-duet forecasts by the step times in" in engine.log
        assert assert_lanes_used(engine) == factors


def assert_lanes_used(engine):
    """All of them; returns what is made of their times."""
    scheduler, factors = engine.core.scheduler, reported_roofline(engine.vllm_config).anchors
    assert factors.steps[0][1] > 0 and [lane.decode_sms for lane in factors.lanes] == [16, 32, 56]
    assert found_at_start(engine.vllm_config).found.gains.keys() == {16, 32, 56}
    assert scheduler._blockers == []
    assert scheduler._policy.decode_sms == (16, 32, 56)
    engine.serve(clients(0))
    engine.serve(clients(1), mode="split", cuda_lanes=True)
    assert engine.totals.joined
    return factors


@on_fake_gpu(kernel_us=KERNEL_US)
def test_a_slow_lane_is_left_out(tmp_path):
    with lanes_that(lambda gpu: gpu.slow(16, SLOW)), running(tmp_path, AUTO) as engine:
        FakeGpu().no_faults()
        assert 16 not in engine.core.scheduler._policy.decode_sms
        assert any("leaves the decode lane of 16 SMs out" in line for line in engine.said)
        engine.serve(clients(0))


@on_fake_gpu(kernel_us=KERNEL_US)
def test_lanes_that_do_not_pay_and_are_forced(tmp_path):
    forced = ONE_LANE | {"cuda_lanes": True}
    with lanes_that(lambda gpu: gpu.slow(16, SLOW)), running(tmp_path, forced) as engine:
        FakeGpu().no_faults()
        assert any("since cuda_lanes says so, but the lanes" in line for line in engine.said)
        assert engine.runner.lanes is not None
        engine.serve(clients(0), mode="split", cuda_lanes=True)
        assert engine.totals.joined


@pytest.mark.parametrize(
    ("group", "what", "cuda_lanes"),
    [
        (116, "a prefill on its lane of 116 SMs", "auto"),
        (16, "a decode step on its lane of 16 SMs", "true"),
    ],
)
@on_fake_gpu(kernel_us=KERNEL_US)
def test_an_event_that_never_comes(tmp_path, group, what, cuda_lanes):
    """Nothing waits for it, and nothing that the lane may still write to is anybody's."""
    options = ONE_LANE | {"cuda_lanes": cuda_lanes}
    with lanes_that(lambda gpu: gpu.hold(group)), running(tmp_path, options) as engine:
        (said,) = (line for line in engine.said if "does not split here" in line)
        assert what in said and "had not ended after 2 s" in said
        assert engine.runner.lanes is None
        lost = reported_lanes(engine.vllm_config).lost_blocks
        assert lost > 0
        pool = engine.core.scheduler.kv_cache_manager.block_pool
        assert all(block.ref_cnt == 1 for block in pool.blocks[1 : lost + 1])
        serve_without_the_lost(engine, lost)
        FakeGpu().no_faults()
        torch.cuda.synchronize()  # or else nobody gives back what the lanes hold


def serve_without_the_lost(engine, lost: int) -> None:
    used = set()

    def watch(_, scheduler):
        manager = scheduler.kv_cache_manager
        for request in scheduler.running:
            used.update(*manager.get_block_ids(request.request_id))

    engine.run(clients(0), CountingScheduler, watch)
    assert used and min(used) > lost
    assert engine.core.scheduler.reset_prefix_cache()
    assert engine.totals.launched == 0


@on_fake_gpu(kernel_us=KERNEL_US)
def test_lanes_that_do_not_pay_and_the_next_start_knows(tmp_path):
    options = {"measure_at_start": "auto", "decode_sms": [16]}
    with cache_in(tmp_path), lanes_that(lambda gpu: gpu.slow(16, SLOW)):
        with running(tmp_path, options) as engine:
            FakeGpu().no_faults()
            assert_serves_whole(engine, "the lanes side by side do 0.")
            with_lanes = engine.gpu.count("captures")
        with running(tmp_path, options) as engine:
            assert_serves_whole(engine, "an earlier start has found that the lanes side by side")
            assert engine.gpu.count("captures") - with_lanes < with_lanes
