# SPDX-License-Identifier: Apache-2.0
"""Compares the steps that were forecast with the time they took.

A step's time is what its clients wait for: from the later of its own scheduling
and the end of the step before, to the arrival of its output. That holds for the
synchronous loop and for asynchronous scheduling, where the next step is
scheduled before this one has ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from math import exp, inf
from typing import Any, NamedTuple

from vllm_duet.plan import DuetPlan
from vllm_duet.policy import DECODE_LANE, DECODE_ONLY, IDLE, LATE_SHARE, PREFILL_LANE, Load
from vllm_duet.roofline import StepTimeCorrection
from vllm_duet.watch import LaneWatch

SPARE_SECONDS = 2.0
"""Over which Load.spare is averaged."""

SHORT_ANSWER_TOKENS = 100
"""In an answer of no more, the longest gap has a part in the 99th percentile."""

NUM_REQUESTS = round(1 / LATE_SHARE)
"""Over which Load.late is averaged: as many as one of which may be late."""


class Step(NamedTuple):
    """Travels as the attribute ``duet_step`` of a SchedulerOutput.

    ``ms`` is the forecast for a step of this ``kind``, and 0 where there is none. ``plan`` is
    that of a step in which prompts compete with decodes, or of the prefill it runs beside.
    ``prompts_wait``: it leaves prompts waiting.
    """

    kind: str
    ms: float
    plan: DuetPlan | None
    scheduled_at: float
    prompts_wait: bool


class StepTimes:
    """Feeds a StepTimeCorrection and a LaneWatch, and knows what the GPU was busy with lately."""

    def __init__(
        self,
        correction: StepTimeCorrection | None,
        clock: Callable[[], float] = time.monotonic,
        bound_ms: float = inf,
        watch: LaneWatch | None = None,
    ) -> None:
        """Without a correction, forecasts are not compared with anything. ``clock``
        returns seconds; the simulator has its own. Gaps longer than ``bound_ms`` are late."""
        self.correction = correction
        self.clock = clock
        self.watch = watch
        self.late_gaps: Counter[str] = Counter()
        """Gaps between two tokens of a request that were longer than the bound, by the mode of
        the step, or DECODE_ONLY."""
        self._bound_ms = bound_ms
        self._spare, self._late = IDLE.spare, IDLE.late
        self._num_finished, self._short = 0, 0.0
        self._last_end = 0.0
        self._decode_only_ms = 0.0

    @property
    def load(self) -> Load:
        """What steps tell of it, as exponential averages."""
        return Load(self._spare, self._late)

    def scheduled(
        self,
        scheduler_output: Any,
        kind: str,
        ms: float = 0.0,
        plan: DuetPlan | None = None,
        *,
        prompts_wait: bool = False,
    ) -> None:
        """Remember with the step that it is of ``kind`` and should take ``ms``, as in Step."""
        scheduler_output.duet_step = Step(kind, ms, plan, self.clock(), prompts_wait)

    def ended(self, scheduler_output: Any) -> None:
        """Its output has arrived: learn from it, if it was :meth:`scheduled`."""
        step: Step | None = getattr(scheduler_output, "duet_step", None)
        if step is None:
            return
        now = self.clock()
        idle = step.scheduled_at - self._last_end if self._last_end else 0.0
        seconds = now - max(step.scheduled_at, self._last_end)
        self._last_end = now
        if idle > 0:
            self._spare += (1 - exp(-idle / SPARE_SECONDS)) * (1 - self._spare)
        if seconds <= 0:
            return
        decode_only = step.kind == DECODE_ONLY
        self._decode_only_ms = 1e3 * seconds if decode_only else 0.0
        keeps_up = decode_only and not step.prompts_wait
        self._spare += (1 - exp(-seconds / SPARE_SECONDS)) * (keeps_up - self._spare)
        step_ms = 1e3 * seconds
        if step_ms > self._bound_ms:
            made = scheduler_output.scheduled_cached_reqs.num_output_tokens
            mode = DECODE_ONLY if step.plan is None else step.plan.mode
            self.late_gaps[mode] += sum(tokens > 0 for tokens in made)
        if self.correction is not None and step.ms > 0:
            self.correction.observe(step.ms, step_ms, step.kind)
        if self.watch is not None:
            if step.kind == DECODE_LANE and step.plan is not None:
                decodes = bool(scheduler_output.num_scheduled_tokens)
                self.watch.step(step.plan, step.ms, step_ms, decodes=decodes)
            self.watch.look()

    def forecast(self, decode_ms: float) -> None:
        """What the decodes of now were forecast to take alone on all SMs.

        If that is what they did in the step that ended last, it is compared.
        """
        if self.correction is not None and self._decode_only_ms > 0:
            self.correction.observe(decode_ms, self._decode_only_ms, DECODE_ONLY)
        self._decode_only_ms = 0.0

    def finished(self, num_tokens: int) -> None:
        """A request has finished, with an answer of ``num_tokens``."""
        self._num_finished = min(self._num_finished + 1, NUM_REQUESTS)
        self._short += ((num_tokens <= SHORT_ANSWER_TOKENS) - self._short) / self._num_finished
        self._late *= 1 - 1 / NUM_REQUESTS

    def prefill_ended(self, plan: DuetPlan, busy_ms: float, num_decoding: int) -> None:
        """The prefill of ``plan`` has joined, of which ``num_decoding`` requests go on to
        decode; its lane was busy with it for ``busy_ms``.

        How many of those that join late have short answers is taken from the requests that have
        finished, so that it counts at once.
        """
        if plan.joins_late:
            self._late += num_decoding * self._short / NUM_REQUESTS
        if self.correction is not None:
            self.correction.observe(plan.prefill_ms, busy_ms, PREFILL_LANE)
        if self.watch is not None:
            self.watch.joined(plan, busy_ms)
