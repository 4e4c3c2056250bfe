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
from math import exp
from typing import Any

from vllm_duet.policy import DECODE_ONLY, PREFILL_LANE
from vllm_duet.roofline import StepTimeCorrection

SHARE_SECONDS = 0.3
"""Over which the share of decode-only time is averaged: some dozen steps, so that it
outlasts a prompt, and follows a burst of them. Simulated: with 1 s prompts wait longer."""


@dataclass(frozen=True, slots=True)
class Step:
    """Travels as the attribute ``duet_step`` of a SchedulerOutput.

    ``ms`` is the forecast for a step of this ``kind``, and 0 where there is none.
    """

    kind: str
    ms: float
    scheduled_at: float


class StepTimes:
    """Feeds a StepTimeCorrection, and knows what decodes have waited for lately.

    ``decode_only_share`` is the share of the recent time in which decodes had the GPU to
    themselves, as an exponential average over SHARE_SECONDS. It is 0 where prompts are
    always waiting to be computed: then they are what the GPU is short of time for.
    """

    def __init__(
        self, correction: StepTimeCorrection | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Without a correction, forecasts are not compared with anything. ``clock``
        returns seconds; the simulator has its own."""
        self.correction = correction
        self.clock = clock
        self.decode_only_share = 1.0
        self._last_end = 0.0

    def scheduled(self, scheduler_output: Any, kind: str, ms: float = 0.0) -> None:
        """Remember with the step that it is of ``kind`` and should take ``ms``."""
        scheduler_output.duet_step = Step(kind, ms, self.clock())

    def ended(self, scheduler_output: Any) -> None:
        """Its output has arrived: learn from it."""
        now = self.clock()
        step: Step = scheduler_output.duet_step
        seconds = now - max(step.scheduled_at, self._last_end)
        self._last_end = now
        if seconds <= 0:
            return
        weight = 1 - exp(-seconds / SHARE_SECONDS)
        self.decode_only_share += weight * ((step.kind == DECODE_ONLY) - self.decode_only_share)
        if self.correction is not None and step.ms > 0:
            self.correction.observe(step.ms, 1e3 * seconds, step.kind)

    def prefill_ended(self, forecast_ms: float, launched_at: float) -> None:
        """A prefill in flight has joined; it was done at most one step ago."""
        if self.correction is not None and forecast_ms > 0:
            measured_ms = 1e3 * (self.clock() - launched_at)
            self.correction.observe(forecast_ms, measured_ms, PREFILL_LANE)
