# SPDX-License-Identifier: Apache-2.0
"""LaneWatch in virtual time: what is taken out of use, and when it is tried again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import AGGREGATED_STEP, DECODE_LANE, DECODE_ONLY, PREFILL_LANE
from vllm_duet.roofline import StepTimeCorrection
from vllm_duet.watch import FIRST_PAUSE_S, LONGEST_PAUSE_S, MIN_SEEN, LaneWatch

LANES = (16, 32, 56)
STEP_MS, PREFILL_MS, STEPS = 10.0, 80.0, 10
"""Of a split: the forecasts, and how many decode steps its prefill takes."""


class Watched:
    """A watch, what it is told, and what it says."""

    def __init__(self, corrects: bool = True) -> None:
        self.now = 0.0
        self.correction = StepTimeCorrection() if corrects else None
        self.told: list[Sequence[int]] = []
        self.watch = LaneWatch(LANES, self.told.append, self.correction, lambda: self.now)

    @property
    def in_use(self) -> list[int]:
        return [sms for sms, used in self.watch.in_use.items() if used]

    def whole(self, ratio: float = 1.0, steps: int = 20) -> None:
        """Whole steps, with prompts and without, that take ``ratio`` times their forecast."""
        for kind in (AGGREGATED_STEP, DECODE_ONLY) * steps:
            if self.correction is not None:
                self.correction.observe(STEP_MS, ratio * STEP_MS, kind)
            self._passes(ratio * STEP_MS)

    def split(
        self,
        sms: int,
        *,
        steps: Sequence[float] = (1.0,) * STEPS,
        prefill: float = 1.0,
        pays: float = 1.2,
    ) -> None:
        """One, whose steps and prefill take so many times their forecasts, and that does
        ``pays`` times what whole steps would have done in the time it was forecast to take."""
        whole_ms = pays * STEPS * STEP_MS
        plan = DuetPlan(
            Mode.SPLIT,
            "",
            decode_sms=sms,
            tbt_ms=STEP_MS,
            prefill_ms=PREFILL_MS,
            whole_step_ms=0.5 * whole_ms / STEPS,
            whole_prefill_ms=0.5 * whole_ms,
        )
        for ratio in steps:
            if self.correction is not None:
                self.correction.observe(STEP_MS, ratio * STEP_MS, DECODE_LANE)
            self.watch.step(plan, STEP_MS, ratio * STEP_MS, decodes=True)
            self._passes(ratio * STEP_MS)
        if self.correction is not None:
            self.correction.observe(PREFILL_MS, prefill * PREFILL_MS, PREFILL_LANE)
        self.watch.joined(plan, prefill * PREFILL_MS)

    def waits(self, seconds: float) -> None:
        self.now += seconds
        self.watch.look()

    def _passes(self, ms: float) -> None:
        self.waits(1e-3 * ms)


def test_a_lane_that_is_slower_than_whole_steps_are_is_taken_out(vllm_log) -> None:
    watched = Watched()
    watched.whole(1.1)
    watched.split(16)
    watched.split(32, steps=[2.0] * STEPS)
    watched.waits(1)
    assert watched.told == [[16, 56]] and watched.in_use == [16, 56]
    assert watched.watch.taken_out == {(32, "slow"): 1}
    assert (
        "vllm-duet takes its decode lane of 32 SMs out of use for 10 minutes: its decode steps"
        " take 2.00 times their forecast, whole steps 1.10." in vllm_log.text
    )


def test_a_lane_with_slow_prefills_is_taken_out(vllm_log) -> None:
    watched = Watched()
    watched.whole()
    for _ in range(MIN_SEEN):
        watched.split(56, prefill=1.7)
    watched.waits(1)
    assert watched.in_use == [16, 32]
    assert "the prefills beside it take 1.70 times their forecast" in vllm_log.text


@pytest.mark.parametrize(
    "ratios",
    [
        [1.4] * 30,
        [1.0, 1.0, 30.0] * 10,  # something else made every third one wait
        [2.0] * (MIN_SEEN - 1),
    ],
)
def test_a_lane_stays_if_it_is_a_little_slow_or_only_at_times(ratios) -> None:
    watched = Watched()
    watched.whole()
    watched.split(16, steps=ratios)
    watched.waits(1)
    assert watched.in_use == [*LANES]


def test_where_everything_is_slow_no_lane_is_to_blame() -> None:
    watched = Watched()
    watched.whole(2.0)
    watched.split(16, steps=[2.4] * STEPS)
    watched.waits(1)
    assert watched.in_use == [*LANES]


def test_until_it_is_known_how_whole_steps_do_no_lane_is_judged() -> None:
    watched = Watched()
    watched.split(16, steps=[3.0] * STEPS)
    watched.waits(1)
    assert watched.in_use == [*LANES]
    watched.whole()
    watched.waits(1)
    assert watched.in_use == [32, 56]


def test_a_lane_is_tried_again_and_each_time_later(vllm_log) -> None:
    watched, pause_s = Watched(), FIRST_PAUSE_S
    watched.whole()
    for _ in range(3):
        watched.split(16, steps=[2.0] * STEPS)
        watched.waits(1)
        assert watched.in_use == [32, 56]
        watched.waits(pause_s - 2)
        assert watched.in_use == [32, 56]
        watched.waits(2)
        assert watched.in_use == [*LANES]
        pause_s *= 2
    assert watched.told == [[32, 56], [*LANES]] * 3
    assert vllm_log.text.count("vllm-duet tries its decode lane of 16 SMs again.") == 3
    # It does well for a day, and has earned a short pause.
    for _ in range(20):
        watched.split(16)
    watched.waits(LONGEST_PAUSE_S)
    watched.split(16, steps=[2.0] * 4 * STEPS)
    watched.waits(1)
    assert watched.in_use == [32, 56]
    watched.waits(FIRST_PAUSE_S)
    assert watched.in_use == [*LANES]


@pytest.mark.parametrize("corrects", [True, False])
def test_splits_that_do_not_pay_are_taken_out_together(vllm_log, corrects) -> None:
    watched = Watched(corrects)
    watched.whole()
    began = watched.now
    while watched.in_use and watched.now < began + 300:
        watched.split(16, pays=0.9)
        watched.split(32, pays=0.95)
    assert not watched.in_use and watched.told == [[]]
    assert 60 <= watched.now - began < 65
    assert watched.watch.taken_out == dict.fromkeys(((s, "does_not_pay") for s in LANES), 1)
    assert (
        "vllm-duet splits no steps for 10 minutes: those of the last 60 s did 0.93 times what"
        " whole steps would have done." in vllm_log.text
    )
    watched.waits(FIRST_PAUSE_S)
    assert watched.told == [[], [*LANES]]
    assert "vllm-duet tries splitting steps again." in vllm_log.text
    for _ in range(1000):
        watched.split(16, pays=1.1)
    assert watched.in_use == [*LANES]


def test_splits_pay_by_what_they_did_and_not_by_what_was_forecast() -> None:
    watched = Watched()
    watched.whole()
    for _ in range(1000):
        watched.split(16, steps=[1.3] * STEPS, pays=1.2)
    assert not watched.in_use
    watched = Watched()
    watched.whole()
    for _ in range(1000):
        watched.split(16, steps=[1.3] * STEPS, pays=1.4)
    assert watched.in_use == [*LANES]
    assert watched.watch.split_speedup == pytest.approx(1.4 / 1.3, rel=0.01)


def test_splits_that_alone_keep_the_bound_are_not_asked_to_pay() -> None:
    watched = Watched()
    watched.whole()
    for _ in range(1000):
        watched.split(16, pays=0.0)
    assert watched.in_use == [*LANES] and watched.watch.split_speedup is None


def test_what_was_learnt_of_a_lane_goes_with_it() -> None:
    """One factor corrects all lanes: the others would be forecast as slow as this one."""
    watched = Watched()
    watched.whole(1.1)
    watched.split(32, steps=[2.0] * STEPS)
    assert watched.correction is not None
    assert watched.correction.factor(DECODE_LANE) == pytest.approx(2.0)
    watched.waits(1)
    assert watched.correction.factor(DECODE_LANE) == 1.0
    assert watched.correction.factor(AGGREGATED_STEP) == pytest.approx(1.1)


def test_lanes_that_the_policy_leaves_alone_are_forecast_anew_after_a_while() -> None:
    """A correction that keeps the policy from splitting would see no split again."""
    watched = Watched()
    watched.whole()
    watched.split(16, steps=[1.4] * STEPS)
    assert watched.correction is not None
    watched.waits(FIRST_PAUSE_S - 1)
    assert watched.correction.factor(DECODE_LANE) == pytest.approx(1.4)
    watched.waits(2)
    assert watched.correction.factor(DECODE_LANE) == 1.0
    assert watched.told == []


def test_a_split_that_does_nothing_does_not_pay() -> None:
    watched = Watched()
    nothing_done = DuetPlan(Mode.SPLIT, "", whole_step_ms=1.0, whole_prefill_ms=1.0)
    watched.watch.step(nothing_done, 0.0, 60_001.0, decodes=False)
    watched.waits(1)
    assert not watched.in_use
