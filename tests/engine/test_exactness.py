# SPDX-License-Identifier: Apache-2.0
"""Whatever the plan, clients get the tokens that stock vLLM gives them."""

from __future__ import annotations

from typing import get_args

import pytest
from engine.scenarios import CountingScheduler, run_both
from engine.workloads import random_mix

from vllm_duet.lanes.serial import Timing
from vllm_duet.plan import Mode

TIMINGS = get_args(Timing)


@pytest.mark.parametrize("seed", range(6))
def test_random_plans(roomy, seed):
    run_both(roomy, random_mix(seed), TIMINGS[seed % 4], seed % 3, mode="random", seed=seed)


@pytest.mark.parametrize("seed", range(100, 108))
def test_random_plans_with_a_cramped_cache(cramped, seed):
    run_both(cramped, random_mix(seed), TIMINGS[seed % 4], seed % 5, mode="random", seed=seed)


@pytest.mark.parametrize("timing", TIMINGS)
def test_always_split(roomy, timing):
    run_both(roomy, random_mix(7, num_requests=5), timing, 6, mode="split")
    totals = roomy.core.scheduler.totals
    assert not totals.steps[Mode.AGGREGATED]
    busy_ms = totals.lane_busy_ms
    assert busy_ms["decode"] > 0 and busy_ms["prefill"] > 0
    if timing != "threaded":  # its prefill may compete with what is between two steps
        assert sum(busy_ms.values()) < totals.split_ms


def test_the_mixes_reached_what_they_are_for():
    """Runs last in this file: the tests above would prove little without these."""
    if CountingScheduler.seen["runs"] < 18:
        pytest.skip("only when the whole file runs")
    for wanted in (
        "joins",
        "joins of an aborted request",
        "preemptions",
        "decode steps beside a prefill",
        "pure join steps",
        "launches behind a prefill",
        "decode steps in the middle of a prefill",
    ):
        assert CountingScheduler.seen[wanted], wanted
