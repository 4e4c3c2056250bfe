# SPDX-License-Identifier: Apache-2.0
"""StepTimes: what is learnt from the steps that ended."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import AGGREGATED_STEP, DECODE_LANE, DECODE_ONLY, PREFILL_LANE
from vllm_duet.roofline import StepTimeCorrection
from vllm_duet.step_times import StepTimes
from vllm_duet.watch import LaneWatch


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def run(
    times: StepTimes,
    clock: Clock,
    kind: str,
    seconds: float,
    forecast_ms: float = 0,
    prompts_wait: bool = False,
) -> None:
    """Schedule a step, and let it take ``seconds``."""
    output = SimpleNamespace(num_scheduled_tokens={})
    times.scheduled(output, kind, forecast_ms, prompts_wait=prompts_wait)
    clock.seconds += seconds
    times.ended(output)


def test_time_to_spare_is_that_of_decodes_alone_while_no_prompt_waits() -> None:
    clock = Clock()
    times = StepTimes(None, clock)
    for _ in range(100):
        run(times, clock, AGGREGATED_STEP, 0.1)
    assert times.load.spare < 0.01
    for _ in range(100):
        run(times, clock, DECODE_ONLY, 0.02, prompts_wait=True)
    assert times.load.spare < 0.01
    for _ in range(100):
        run(times, clock, DECODE_ONLY, 0.02)
    spare = times.load.spare
    assert 0.5 < spare < 0.8
    run(times, clock, DECODE_LANE, 0.02)
    assert times.load.spare < spare


def test_load_weighs_time_and_not_steps() -> None:
    shares = []
    for steps in (1, 10):
        clock = Clock()
        times = StepTimes(None, clock)
        for _ in range(steps):
            run(times, clock, AGGREGATED_STEP, 0.2 / steps)
        shares.append(times.load)
    assert shares[0].spare == pytest.approx(shares[1].spare)


def test_time_in_which_nothing_ran_is_time_to_spare() -> None:
    clock = Clock()
    times = StepTimes(StepTimeCorrection(min_samples=1), clock)
    for _ in range(20):
        run(times, clock, AGGREGATED_STEP, 0.1, forecast_ms=100)
    before = times.load
    clock.seconds += 1
    run(times, clock, AGGREGATED_STEP, 1e-6, forecast_ms=1e-3)
    assert before.spare < times.load.spare < 0.9
    # It says nothing of how long a step takes.
    assert times.correction is not None
    assert times.correction.factor(AGGREGATED_STEP) == pytest.approx(1.0)
    clock.seconds += 60
    run(times, clock, AGGREGATED_STEP, 1e-6)
    assert times.load.spare == pytest.approx(1.0)


def test_load_has_the_share_of_short_answers_that_joined_late() -> None:
    times = StepTimes(None, Clock())
    late, in_time = (DuetPlan(Mode.SPLIT, "", joins_late=each) for each in (True, False))
    times.prefill_ended(late, 1.0, num_decoding=1)
    assert times.load.late == 0  # nobody knows yet what answers are like
    for number in range(3000):  # every tenth joins late, and every second is short
        times.prefill_ended(late if number % 10 == 0 else in_time, 1.0, num_decoding=1)
        times.finished(100 if number % 2 else 101)
    assert times.load.late == pytest.approx(0.05, rel=0.1)
    for _ in range(3000):
        times.prefill_ended(late, 1.0, num_decoding=1)
        times.finished(101)
    assert times.load.late < 1e-3


def test_a_step_scheduled_while_another_ran_is_timed_from_that_ones_end() -> None:
    clock, correction = Clock(), StepTimeCorrection(min_samples=1)
    times = StepTimes(correction, clock)
    first, second = (SimpleNamespace(num_scheduled_tokens={}) for _ in range(2))
    times.scheduled(first, AGGREGATED_STEP, 100)
    times.scheduled(second, AGGREGATED_STEP, 100)
    for output in (first, second):
        clock.seconds += 0.1
        times.ended(output)
    assert correction.factor(AGGREGATED_STEP) == pytest.approx(1.0)


def test_decodes_alone_are_compared_with_the_forecast_that_a_decision_made() -> None:
    clock, correction = Clock(), StepTimeCorrection(min_samples=1)
    times = StepTimes(correction, clock)
    run(times, clock, DECODE_ONLY, 0.02)
    times.forecast(10.0)
    assert correction.factor(DECODE_ONLY) == pytest.approx(2.0)
    # Once only, and not where the step that ended last had prompts in it.
    times.forecast(1.0)
    run(times, clock, DECODE_ONLY, 0.02)
    run(times, clock, AGGREGATED_STEP, 0.1)
    times.forecast(1.0)
    assert correction.factor(DECODE_ONLY) == pytest.approx(2.0)


def test_a_prefill_is_compared_with_the_time_of_its_lane() -> None:
    """Not with that until its join, which waits for a decode step to end."""
    correction = StepTimeCorrection(min_samples=1)
    times = StepTimes(correction, Clock())
    plan = DuetPlan(Mode.SPLIT, "", prefill_ms=10.0)
    times.prefill_ended(plan, 20.0, num_decoding=0)
    assert correction.factor(PREFILL_LANE) == pytest.approx(2.0)
    times.prefill_ended(plan, 0.0, num_decoding=0)  # a lane that does not tell
    assert correction.factor(PREFILL_LANE) == pytest.approx(2.0)


def test_gaps_beyond_the_bound_are_counted_by_mode() -> None:
    clock = Clock()
    times = StepTimes(None, clock, bound_ms=50)
    # Two decode, and one has made no token yet.
    made = SimpleNamespace(num_output_tokens=[3, 0, 1])
    output = SimpleNamespace(num_scheduled_tokens={}, scheduled_cached_reqs=made)
    for mode, kind, ms in (
        (Mode.AGGREGATED, AGGREGATED_STEP, 60),
        (Mode.CAPPED, AGGREGATED_STEP, 49),
        (Mode.SPLIT, DECODE_LANE, 70),
        (Mode.SPLIT, DECODE_LANE, 80),
        (None, DECODE_ONLY, 51),
    ):
        times.scheduled(output, kind, plan=DuetPlan(mode, "") if mode else None)
        clock.seconds += 1e-3 * ms
        times.ended(output)
    assert times.late_gaps == {Mode.AGGREGATED: 2, Mode.SPLIT: 4, DECODE_ONLY: 2}


def test_the_watch_is_told_of_steps_beside_a_prefill() -> None:
    clock, told = Clock(), list[Any]()
    watch = SimpleNamespace(
        step=lambda *args, **kwargs: told.append((*args, kwargs["decodes"])),
        joined=lambda *args: told.append(args),
        look=lambda: told.append("looks"),
    )
    times = StepTimes(None, clock, watch=cast(LaneWatch, watch))
    plan = DuetPlan(Mode.SPLIT, "")
    for kind, tokens in ((AGGREGATED_STEP, 1), (DECODE_LANE, 1), (DECODE_LANE, 0)):
        output = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(range(tokens), 1))
        times.scheduled(output, kind, 20.0, plan)
        clock.seconds += 0.25
        times.ended(output)
    times.prefill_ended(plan, 30.0, num_decoding=1)
    assert told == [
        "looks",
        (plan, 20.0, 250.0, True),
        "looks",
        (plan, 20.0, 250.0, False),
        "looks",
        (plan, 30.0),
    ]
