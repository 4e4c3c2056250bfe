# SPDX-License-Identifier: Apache-2.0
"""Keeps watch over the lanes: takes out of use what does not do as forecast, and tries it again.

What may live here: judging lanes and splits by the steps that have run. It imports neither
torch nor vLLM, and times come from a clock that is given.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, inf
from statistics import median
from typing import Literal

from vllm_duet.plan import DuetPlan
from vllm_duet.policy import AGGREGATED_STEP, DECODE_LANE, DECODE_ONLY, PREFILL_LANE
from vllm_duet.roofline import StepTimeCorrection

logger = logging.getLogger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

Reason = Literal["slow", "does_not_pay"]

SLOW = 1.5
"""A lane that takes this many times its forecast, where the whole GPU takes its own, is out of
use. Less than that the correction of forecasts takes in, which is one for all lanes. In the
simulator lanes stay below it, also by profiles that are wrong by 30 %."""

WINDOW = 32
"""A lane is judged by the median of its last steps and prefills, so that single ones that
waited for something else do not count."""

MIN_SEEN = 8
"""Steps, or prefills, by which a lane is judged: as many as the correction waits for. After more
it might have led the policy away from all lanes, and nothing would be seen of this one."""

MOST_OFF = 8.0
"""As in the correction: what takes longer was interrupted, and is not slow."""

SPLIT_S = 60.0
"""Seconds in split steps over which they have to pay. At a load where half of the time is split
that is two minutes."""

LOOK_S = 1.0
"""Between two looks, so that watching costs next to nothing."""

FIRST_PAUSE_S = 600.0
"""How long it is out of use the first time. Then twice as long each time, up to:"""

LONGEST_PAUSE_S = 86_400.0
"""A day. What did well for a day begins anew."""


@dataclass(slots=True)
class _Pause:
    """When something may be used again; ``until`` is infinite while it is in use."""

    until: float = inf
    seconds: float = 0.0
    back_at: float = -inf

    def begin(self, now: float) -> None:
        again = now - self.back_at < LONGEST_PAUSE_S
        self.seconds = min(2 * self.seconds, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        self.until = now + self.seconds

    def end(self, now: float) -> None:
        self.until, self.back_at = inf, now


@dataclass(slots=True)
class _Lane:
    """Measured over forecast, of the last decode steps beside a prefill, and of the prefills."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    prefills: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    pause: _Pause = field(default_factory=_Pause)

    def forget(self) -> None:
        self.steps.clear()
        self.prefills.clear()


class LaneWatch:
    """Which decode lanes are in use.

    A lane is out of use while its decode steps beside a prefill, or the prefills, take SLOW
    times their forecast or more, measured by what whole steps take of theirs. All are while split
    steps do less than whole ones would have done in the time. Each is tried again after a pause.
    """

    def __init__(
        self,
        decode_sms: Sequence[int],
        use_lanes: Callable[[Sequence[int]], None],
        correction: StepTimeCorrection | None,
        clock: Callable[[], float],
    ) -> None:
        """``use_lanes`` is told the SM counts of the decode lanes in use whenever they change.
        Without a ``correction`` nobody knows what whole steps take, and only all splits
        together are judged. ``clock`` returns seconds."""
        self.taken_out: Counter[tuple[int, Reason]] = Counter()
        """How often each lane was taken out of use, by why."""
        self._lanes = {sms: _Lane() for sms in decode_sms}
        self._use_lanes = use_lanes
        self._correction = correction
        self._clock = clock
        self._splits = _Pause()
        self._work_ms = self._took_ms = self._seen_ms = 0.0
        self._last_look = self._last_split = clock()

    @property
    def in_use(self) -> dict[int, bool]:
        """By SM count of the decode lane."""
        paused = self._splits.until < inf
        return {sms: not paused and lane.pause.until == inf for sms, lane in self._lanes.items()}

    @property
    def split_speedup(self) -> float | None:
        """What split steps did lately, in the time that whole ones would have taken for it by
        forecast, over the time that they took; ``None`` where there were none."""
        return self._work_ms / self._took_ms if self._took_ms else None

    def step(self, plan: DuetPlan, forecast_ms: float, took_ms: float, *, decodes: bool) -> None:
        """A step beside a prefill of ``plan`` has ended.

        ``forecast_ms`` is the roofline's, 0 where there is none. Without ``decodes`` the step
        only waited for the prefill.
        """
        self._last_split = self._clock()
        if forecast_ms > 0 and (lane := self._lanes.get(plan.decode_sms)) is not None:
            lane.steps.append(min(took_ms / forecast_ms, MOST_OFF))
        if plan.whole_prefill_ms > 0:
            decay = exp(-1e-3 * took_ms / SPLIT_S)
            self._work_ms = decay * self._work_ms + (plan.whole_step_ms if decodes else 0.0)
            self._took_ms = decay * self._took_ms + took_ms
            self._seen_ms += took_ms

    def joined(self, plan: DuetPlan, busy_ms: float) -> None:
        """A prefill of ``plan`` was computed, for which its lane was busy for ``busy_ms``."""
        lane = self._lanes.get(plan.decode_sms)
        if lane is not None and plan.prefill_ms > 0 and busy_ms > 0:
            lane.prefills.append(min(busy_ms / plan.prefill_ms, MOST_OFF))
        if self._took_ms:
            self._work_ms += plan.whole_prefill_ms

    def look(self) -> None:
        """Judge, if it is time to: to be called after each step."""
        now = self._clock()
        if now - self._last_look < LOOK_S:
            return
        self._last_look = now
        before = self.in_use
        for sms, lane in self._lanes.items():
            if lane.pause.until <= now:
                lane.pause.end(now)
                logger.info("vllm-duet tries its decode lane of %d SMs again.", sms)
            elif lane.pause.until == inf and (found := self._slow(lane)):
                lane.pause.begin(now)
                lane.forget()
                self.taken_out[sms, "slow"] += 1
                logger.warning(
                    "vllm-duet takes its decode lane of %d SMs out of use for %.0f minutes: %s.",
                    sms,
                    lane.pause.seconds / 60,
                    found,
                )
        if self._splits.until <= now:
            self._splits.end(now)
            logger.info("vllm-duet tries splitting steps again.")
        elif self._seen_ms >= 1e3 * SPLIT_S and self._work_ms < self._took_ms:
            self._splits.begin(now)
            for sms, used in before.items():
                self.taken_out[sms, "does_not_pay"] += used
            logger.warning(
                "vllm-duet splits no steps for %.0f minutes: those of the last %.0f s did %.2f"
                " times what whole steps would have done.",
                self._splits.seconds / 60,
                SPLIT_S,
                self.split_speedup,
            )
        if (after := self.in_use) != before:
            self._forget()
            self._use_lanes([sms for sms, used in after.items() if used])
        elif now - self._last_split > FIRST_PAUSE_S:
            # The correction may be what keeps the policy from them, and nothing would change it.
            self._last_split = now
            self._forget()

    def _slow(self, lane: _Lane) -> str:
        """What about it is slow, if anything."""
        about = (
            ("its decode steps", lane.steps, (DECODE_ONLY, AGGREGATED_STEP)),
            ("the prefills beside it", lane.prefills, (AGGREGATED_STEP, DECODE_ONLY)),
        )
        for what, ratios, (like, otherwise) in about:
            if self._correction is None or len(ratios) < MIN_SEEN:
                continue
            # Of the whole GPU what is bound by the same: decode by memory, prefill by compute.
            whole = self._correction.factor(like, self._correction.factor(otherwise, inf))
            ratio = median(ratios)
            if ratio >= SLOW * whole:
                return f"{what} take {ratio:.2f} times their forecast, whole steps {whole:.2f}"
        return ""

    def _forget(self) -> None:
        """Begin anew: what was learnt is of other lanes than those in use now."""
        self._work_ms = self._took_ms = self._seen_ms = 0.0
        if self._correction is not None:
            self._correction.forget(DECODE_LANE)
            self._correction.forget(PREFILL_LANE)
