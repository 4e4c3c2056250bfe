# SPDX-License-Identifier: Apache-2.0
"""Times of works alone and beside each other: medians over rounds, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from statistics import median

from vllm_duet.calibration.device import CalibrationError, Device, Lane, Lanes
from vllm_duet.calibration.work import Work, predicted_ms
from vllm_duet.roofline import GpuProfile

UNIT_MS = 1.0
"""One launch lasts about this long, so that a mark and a launch (some us) do not show."""

MAX_RUNS = 128
MIN_OVERLAPPING = 3
"""Launches that have to lie wholly beside the other lane's work."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run. ``launches`` were timed, of ``runs`` runs each."""

    ms: float
    min_ms: float
    max_ms: float
    launches: int
    runs: int
    relative_error: float

    @classmethod
    def of(cls, launch_ms: Sequence[float], runs: int, relative_error: float) -> Timing:
        each = [ms / runs for ms in launch_ms]
        return cls(median(each), min(each), max(each), len(each), runs, relative_error)


def runs_for(profile: GpuProfile, works: Sequence[Work], num_sms: int) -> int:
    """How many runs last about UNIT_MS, by the forecast."""
    return min(max(ceil(UNIT_MS / predicted_ms(profile, works, num_sms)), 1), MAX_RUNS)


def alone(
    device: Device, works: Sequence[Work], lane: Lane, rounds: int, profile: GpuProfile
) -> Timing:
    """The works on an otherwise idle GPU, launched back to back.

    Raises:
        CalibrationError: a result is wrong.
    """
    runs = runs_for(profile, works, lane.num_sms)
    unit = device.prepare(works, lane, runs=runs)
    unit.launch()  # Uploads the graph and warms the clocks and the TLBs.
    marks = [device.mark(lane)]
    for _ in range(rounds):
        unit.launch()
        marks.append(device.mark(lane))
    device.synchronize()
    times = [device.elapsed_ms(a, b) for a, b in pairwise(marks)]
    return Timing.of(times, runs, unit.relative_error)


@dataclass(frozen=True, slots=True)
class PairTiming:
    """Both lanes alone and beside each other."""

    decode_alone: Timing
    prefill_alone: Timing
    decode: Timing
    prefill: Timing


def beside(
    device: Device,
    decode: Sequence[Work],
    prefill: Sequence[Work],
    lanes: Lanes,
    rounds: int,
    profile: GpuProfile,
    *,
    captured_prefill: bool = True,
) -> PairTiming:
    """Two lanes' works at once, each also alone on the same group.

    Both lanes are kept busy for as long; what counts are the launches that lie wholly
    within the other lane's work.

    Raises:
        CalibrationError: a result is wrong, or the lanes did not run beside each other.
    """
    works, both = (decode, prefill), (lanes.decode, lanes.prefill)
    singles = [alone(device, w, x, rounds, profile) for w, x in zip(works, both, strict=True)]
    units = [
        device.prepare(w, x, runs=s.runs, captured=c)
        for w, x, s, c in zip(works, both, singles, (True, captured_prefill), strict=True)
    ]
    for unit in units:
        unit.launch()
    device.synchronize()
    launch_ms = [single.ms * single.runs for single in singles]
    total_ms = 1.5 * (rounds + 1) * max(launch_ms)
    # By expected start, since neither queue may run dry while the other is filled.
    order = sorted(
        (i * ms, side) for side, ms in enumerate(launch_ms) for i in range(ceil(total_ms / ms))
    )
    marks = [[device.mark(lane)] for lane in both]
    for _, side in order:
        units[side].launch()
        marks[side].append(device.mark(both[side]))
    device.synchronize()
    origin = marks[0][0]
    at_ms = [[device.elapsed_ms(origin, mark) for mark in side] for side in marks]
    start, end = max(side[0] for side in at_ms), min(side[-1] for side in at_ms)
    timings = []
    for times, single, unit in zip(at_ms, singles, units, strict=True):
        inside = [b - a for a, b in pairwise(times) if a >= start and b <= end]
        if len(inside) < MIN_OVERLAPPING:
            raise CalibrationError(
                f"only {len(inside)} of {len(times) - 1} launches ran beside the other lane:"
                " the lanes did not run at once"
            )
        timings.append(Timing.of(inside, single.runs, unit.relative_error))
    return PairTiming(*singles, *timings)
