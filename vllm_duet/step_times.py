# SPDX-License-Identifier: Apache-2.0
"""Compares the steps that were forecast with the time they took.

A step's time is what its clients wait for: from the later of its own scheduling
and the end of the step before, to the arrival of its output. That holds for the
synchronous loop and for asynchronous scheduling, where the next step is
scheduled before this one has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_duet.policy import PREFILL_LANE
from vllm_duet.roofline import StepTimeCorrection


@dataclass(frozen=True, slots=True)
class Forecast:
    """Travels as the attribute ``duet_forecast`` of a SchedulerOutput."""

    kind: str
    ms: float
    scheduled_at: float


class StepTimes:
    """Feeds a StepTimeCorrection; ``None`` turns it into a stopwatch nobody reads."""

    def __init__(
        self, correction: StepTimeCorrection | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``clock`` returns seconds; the simulator has its own."""
        self.correction = correction
        self.clock = clock
        self._last_end = 0.0

    def forecast(self, scheduler_output: Any, kind: str, ms: float) -> None:
        """Remember with the step that it is of ``kind`` and should take ``ms``."""
        if self.correction is not None and ms > 0:
            scheduler_output.duet_forecast = Forecast(kind, ms, self.clock())

    def ended(self, scheduler_output: Any) -> None:
        """Its output has arrived: learn from it if it was forecast."""
        if self.correction is None:
            return
        now = self.clock()
        forecast: Forecast | None = getattr(scheduler_output, "duet_forecast", None)
        if forecast is not None:
            seconds = now - max(forecast.scheduled_at, self._last_end)
            if seconds > 0:
                self.correction.observe(forecast.ms, 1e3 * seconds, forecast.kind)
        self._last_end = now

    def prefill_ended(self, forecast_ms: float, launched_at: float) -> None:
        """A prefill in flight has joined; it was done at most one step ago."""
        if self.correction is not None and forecast_ms > 0:
            measured_ms = 1e3 * (self.clock() - launched_at)
            self.correction.observe(forecast_ms, measured_ms, PREFILL_LANE)
