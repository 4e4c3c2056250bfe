# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest

from vllm_duet.roofline import StepTimeCorrection

KIND = "aggregated"


def test_before_any_step() -> None:
    correction = StepTimeCorrection(initial_guard=1.15)
    assert correction.factor(KIND) == 1.0
    assert correction.guard(KIND) == pytest.approx(1.15)


def test_factor_waits_for_enough_steps() -> None:
    correction = StepTimeCorrection(min_samples=4)
    for _ in range(3):
        correction.observe(10.0, 12.0, KIND)
    assert correction.factor(KIND) == 1.0
    correction.observe(10.0, 12.0, KIND)
    assert correction.factor(KIND) == pytest.approx(1.2)


def test_kinds_are_apart() -> None:
    correction = StepTimeCorrection()
    for _ in range(50):
        correction.observe(1.0, 2.0, "prefill_lane")
        correction.observe(1.0, 0.8, "decode_lane")
    assert correction.factor("prefill_lane") == pytest.approx(2.0)
    assert correction.factor("decode_lane") == pytest.approx(0.8)
    assert correction.factor(KIND) == 1.0


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_learns_bias_and_covers_the_quantile(sigma: float) -> None:
    draw = random.Random(7)
    correction = StepTimeCorrection()
    above = total = 0
    for step in range(20000):
        measured = 5.0 * 1.3 * math.exp(draw.gauss(0, sigma))
        if step > 4000:
            total += 1
            above += measured > 5.0 * correction.factor(KIND) * correction.guard(KIND)
        correction.observe(5.0, measured, KIND)
    assert correction.factor(KIND) == pytest.approx(1.3, rel=0.5 * sigma)
    assert 0.003 < above / total < 0.02


def test_follows_a_change_of_level() -> None:
    correction = StepTimeCorrection()
    for _ in range(200):
        correction.observe(10.0, 10.0, KIND)
    for _ in range(200):
        correction.observe(10.0, 15.0, KIND)
    assert correction.factor(KIND) == pytest.approx(1.5, rel=0.03)


def test_an_outlier_changes_little() -> None:
    draw = random.Random(3)
    correction = StepTimeCorrection()
    for _ in range(500):
        correction.observe(10.0, 10.0 * math.exp(draw.gauss(0, 0.02)), KIND)
    factor, guard = correction.factor(KIND), correction.guard(KIND)
    correction.observe(10.0, 5000.0, KIND)
    assert correction.factor(KIND) == pytest.approx(factor, rel=0.02)
    assert guard <= correction.guard(KIND) < guard * 1.02


def test_a_slow_first_step_is_forgotten() -> None:
    correction = StepTimeCorrection()
    correction.observe(10.0, 9000.0, KIND)
    for _ in range(300):
        correction.observe(10.0, 10.0, KIND)
    assert correction.factor(KIND) == pytest.approx(1.0, abs=0.01)


def test_guard_rests_near_one_where_nothing_varies() -> None:
    correction = StepTimeCorrection(initial_guard=1.0)
    for _ in range(2000):
        correction.observe(10.0, 10.0, KIND)
    assert 1.0 <= correction.guard(KIND) < 1.01


def test_times_that_are_not_positive_are_ignored() -> None:
    correction = StepTimeCorrection(min_samples=1)
    for predicted, measured in ((0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0)):
        correction.observe(predicted, measured, KIND)
    assert correction.factor(KIND) == 1.0


def test_same_steps_same_state() -> None:
    first, second = StepTimeCorrection(), StepTimeCorrection()
    for i in range(100):
        first.observe(10.0, 10.0 + i % 7, KIND)
        second.observe(10.0, 10.0 + i % 7, KIND)
    assert first.factor(KIND) == second.factor(KIND)
    assert first.guard(KIND) == second.guard(KIND)


@pytest.mark.parametrize("arguments", [{"gain": 0.0}, {"quantile": 1.0}, {"initial_guard": 0.9}])
def test_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        StepTimeCorrection(**arguments)  # type: ignore[arg-type]
