# SPDX-License-Identifier: Apache-2.0
"""Makes a GPU profile of records, and says how far its forecasts are off.

One parameter after the other, each from the records that show it best, in the
roofline's own terms: the same code forecasts here and in the scheduler.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

from vllm_duet.calibration.device import CalibrationError, DeviceInfo
from vllm_duet.calibration.experiments import Record
from vllm_duet.calibration.work import (
    SHAPE,
    Gemm,
    PagedAttention,
    Stream,
    Work,
    from_json,
    predicted_ms,
    predicted_pair_ms,
)
from vllm_duet.roofline import BatchSummary, GpuProfile, Roofline
from vllm_duet.roofline.hardware import Curve

FloatArray = npt.NDArray[np.float64]

COMPUTE_BOUND_ROWS = 512
"""From here on a product shows C(S); below, its time is that of reading the weights."""

MAX_CONTENTION = 8.0


@dataclass(frozen=True)
class Fit:
    """The profile, and mean absolute errors of its forecasts by what was forecast."""

    profile: GpuProfile
    errors: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class _Sample:
    work: Work
    num_sms: int
    ms: float
    held_out: bool


def fit(
    base: GpuProfile,
    info: DeviceInfo,
    records: Sequence[Record],
    *,
    known: bool = True,
    name: str | None = None,
) -> Fit:
    """A profile that has what ``records`` show, and what ``base`` says of the rest.

    ``known`` is whether ``base`` is this GPU's own. Fitted are the records of the groups
    compute and bandwidth, and of contention and facts where there are any; the duet's
    show how well lanes are forecast that were not fitted.

    Raises:
        CalibrationError: too little was measured for C(S) and B(S).
    """
    samples = [
        _Sample(from_json(r["work"]), r["num_sms"], r["ms"], r["held_out"])
        for r in records
        if r["group"] in ("compute", "bandwidth")
    ]
    fitted = [s for s in samples if not s.held_out]
    pairs = [r for r in records if r["group"] in ("contention", "duet") and "decode_works" in r]
    small_us = [r["replay"]["gpu_us"] for r in records if r.get("fact") == "replay_against_launch"]
    measured = (
        f"measured on one {info.name}, driver {info.driver}, CUDA {info.cuda},"
        f" {time.strftime('%Y-%m-%d')}"
    )
    maker = _Profile(base, info, measured, known, name)
    if small_us:
        overhead_us = max(small_us[0] - base.launch_gap_us, 0.0)
        maker.set(rowwise_overhead_us=(overhead_us, "small kernels in a CUDA graph, less the gap"))
    _fit_bandwidth(maker, [s for s in fitted if s.work.name == "read"])
    _fit_attention(maker, [s for s in fitted if isinstance(s.work, PagedAttention)])
    _fit_products(maker, [s for s in fitted if isinstance(s.work, Gemm)])
    _fit_contention(maker, [r for r in pairs if r["group"] == "contention"])
    profile = maker.profile
    return Fit(profile, _errors(profile, [s for s in samples if s.held_out], pairs))


class _Profile:
    """A profile in the making."""

    def __init__(
        self, base: GpuProfile, info: DeviceInfo, measured: str, known: bool, name: str | None
    ) -> None:
        self.measured = measured
        queried = f"{measured}: queried from the driver"
        sources = dict(base.sources)
        if not known:
            about = f"assumption: taken over from {base.name}, the nearest, and not this GPU's: "
            sources = {key: about + text for key, text in sources.items()}
        for curve in ("compute_curve", "bandwidth_curve", "contention"):
            sources.pop(curve, None)
        keys = ("num_sms", "sm_granularity", "min_sms", "memory_bytes")
        self.profile = replace(
            base,
            name=name or "-".join(info.name.lower().split()),
            device_names=base.device_names if known else (info.name,),
            measured="calibrated",
            num_sms=info.num_sms,
            sm_granularity=info.sm_granularity,
            min_sms=info.min_sms,
            memory_bytes=float(info.memory_bytes),
            compute_curve=(),
            bandwidth_curve=(),
            contention=1.0,
            # They belong to the formula as it was before.
            factors={},
            sources=sources | dict.fromkeys(keys, queried),
        )

    def set(self, **values: tuple[Any, str]) -> None:
        """Set keys to (value, what it was fitted to)."""
        sources = {key: f"{self.measured}: {text}" for key, (_, text) in values.items()}
        self.profile = replace(
            self.profile,
            sources={**self.profile.sources, **sources},
            **{key: value for key, (value, _) in values.items()},
        )


def _fit_bandwidth(maker: _Profile, reads: Sequence[_Sample]) -> None:
    profile = maker.profile
    overhead_ms = 1e-3 * (profile.rowwise_overhead_us + profile.launch_gap_us)
    rates = defaultdict(list)
    for s in reads:
        assert isinstance(s.work, Stream)
        rates[s.num_sms].append(1e3 * s.work.bytes / (s.ms - overhead_ms))
    by_sms = {sms: float(np.mean(found)) for sms, found in rates.items()}
    whole = by_sms.get(profile.num_sms)
    if whole is None or len(by_sms) < 3:
        raise CalibrationError("too few reads were measured to know B(S)")
    text = "reads of 1 GiB, a Triton kernel"
    if whole > profile.hbm_bytes_per_s:
        maker.set(hbm_bytes_per_s=(whole, f"{text}; more than was known of this GPU"))
    maker.set(
        hbm_fraction=(whole / maker.profile.hbm_bytes_per_s, text),
        sm_bytes_per_s=(by_sms[min(by_sms)] / min(by_sms), f"{text}, on {min(by_sms)} SMs"),
        bandwidth_curve=(
            curve({sms: rate / whole for sms, rate in by_sms.items()}, profile.num_sms),
            text,
        ),
    )


def _fit_attention(maker: _Profile, samples: Sequence[_Sample]) -> None:
    if not samples:
        return

    def residuals(values: FloatArray) -> FloatArray:
        profile = replace(maker.profile, attention_hbm_fraction=float(values[0]))
        found = [np.log(predicted_ms(profile, (s.work,), s.num_sms) / s.ms) for s in samples]
        return np.array(found)

    start = [min(maker.profile.attention_hbm_fraction, 0.99)]
    [fraction] = least_squares(residuals, start, [0.05], [1.0])
    text = "paged decode attention, a Triton kernel and not vLLM's"
    maker.set(attention_hbm_fraction=(float(fraction), text))


def _fit_products(maker: _Profile, samples: Sequence[_Sample]) -> None:
    num_sms, keys = maker.profile.num_sms, _GEMM_KEYS
    whole = [s for s in samples if s.num_sms == num_sms]
    sizes = sorted({s.num_sms for s in samples} - {num_sms})
    if len(whole) <= len(keys) or len(sizes) < 2:
        raise CalibrationError("too few products were measured to know C(S)")
    # The peak may be another GPU's; let the rate rise first, and the fraction follow.
    peak = maker.profile.peak_flops["bfloat16"]
    fastest = max(
        2 * w.rows * w.fan_in * w.fan_out / (s.ms * 1e-3)
        for s in whole
        if isinstance(w := s.work, Gemm)
    )
    text = f"{len(whole)} cuBLAS bf16 products on the whole GPU"
    if fastest > peak:
        scaled = {k: v * fastest / peak for k, v in maker.profile.peak_flops.items()}
        maker.set(peak_flops=(scaled, "the fastest bf16 product; other dtypes in proportion"))

    def whole_residuals(values: FloatArray) -> FloatArray:
        changed = dict(zip(keys, map(float, values), strict=True))
        return _log_ratios(replace(maker.profile, **changed), whole)  # type: ignore[arg-type]

    start = [getattr(maker.profile, key) for key in keys]
    low, high = [0.05, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 50.0]
    values = least_squares(whole_residuals, start, low, high)
    maker.set(**{key: (float(v), text) for key, v in zip(keys, values, strict=True)})

    fractions = {}
    for sms in sizes:
        of_size = [
            s
            for s in samples
            if s.num_sms == sms and isinstance(s.work, Gemm) and s.work.rows >= COMPUTE_BOUND_ROWS
        ]
        if not of_size:
            continue

        def residuals(values: FloatArray, sms: int = sms, some: Any = of_size) -> FloatArray:
            points = ((sms, float(values[0])), (num_sms, 1.0))
            return _log_ratios(replace(maker.profile, compute_curve=points), some)

        [fractions[sms]] = least_squares(residuals, [sms / num_sms], [1e-3], [1.5])
    text = f"cuBLAS bf16 products of {COMPUTE_BOUND_ROWS} rows and more"
    maker.set(compute_curve=(curve(fractions, num_sms), text))


_GEMM_KEYS = ("gemm_fraction", "unoverlapped", "wave_fraction", "gemm_overhead_us")


def _log_ratios(profile: GpuProfile, samples: Sequence[_Sample]) -> FloatArray:
    """ln(forecast / measured) of products [N], one call of the roofline a shape."""
    found = np.empty(len(samples))
    by_shape = defaultdict(list)
    for i, s in enumerate(samples):
        assert isinstance(s.work, Gemm)
        by_shape[replace(s.work, rows=1)].append(i)
    for work, members in by_shape.items():
        rows = np.array([samples[i].work.rows for i in members], dtype=np.float64)
        sms = np.array([samples[i].num_sms for i in members])
        roofline = Roofline(SHAPE, profile, [work.operator("decode")])
        forecast = roofline.step_ms(BatchSummary(decode_tokens=rows), sms)
        found[members] = np.log(forecast / np.array([samples[i].ms for i in members]))
    return found


def _fit_contention(maker: _Profile, pairs: Sequence[Record]) -> None:
    """Least squares over how much each lane slows, in units of its time alone."""

    known = [_Pair(maker.profile, record) for record in pairs]

    def sum_of_squares(contention: float) -> float:
        profile = replace(maker.profile, contention=contention)
        return sum((a - b) ** 2 for pair in known for a, b in pair.slowdowns(profile))

    if not pairs or sum_of_squares(0.0) == sum_of_squares(MAX_CONTENTION):
        return  # Nothing asked for more than the bus has: nothing is known of it.
    found = optimize.minimize_scalar(
        sum_of_squares, bounds=(0.0, MAX_CONTENTION), method="bounded", options={"xatol": 1e-3}
    )
    text = f"{len(pairs)} pairs of lanes beside each other, against each alone"
    maker.set(contention=(float(found.x), text))


class _Pair:
    """A record of two lanes, and each lane's forecast alone, which no contention changes."""

    def __init__(self, profile: GpuProfile, record: Record) -> None:
        lanes = ("decode", "prefill")
        self.decode, self.prefill = ([from_json(w) for w in record[f"{x}_works"]] for x in lanes)
        self.sms = record["decode_sms"], record["prefill_sms"]
        self.alone_ms = (
            predicted_ms(profile, self.decode, self.sms[0]),
            predicted_ms(profile, self.prefill, self.sms[1]),
        )
        self.measured = [record[x]["ms"] / record[f"{x}_alone"]["ms"] for x in lanes]

    def slowdowns(self, profile: GpuProfile) -> list[tuple[float, float]]:
        """(forecast, measured) of time beside over time alone, of both lanes."""
        beside_ms = predicted_pair_ms(profile, self.decode, self.prefill, *self.sms)
        found = zip(beside_ms, self.alone_ms, self.measured, strict=True)
        return [(beside / alone, measured) for beside, alone, measured in found]


def _errors(
    profile: GpuProfile, held_out: Sequence[_Sample], pairs: Sequence[Record]
) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for s in held_out:
        error = abs(predicted_ms(profile, (s.work,), s.num_sms) / s.ms - 1)
        found["operators held out"].append(error)
        found[f"{s.work.kind} held out"].append(error)
        if s.num_sms == profile.num_sms:
            found[f"{s.work.kind} held out, whole GPU"].append(error)
    for record in pairs:
        fitted = "fitted" if record["group"] == "contention" else record["group"]
        found[f"slowdown beside each other, {fitted}"] += [
            abs(forecast / found - 1)
            for forecast, found in _Pair(profile, record).slowdowns(profile)
        ]
    return {
        name: {"mean": float(np.mean(each)), "max": float(np.max(each)), "count": len(each)}
        for name, each in found.items()
    }


def curve(fractions: Mapping[int, float], num_sms: int) -> Curve:
    """Points of a profile's curve: never falling, at most 1, and 1 at the whole GPU.

    Least squares under that order: noise does not bias it upwards.
    """
    sizes = sorted(sms for sms in fractions if sms < num_sms)
    rising = optimize.isotonic_regression([fractions[sms] for sms in sizes]).x
    points = [(sms, min(round(float(f), 4), 1.0)) for sms, f in zip(sizes, rising, strict=True)]
    return (*points, (num_sms, 1.0))


def least_squares(
    residuals: Callable[[FloatArray], FloatArray],
    start: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> FloatArray:
    """The x within [low, high] of the least sum of squared ``residuals(x)``."""
    found = optimize.least_squares(
        # Steps large enough to see past the kinks of a roofline.
        residuals,
        np.clip(start, low, high),
        bounds=(low, high),
        x_scale=np.subtract(high, low),
        diff_step=1e-4,
    )
    return np.asarray(found.x)


def write_profile(path: Path, fitted: Fit) -> None:
    """As YAML that GpuProfile.load reads, with the errors on held-out operators on top.

    Raises:
        ProfileError: the profile would not load; the file shows why.
    """
    head = ["SM groups of this GPU, measured by vllm-duet calibrate."]
    head += [
        f"Mean absolute error, {name}: {error['mean']:.1%} ({error['count']:g} times)."
        for name, error in fitted.errors.items()
    ]
    fitted.profile.save(path, head)
