# SPDX-License-Identifier: Apache-2.0
"""mode=auto on the real engine: the forecast decides, and learns from measured steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from engine.scenarios import run_both
from engine.workloads import cache_filling, random_mix

from vllm_duet.plan import Mode
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
