# SPDX-License-Identifier: Apache-2.0
"""Whatever the plan, clients get the tokens that stock vLLM gives them."""

from __future__ import annotations

import pytest
from engine.scenarios import CountingScheduler, run_both
from engine.workloads import random_mix

from vllm_duet.plan import Mode

TIMINGS = ("early", "late", "threaded")


@pytest.mark.parametrize("seed", range(12))
def test_random_plans(roomy, seed):
    run_both(roomy, random_mix(seed), TIMINGS[seed % 3], seed % 4, mode="random", seed=seed)


@pytest.mark.parametrize("seed", range(100, 115))
def test_random_plans_with_a_cramped_cache(cramped, seed):
    run_both(cramped, random_mix(seed), TIMINGS[seed % 3], seed % 5, mode="random", seed=seed)


@pytest.mark.parametrize("timing", TIMINGS)
def test_always_split(roomy, timing):
    run_both(roomy, random_mix(7, num_requests=5), timing, 6, mode="split")
    assert not roomy.core.scheduler.num_steps[Mode.AGGREGATED]


def test_the_mixes_reached_what_they_are_for():
    """Runs last in this file: the tests above would prove little without these."""
    if CountingScheduler.seen["runs"] < 25:
        pytest.skip("only when the whole file runs")
    for wanted in (
        "joins",
        "joins of an aborted request",
        "preemptions",
        "decode steps beside a prefill",
        "pure join steps",
        "launches behind a prefill",
    ):
        assert CountingScheduler.seen[wanted], wanted
