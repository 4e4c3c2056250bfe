# SPDX-License-Identifier: Apache-2.0
"""What a GPU does with S of its SMs: GpuProfile, read from a YAML file.

A profile is data: a new GPU is a new file in vllm_duet/profiles, and calibration
writes the same format with measured curves. Every number names its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import yaml

FloatArray = npt.NDArray[np.float64]
Curve = tuple[tuple[int, float], ...]

_FOLDER = Path(__file__).parent.parent / "profiles"


class ProfileError(ValueError):
    """A GPU profile that cannot be used; names the file and the key."""


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """One GPU's rates and fixed costs. A ``_fraction`` is achieved / peak.

    Identity: ``device_names`` are the names CUDA reports; ``measured`` is whether
    the numbers were measured on the GPU itself, by calibration.

    SMs: ``sm_granularity`` and ``min_sms`` are the step and the least of an SM
    group. They are defaults for planning: the driver has the last word.

    Rates: ``peak_flops`` by dtype, dense; ``gemm_fraction`` and
    ``attention_fraction`` of it are reached; of ``hbm_bytes_per_s``,
    ``hbm_fraction`` by streaming kernels and ``attention_hbm_fraction`` by
    attention; ``sm_bytes_per_s`` is what one SM can draw while the bus is free;
    ``link_bytes_per_s`` is what one GPU sends to its peers in an all-reduce.

    Shape: compute and memory time overlap, but for ``unoverlapped`` of the lesser
    of the two; tiles of ``tile_rows`` x ``tile_columns`` are dealt to SMs in
    waves, and ``wave_fraction`` of a GEMM's compute time is rounded up to whole
    waves; an expert's rows are padded to ``expert_tile_rows``; a row-wise kernel
    runs ``row_blocks_per_sm`` rows at a time on an SM, each at
    ``row_bytes_per_s`` plus ``row_reduction_us`` for each reduction.

    Fixed costs, for each run: ``gemm_overhead_us``, ``attention_overhead_us``,
    ``rowwise_overhead_us`` (streams too), ``link_latency_us``; ``launch_gap_us``
    between two kernels; ``step_overhead_us`` once a step.

    Curves: where present, ``compute_curve`` and ``bandwidth_curve`` are measured
    points (SMs, fraction of the rate of the whole GPU), interpolated linearly.

    Side by side: ``contention`` is how much memory time grows where two lanes ask
    for more than the memory bus has, see ``Roofline.pair_ms``. 1 shares the bus in
    proportion and is taken where nothing was measured; 0 is no slowdown at all.

    ``sources`` says for each other field where its numbers come from.
    """

    name: str
    device_names: tuple[str, ...]
    measured: bool
    num_sms: int
    sm_granularity: int
    min_sms: int
    memory_bytes: float
    peak_flops: Mapping[str, float]
    hbm_bytes_per_s: float
    sm_bytes_per_s: float
    link_bytes_per_s: float
    gemm_fraction: float
    attention_fraction: float
    hbm_fraction: float
    attention_hbm_fraction: float
    unoverlapped: float
    tile_rows: int
    tile_columns: int
    wave_fraction: float
    expert_tile_rows: int
    row_blocks_per_sm: int
    row_bytes_per_s: float
    row_reduction_us: float
    gemm_overhead_us: float
    attention_overhead_us: float
    rowwise_overhead_us: float
    link_latency_us: float
    launch_gap_us: float
    step_overhead_us: float
    sources: Mapping[str, str]
    compute_curve: Curve = ()
    bandwidth_curve: Curve = ()
    contention: float = 1.0

    _UNSOURCED: ClassVar = frozenset({"name", "device_names", "measured", "sources"})
    _MAY_BE_ZERO: ClassVar = frozenset({"measured", "unoverlapped", "wave_fraction", "contention"})

    @classmethod
    def load(cls, name_or_path: str | Path) -> GpuProfile:
        """A profile by its name (see :meth:`names`) or from a YAML file.

        Raises:
            ProfileError: no such profile, or the file names an unknown key, lacks
                one, or holds a value of the wrong type or out of range.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = _FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise ProfileError(
                f"no GPU profile {str(name_or_path)!r}: give a YAML file or one of"
                f" {', '.join(cls.names())}"
            )
        try:
            data = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ProfileError(f"{path}: not valid YAML ({error})") from error
        return _checked(data, path)

    @staticmethod
    def names() -> list[str]:
        """The names of the profiles that come with the package, sorted."""
        return sorted(path.stem for path in _FOLDER.glob("*.yaml"))

    @classmethod
    def detect(cls, device_name: str) -> GpuProfile | None:
        """The shipped profile for a GPU by the name CUDA reports, or None.

        The name must match in full: an MIG slice, say, has the same prefix as
        the whole GPU and is not one.
        """
        wanted = device_name.strip().casefold()
        for name in cls.names():
            profile = cls.load(name)
            if wanted in (known.casefold() for known in profile.device_names):
                return profile
        return None

    def peak_flops_per_s(self, dtype: str, fallback: str) -> float:
        """Dense peak of ``dtype``; of ``fallback`` where the GPU has no such units
        and kernels expand the weights first (fp8 on compute capability 8.x).

        Raises:
            ProfileError: the profile has neither.
        """
        for candidate in (dtype, fallback):
            if candidate in self.peak_flops:
                return self.peak_flops[candidate]
        raise ProfileError(f"profile {self.name}: peak_flops has neither {dtype} nor {fallback}")

    def compute_fractions(self) -> FloatArray:
        """C(S)/C(all) for S = 0..num_sms, linear in S unless measured."""
        sms = np.arange(self.num_sms + 1, dtype=np.float64)
        if self.compute_curve:
            return _interpolated(sms, self.compute_curve)
        return sms / self.num_sms

    def bandwidth_fractions(self) -> FloatArray:
        """B(S)/B(all) for S = 0..num_sms.

        Unless measured: a smooth minimum of S b and the bus, (x^-4 + 1)^(-1/4) with
        x = S b / B, b = sm_bytes_per_s, B = what streaming kernels reach, scaled to
        1 for the whole GPU. Source: design.md, "Roofline, in short" (B saturates
        early); the exponent is an assumption.
        """
        sms = np.arange(self.num_sms + 1, dtype=np.float64)
        if self.bandwidth_curve:
            return _interpolated(sms, self.bandwidth_curve)
        x = sms * self.sm_bytes_per_s / (self.hbm_bytes_per_s * self.hbm_fraction)
        fraction = x / (1 + x**4) ** 0.25
        return np.asarray(fraction / fraction[-1])


def _interpolated(sms: FloatArray, curve: Curve) -> FloatArray:
    # From (0, 0), so that a group below the first point is not flattered.
    points = [(0, 0.0), *curve]
    return np.interp(sms, [p[0] for p in points], [p[1] for p in points])


def _checked(data: Any, path: Path) -> GpuProfile:
    def fail(message: str) -> ProfileError:
        return ProfileError(f"{path}: {message}")

    if not isinstance(data, dict):
        raise fail("the profile must be a mapping of keys to values")
    known = {f.name: f for f in fields(GpuProfile)}
    for key in data:
        if key not in known:
            raise fail(f"unknown key {key!r}")
    values: dict[str, Any] = {}
    for key, f in known.items():
        if key not in data:
            if f.default is not MISSING:
                continue
            raise fail(f"missing key {key!r}")
        try:
            values[key] = _PARSERS[str(f.type)](data[key])
        except (TypeError, ValueError, KeyError) as error:
            raise fail(f"{key!r} must be {_EXPECTED[str(f.type)]}, not {data[key]!r}") from error
    for key in values:
        if key not in GpuProfile._UNSOURCED and key not in values["sources"]:
            raise fail(f"'sources' does not say where {key!r} comes from")
    for key, value in values.items():
        if key.endswith("_fraction") and value > 1:
            raise fail(f"{key!r} must be at most 1, not {value}")
        if value == 0.0 and not key.endswith("_us") and key not in GpuProfile._MAY_BE_ZERO:
            raise fail(f"{key!r} must be above 0")
    for key in ("compute_curve", "bandwidth_curve"):
        curve = values.get(key)
        if curve and any(a >= b or x > y for (a, x), (b, y) in pairwise(curve)):
            raise fail(f"{key!r} must rise: sms strictly, fraction not falling")
        if curve and curve[-1] != (values["num_sms"], 1.0):
            raise fail(f"{key!r} must end with fraction 1 at all {values['num_sms']} SMs")
    return GpuProfile(**values)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _positive_integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError
    return value


def _number(value: Any) -> float:
    # YAML 1.1 reads 1e9 as text; 1.0e+9 is a number. Accept both.
    if isinstance(value, bool) or not 0 <= float(value) < float("inf"):
        raise TypeError
    return float(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(_text, value))


def _numbers_by_name(value: Any) -> dict[str, float]:
    return {_text(key): _number(item) for key, item in dict(value).items()}


def _text_by_name(value: Any) -> dict[str, str]:
    return {_text(key): _text(item) for key, item in dict(value).items()}


def _curve(value: Any) -> Curve:
    return tuple((_positive_integer(p["sms"]), _number(p["fraction"])) for p in value or ())


_PARSERS = {
    "str": _text,
    "bool": _flag,
    "int": _positive_integer,
    "float": _number,
    "tuple[str, ...]": _texts,
    "Mapping[str, float]": _numbers_by_name,
    "Mapping[str, str]": _text_by_name,
    "Curve": _curve,
}
_EXPECTED = {
    "str": "text",
    "bool": "true or false",
    "int": "a whole number of at least 1",
    "float": "a number of at least 0",
    "tuple[str, ...]": "a list of texts",
    "Mapping[str, float]": "a mapping of names to numbers",
    "Mapping[str, str]": "a mapping of names to texts",
    "Curve": "a list of {sms, fraction}",
}
