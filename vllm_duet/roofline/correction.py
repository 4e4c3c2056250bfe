# SPDX-License-Identifier: Apache-2.0
"""Learns online how far the roofline is off, and how much room a bound needs.

A forecast errs in two ways: by a factor that stays (another driver, a slower
clock), which ``factor`` takes out, and from step to step, which ``guard`` covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log


@dataclass(slots=True)
class _Residual:
    """State of one kind of step; symbols as in StepTimeCorrection."""

    guard_log: float
    count: int = 0
    bias: float = 0.0
    scale: float = 0.0


class StepTimeCorrection:
    """Per kind of step ("aggregated", "decode_lane", ...), in O(1) and deterministic.

    With x = ln(measured / predicted) of a step, it tracks

    * bias b: EWMA of x, b += g r with the residual r = x - b and the gain
      g = max(``gain``, 1/n) at the n-th step, so the first weigh as in a plain mean;
    * scale s: EWMA of abs(r), the typical residual; past the first steps r enters b
      and s clipped to ``clip`` scales;
    * guard z: the ``quantile`` of the unclipped r, by stochastic approximation (Robbins
      and Monro, 1951): z += rate s (quantile if r > z else quantile - 1), which rests
      where r exceeds z in 1 - quantile of the steps. An outlier moves it by one
      step, however large it is.

    The forecast to plan with is predicted * factor; the one to hold a bound with
    is predicted * factor * guard.
    """

    def __init__(
        self,
        *,
        gain: float = 0.05,
        quantile: float = 0.99,
        rate: float = 0.5,
        clip: float = 4.0,
        min_samples: int = 8,
        initial_guard: float = 1.15,
    ) -> None:
        """``min_samples`` steps of a kind pass before its factor applies;
        ``initial_guard`` is where the guard starts, from the roofline's error
        against measured operators.

        Raises:
            ValueError: a gain or quantile outside (0, 1), or a guard below 1.
        """
        if not 0 < gain < 1 or not 0 < quantile < 1:
            raise ValueError(f"gain {gain} and quantile {quantile} must lie between 0 and 1")
        if initial_guard < 1:
            raise ValueError(f"initial_guard must be at least 1, not {initial_guard}")
        self._gain, self._quantile, self._rate = gain, quantile, rate
        self._clip, self._min_samples = clip, min_samples
        self._initial_log = log(initial_guard)
        self._kinds: dict[str, _Residual] = {}

    def observe(self, predicted_ms: float, measured_ms: float, kind: str) -> None:
        """Learn from one step. ``predicted_ms`` is the roofline's own forecast,
        before any factor. Steps with a time that is not positive are ignored."""
        if not (predicted_ms > 0 and measured_ms > 0):
            return
        state = self._kinds.get(kind)
        if state is None:
            state = self._kinds[kind] = _Residual(self._initial_log)
        state.count += 1
        x = log(measured_ms / predicted_ms)
        x = min(max(x, -_MAX_LOG), _MAX_LOG)
        residual = x - state.bias
        weight = max(self._gain, 1 / state.count)
        if state.count > self._min_samples:
            # The quantile is of residuals against a bias that has settled.
            step = self._rate * max(state.scale, _MIN_SCALE)
            above = residual > state.guard_log
            state.guard_log += step * (self._quantile if above else self._quantile - 1)
            limit = self._clip * max(state.scale, _MIN_SCALE)
            residual = min(max(residual, -limit), limit)
        state.bias += weight * residual
        state.scale += weight * (abs(residual) - state.scale)

    def forget(self, kind: str) -> None:
        """Begin anew with steps of a kind."""
        self._kinds.pop(kind, None)

    def factor(self, kind: str, default: float = 1.0) -> float:
        """Measured over predicted, typically; ``default`` until ``min_samples`` steps."""
        state = self._kinds.get(kind)
        if state is None or state.count < self._min_samples:
            return default
        return exp(state.bias)

    def factors(self) -> dict[str, float]:
        """The factor of each kind that has had ``min_samples`` steps."""
        return {k: exp(s.bias) for k, s in self._kinds.items() if s.count >= self._min_samples}

    def guard(self, kind: str) -> float:
        """Factor >= 1 on top that covers the ``quantile`` of steps."""
        state = self._kinds.get(kind)
        return exp(max(0.0, self._initial_log if state is None else state.guard_log))


_MAX_LOG = log(8.0)
"""Beyond a factor of 8 a step was interrupted (a compilation, a pause), not slow."""

_MIN_SCALE = 0.005
"""Half a percent: keeps learning alive after a long run of identical steps."""
