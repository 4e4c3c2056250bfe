# SPDX-License-Identifier: Apache-2.0
"""mode=auto on the real engine: the forecast decides, and learns from measured steps."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from engine.scenarios import WatchedLanes, assert_blocks_kept, compare, run_both, serve_on
from engine.workloads import cache_filling, random_mix
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet import watch
from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import AGGREGATED_STEP
from vllm_duet.scheduler import DuetScheduler


def test_tokens_equal_and_steps_are_learned_from(roomy):
    # A forecast for an H100 is far too low on a CPU, and the correction finds out.
    arrivals = random_mix(21, num_requests=22)
    run_both(roomy, arrivals, "late", 2, mode="auto", gpu_profile="h100-sxm")
    correction = roomy.core.scheduler._step_times.correction
    assert correction.factor(AGGREGATED_STEP) > 2


def test_a_tight_bound_takes_the_prefill_out_of_whole_steps(roomy):
    options = dict(mode="auto", gpu_profile="h100-sxm", correction=False, tbt_slo_ms=0.395)
    run_both(roomy, random_mix(22), "threaded", 2, **options)
    steps = roomy.core.scheduler.totals.steps
    assert steps[Mode.CAPPED] + steps[Mode.SPLIT] > 0


@pytest.mark.parametrize("timing", ["late", "threaded"])
def test_tokens_stay_right_when_lanes_are_taken_out_while_in_use(roomy, monkeypatch, timing):
    monkeypatch.setattr(watch, "LOOK_S", 0.0)
    monkeypatch.setattr(watch, "FIRST_PAUSE_S", 0.0)  # a step later they are tried again
    nothing_done = DuetPlan(Mode.SPLIT, "", whole_step_ms=1.0, whole_prefill_ms=1.0)
    seen = Counter[str]()

    def look(step, scheduler):
        assert_blocks_kept(step, scheduler)
        lanes = scheduler._step_times.watch
        in_use = all(lanes.in_use.values())
        seen["out of use beside a prefill"] += bool(scheduler._in_flight) and not in_use
        seen["taken out"] = sum(lanes.taken_out.values())
        seen["launched"] = scheduler.totals.launched
        if scheduler._in_flight and in_use:
            lanes.step(nothing_done, 0.0, 1e3 * watch.SPLIT_S, decodes=False)

    arrivals = random_mix(24, num_requests=20)
    options = dict(mode="auto", gpu_profile="h100-sxm", correction=False, tbt_slo_ms=0.395)
    stock = roomy.run(arrivals, AsyncScheduler)
    duet = serve_on(WatchedLanes(timing, 4), roomy, arrivals, on_step=look, **options)
    for arrival in arrivals:
        compare(stock[arrival.request_id], duet[arrival.request_id])
    assert seen["out of use beside a prefill"] > 1
    # And used again: each time takes out three lanes.
    assert seen["taken out"] > 3 and seen["launched"] > 1


def test_without_a_profile_every_step_is_vllms(roomy):
    run_both(roomy, random_mix(23), "late", 2, mode="auto")
    assert not any(roomy.core.scheduler.totals.steps.values())


@pytest.mark.parametrize(
    ("duet", "said"),
    [
        ({"mode": "split", "tbt_slo_ms": 50}, "mode split, a bound of 50 ms between tokens."),
        ({"mode": "auto"}, "leaves every step to vLLM: there is no GPU profile for 'cpu'"),
    ],
)
def test_a_start_is_told_where_vllm_logs(roomy, vllm_log, duet, said):
    roomy.vllm_config.additional_config = {"duet": duet}
    roomy._new_scheduler(DuetScheduler)
    assert said in vllm_log.text


def test_no_step_is_decided_where_a_cap_would_stall_prompts(roomy):
    roomy.vllm_config.additional_config = {"duet": {"mode": "capped"}}
    assert roomy._new_scheduler(DuetScheduler)._policy is not None
    roomy.vllm_config.scheduler_config.enable_chunked_prefill = False
    try:
        assert roomy._new_scheduler(DuetScheduler)._policy is None
    finally:
        roomy.vllm_config.scheduler_config.enable_chunked_prefill = True


def test_a_split_is_planned_for_a_prompt_that_the_cache_has_no_room_for(full_cache):
    # Four decodes and the late prompt fill the cache; the next ones have to wait.
    first = cache_filling(random.Random(0))
    late = [replace(first[-1], request_id=f"later-{i}", step=3 + i) for i in range(3)]
    options = dict(mode="auto", gpu_profile="h100-sxm", correction=False, tbt_slo_ms=0.395)
    run_both(full_cache, [*first, *late], "late", 0, **options)
    assert full_cache.core.scheduler.totals.steps[Mode.AGGREGATED] > 0
