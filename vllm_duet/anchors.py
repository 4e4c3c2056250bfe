# SPDX-License-Identifier: Apache-2.0
"""Anchors: steps that were measured at start, and what they make of a forecast.

A forecast is the time of a measured step times the roofline's ratio between the step asked for
and the measured one. So of the roofline only the ratio is needed, and a device or kernel that
it is off about by a factor is forecast right. This file imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from vllm_duet.roofline import NO_ANCHORS, AnchorFactors, Batch, LaneFactor, Roofline

SHORT_CONTEXT = 16
"""Tokens of context of a decode whose attention costs next to nothing."""

LONG_CONTEXTS = 16384, 4096, 1024, 256
"""Of which the longest that fits tells of attention."""

LEAST_PREFILL = 32
"""Tokens of the shortest chunk that is measured."""

DECODE_ROOM = 16
"""Tokens that each decode makes while it is measured, at most."""

LANE_ROOM = 96
"""The same beside prefills on the other lane."""

LANE_DECODES = 8, 64
LANE_CONTEXTS = 1024, 256, SHORT_CONTEXT
LANE_PREFILLS = 2048, 512, 128, LEAST_PREFILL
"""What runs on the lanes: a few decodes and many, after the longest of these contexts that fits,
and the longest of these prompts."""

ATTENTION_LIMITS = 0.05, 20.0
"""Within which attention's factor has to be: it is a small difference of two measured times
where the model's attention costs little."""


class StepShape(NamedTuple):
    """A step of ``decodes`` requests after ``decode_context`` tokens each, and of one prompt's
    ``prefill`` tokens after ``prefill_context``; either may be 0."""

    decodes: int = 0
    decode_context: int = 0
    prefill: int = 0
    prefill_context: int = 0

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return self.decodes + self.prefill

    def parts(self) -> tuple[StepShape, StepShape]:
        """Its decodes and its prompt, each as a step of its own."""
        return (
            StepShape(decodes=self.decodes, decode_context=self.decode_context),
            StepShape(prefill=self.prefill, prefill_context=self.prefill_context),
        )

    def batch(self) -> Batch:
        """As the roofline takes it."""
        prompts = int(self.prefill > 0)
        return Batch(
            [1] * self.decodes + [self.prefill] * prompts,
            [self.decode_context] * self.decodes + [self.prefill_context] * prompts,
        )


class Anchor(NamedTuple):
    """A step and the time in ms that it took."""

    shape: StepShape
    ms: float


class LaneAnchor(NamedTuple):
    """The decodes of ``shape`` on a lane of ``decode_sms`` SMs, beside its prefill on the others.

    ``decode_ms`` is what a decode step took while the prefill ran, ``prefill_ms`` for how long
    the prefill's lane was busy. From one join to the next, with another launch in between, it was
    ``cycle_ms`` and ``steps`` decode steps. Where ``shape`` has only decodes or only a prefill,
    that ran alone.
    """

    decode_sms: int
    shape: StepShape
    decode_ms: float
    prefill_ms: float
    cycle_ms: float = 0.0
    steps: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What an engine can run: ``max_seqs`` requests of up to ``max_context`` tokens, ``max_tokens``
    new ones a step, and ``cache_tokens`` in its KV cache."""

    max_seqs: int
    max_tokens: int
    max_context: int
    cache_tokens: int

    def allow(self, shape: StepShape, room: int = DECODE_ROOM) -> bool:
        """Whether such a step can be run, and its decodes then make ``room`` tokens each."""
        prefill_context = shape.prefill_context + shape.prefill
        held = shape.decodes * (shape.decode_context + room) + prefill_context
        return (
            shape.decodes + (shape.prefill > 0) <= self.max_seqs
            and shape.num_tokens <= self.max_tokens
            and max(shape.decode_context + room, prefill_context) < self.max_context
            and held <= self.cache_tokens
        )


def shapes_to_measure(limits: StepLimits) -> list[StepShape]:
    """In the order in which they are measured, the cheap ones first.

    Decodes double and prefills grow fourfold, so that nothing is far from an anchor; then some of
    both after long contexts, which tell of attention.
    """
    longest = min(limits.max_tokens, limits.max_context - 1)
    decodes = [
        StepShape(decodes=n, decode_context=SHORT_CONTEXT) for n in _powers(1, limits.max_seqs, 2)
    ]
    prefills = [StepShape(prefill=n) for n in _powers(LEAST_PREFILL, longest, 4)]
    allowed = [shape for shape in decodes + prefills if limits.allow(shape)]
    for short in tuple(allowed):
        if short.num_tokens < min(8, limits.max_seqs):
            continue
        field = "decode_context" if short.decodes else "prefill_context"
        longer = (short._replace(**{field: context}) for context in LONG_CONTEXTS)
        allowed += [shape for shape in longer if limits.allow(shape)][:1]
    return sorted(allowed, key=lambda shape: (shape.num_tokens, sum(shape)))


def lane_shapes(limits: StepLimits, most_decodes: int) -> tuple[list[StepShape], StepShape | None]:
    """Decode steps and a prefill to run on the lanes, alone and side by side.

    ``most_decodes`` is how many requests a lane's graphs take. No prefill where none fits.
    """
    decodes: list[StepShape] = []
    prefill = limits.max_tokens + 1
    for count in sorted({min(n, most_decodes, limits.max_seqs - 1) for n in LANE_DECODES}):
        for context in LANE_CONTEXTS:
            shape = StepShape(decodes=count, decode_context=context)
            beside = (shape._replace(prefill=n) for n in LANE_PREFILLS)
            fits = next((pair for pair in beside if limits.allow(pair, LANE_ROOM)), None)
            if count > 0 and fits is not None:
                decodes.append(shape)
                prefill = min(prefill, fits.prefill)
                break
    return decodes, StepShape(prefill=prefill) if decodes else None


def lane_gains(whole: Mapping[StepShape, float], pairs: Sequence[LaneAnchor]) -> dict[int, float]:
    """By decode lane, how much more is done side by side than one after the other, at best.

    ``whole`` has the times in ms of the same decodes and of the same prefill on all SMs: what a
    cycle's decode steps and its prefill would take one after the other, over what it took. It
    contains all that a launch and a join cost.
    """
    gains: dict[int, float] = {}
    for pair in pairs:
        if pair.shape.decodes and pair.shape.prefill:
            decode, prefill = pair.shape.parts()
            gain = (pair.steps * whole[decode] + whole[prefill]) / pair.cycle_ms
            gains[pair.decode_sms] = max(gain, gains.get(pair.decode_sms, 0.0))
    return gains


def shapes_to_check(limits: StepLimits) -> list[StepShape]:
    """Mixed steps, which no anchor is: how far the forecast is off is said in the log."""
    decodes = max(1, min(limits.max_seqs - 1, 12))
    mixed = [
        StepShape(decodes, 200, prefill, context)
        for prefill, context in ((48, 0), (180, 100), (700, 0), (1500, 300))
    ]
    return [shape for shape in mixed if limits.allow(shape)]


def _powers(least: int, most: int, factor: int) -> list[int]:
    """From ``least``, each ``factor`` times the one before, and ``most`` itself."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return [*found, most]


def fit(
    roofline: Roofline, anchors: Sequence[Anchor], lanes: Sequence[LaneAnchor] = ()
) -> AnchorFactors:
    """The factors by which ``roofline``, made without any, gives the time of each anchor.

    Attention's factors come from anchors that differ in the context alone. With them, the step's
    factor at a number of tokens is what is left. What a step with a prefill costs beside is the
    difference from a decode step of as many tokens.

    Raises:
        ValueError: no decode step is among the anchors.
    """
    decodes = {a.shape.decodes: a for a in anchors if _is_short(a.shape) and not a.shape.prefill}
    prefills = {a.shape.prefill: a for a in anchors if _is_short(a.shape) and a.shape.prefill}
    if not decodes:
        raise ValueError("no decode step was measured")
    factors = AnchorFactors(
        decode_attention=_attention_factor(roofline, anchors, decodes),
        prefill_attention=_attention_factor(roofline, anchors, prefills),
    )
    scaled = roofline.anchored(factors)
    steps = {n: anchor.ms / _ms(scaled, anchor.shape) for n, anchor in decodes.items()}
    if prefills:
        least = prefills[min(prefills)]
        steps_alone = factors._replace(steps=tuple(sorted(steps.items())))
        of_step = float(steps_alone.of_step(least.shape.num_tokens))
        extra_ms = max(0.0, least.ms / of_step - _ms(scaled, least.shape))
        factors = factors._replace(prefill_step_ms=extra_ms)
        scaled = roofline.anchored(factors)
    for tokens, anchor in prefills.items():
        if tokens > max(decodes):
            steps[tokens] = anchor.ms / _ms(scaled, anchor.shape)
    factors = factors._replace(steps=tuple(sorted(steps.items())))
    return factors._replace(lanes=_lane_factors(roofline.anchored(factors), lanes))


def _lane_factors(roofline: Roofline, lanes: Sequence[LaneAnchor]) -> tuple[LaneFactor, ...]:
    """Of each decode lane, from what was measured side by side."""
    found: dict[int, list[tuple[float, float]]] = {}
    for lane in lanes:
        if lane.shape.decodes and lane.shape.prefill:
            decode, prefill = (roofline.summarize(part.batch()) for part in lane.shape.parts())
            sms = lane.decode_sms, roofline.profile.num_sms - lane.decode_sms
            forecast = roofline.pair_ms(decode, prefill, *sms)
            ratios = lane.decode_ms / float(forecast[0]), lane.prefill_ms / float(forecast[1])
            found.setdefault(lane.decode_sms, []).append(ratios)
    return tuple(
        LaneFactor(sms, *map(median, zip(*ratios, strict=True)))
        for sms, ratios in sorted(found.items())
    )


def mean_error(roofline: Roofline, measured: Sequence[Anchor]) -> float:
    """Mean absolute error of ``roofline``'s forecasts, as a part of the measured time."""
    return fmean(abs(_ms(roofline, a.shape) / a.ms - 1) for a in measured)


def _attention_factor(
    roofline: Roofline, anchors: Sequence[Anchor], short: dict[int, Anchor]
) -> float:
    """What attention takes over the roofline's time for it, from pairs of anchors.

    With d the time of all but attention and a that of attention, by the roofline, a pair's
    measured ratio is r = (d + x a_long) / (d + x a_short).
    """
    found = []
    none = roofline.anchored(NO_ANCHORS._replace(decode_attention=0.0, prefill_attention=0.0))
    for anchor in anchors:
        long, base = anchor.shape, short.get(anchor.shape.num_tokens)
        if base is None or _is_short(long) or base.shape.decodes != long.decodes:
            continue
        rest_ms, ratio = _ms(none, base.shape), anchor.ms / base.ms
        short_ms = _ms(roofline, base.shape) - rest_ms
        below = _ms(roofline, long) - _ms(none, long) - ratio * short_ms
        found.append(rest_ms * (ratio - 1) / below if below > 0 else ATTENTION_LIMITS[1])
    if not found:
        return 1.0
    return min(max(median(found), ATTENTION_LIMITS[0]), ATTENTION_LIMITS[1])


def _ms(roofline: Roofline, shape: StepShape) -> float:
    summary = roofline.summarize(shape.batch())
    return float(roofline.step_ms(summary, roofline.profile.num_sms))


def _is_short(shape: StepShape) -> bool:
    return shape.decode_context <= SHORT_CONTEXT and shape.prefill_context == 0


def within(
    shapes: Sequence[StepShape],
    roofline: Roofline,
    budget_s: float,
    measure: Callable[[StepShape], Anchor],
    clock: Callable[[], float],
) -> Iterator[Anchor]:
    """Measure ``shapes`` in order, but leave out those that would end after ``budget_s``.

    How long one takes the roofline's ratio to the last one tells.
    """
    began, last = clock(), None
    for shape in shapes:
        now = clock()
        if last is not None:
            anchor, took_s = last
            expected_s = took_s * _ms(roofline, shape) / _ms(roofline, anchor.shape)
            if now - began + expected_s > budget_s:
                continue
        anchor = measure(shape)
        last = anchor, clock() - now
        yield anchor
