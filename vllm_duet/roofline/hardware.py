# SPDX-License-Identifier: Apache-2.0
"""What a GPU does with S of its SMs: GpuProfile, read from a YAML file.

A profile is data: a new GPU is a new file in vllm_duet/profiles. The shipped ones are made by
vllm_duet/measured/fit.py. Every number names its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import yaml

FloatArray = npt.NDArray[np.float64]
Curve = tuple[tuple[int, float], ...]

FOLDER = Path(__file__).parent.parent / "profiles"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MEASURED: Mapping[str, str] = {
    "published": "fitted to operator times that others measured; the rest from data sheets and"
    " assumptions",
    "nothing": "from data sheets and assumptions, not measured",
}
"""What a profile as a whole rests on."""

_LEVELS = ("measured", "datasheet", "assumption")


class ProfileError(ValueError):
    """A GPU profile that cannot be used; names the file and the key."""


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Measured time over the formula's, for one kind of operator.

    ``permille`` has a dimension for each of ``axes``, whose values rise. In between, the
    logarithm of the factor is linear in the logarithms of all axes; beyond an axis's ends
    the factor stays, so far out the formula has the last word.
    """

    axes: Mapping[str, tuple[float, ...]]
    permille: npt.NDArray[np.int64]
    source: str

    def at(self, *points: FloatArray | float) -> FloatArray:
        """Factors where the axes have these values: one dimension for each array among them."""
        found = np.log(self.permille / 1000.0)
        axis = 0
        for values, point in zip(self.axes.values(), points, strict=True):
            knots = np.log2(values)
            wanted = np.clip(np.log2(np.maximum(point, values[0])), knots[0], knots[-1])
            low = np.clip(np.searchsorted(knots, wanted, side="right") - 1, 0, len(knots) - 2)
            share = (wanted - knots[low]) / (knots[low + 1] - knots[low])
            share = share.reshape(share.shape + (1,) * (found.ndim - axis - 1))
            found = (1 - share) * found.take(low, axis) + share * found.take(low + 1, axis)
            axis += np.ndim(point)
        return np.asarray(np.exp(found))


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """One GPU's rates and fixed costs. A ``_fraction`` is achieved / peak.

    Identity: ``device_names`` are the names CUDA reports; ``measured`` is a key of MEASURED.

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

    Tables: ``factors`` are what these formulas are off by, by operators.Operator.measured.

    ``sources`` says for each other field where its numbers come from; each begins with
    "measured", "datasheet" or "assumption".
    """

    name: str
    device_names: tuple[str, ...]
    measured: str
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
    factors: Mapping[str, FactorTable] = field(default_factory=dict)

    _UNSOURCED: ClassVar = frozenset({"name", "device_names", "measured", "sources", "factors"})
    _MAY_BE_ZERO: ClassVar = frozenset({"unoverlapped", "wave_fraction", "contention"})

    @classmethod
    def load(cls, name_or_path: str | Path) -> GpuProfile:
        """A profile by its name (see :meth:`names`) or from a YAML file.

        Raises:
            ProfileError: no such profile, or the file names an unknown key, lacks
                one, or holds a value of the wrong type or out of range.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            raise ProfileError(
                f"no GPU profile {str(name_or_path)!r}: give a YAML file or one of"
                f" {', '.join(cls.names())}"
            )
        try:
            data = yaml.load(path.read_text(), _Loader)
        except yaml.YAMLError as error:
            raise ProfileError(f"{path}: not valid YAML ({error})") from error
        return _checked(data, path)

    @staticmethod
    def names() -> list[str]:
        """The names of the profiles that come with the package, sorted."""
        return sorted(path.stem for path in FOLDER.glob("*.yaml"))

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

    def save(self, path: Path, head: Sequence[str] = ()) -> None:
        """Write a YAML file that :meth:`load` reads, below comments with the lines of ``head``.

        Raises:
            ProfileError: the profile would not load; the file shows why.
        """
        data: dict[str, Any] = {}
        for key in (f.name for f in fields(self)):
            if key in self.sources or key in ("name", "device_names", "measured"):
                data[key] = _plain(getattr(self, key))
        data["sources"] = dict(self.sources)
        text = "".join(f"# {line}\n" for line in head)
        text += yaml.safe_dump(data, sort_keys=False, width=1000, allow_unicode=True)
        if self.factors:
            text += "factors:\n" + "".join(
                _dumped(name, table) for name, table in self.factors.items()
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        GpuProfile.load(path)

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


def _plain(value: Any) -> Any:
    """As YAML has it, numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return [{"sms": sms, "fraction": fraction} for sms, fraction in value]
    return list(value) if isinstance(value, tuple) else value


def _dumped(name: str, table: FactorTable) -> str:
    axes = "".join(
        f"      {axis}: [{', '.join(f'{value:.15g}' for value in values)}]\n"
        for axis, values in table.axes.items()
    )
    rows = table.permille.reshape(-1, table.permille.shape[-1])
    lines = "".join(f"      {' '.join(map(str, row))}\n" for row in rows.tolist())
    return f"  {name}:\n    source: {table.source!r}\n    axes:\n{axes}    permille: |\n{lines}"


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
            if f.default is not MISSING or f.default_factory is not MISSING:
                continue
            raise fail(f"missing key {key!r}")
        try:
            values[key] = _PARSERS[str(f.type)](data[key])
        except (TypeError, ValueError, KeyError) as error:
            raise fail(f"{key!r} must be {_EXPECTED[str(f.type)]}, not {data[key]!r}") from error
    for key in values:
        source = values["sources"].get(key)
        if key not in GpuProfile._UNSOURCED and source is None:
            raise fail(f"'sources' does not say where {key!r} comes from")
        if source is not None and not source.startswith(_LEVELS):
            raise fail(f"the source of {key!r} must begin with one of {', '.join(_LEVELS)}")
    if values["measured"] not in MEASURED:
        raise fail(f"'measured' must be one of {', '.join(MEASURED)}, not {values['measured']!r}")
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


def _factor_tables(value: Any) -> dict[str, FactorTable]:
    return {_text(name): _factor_table(**table) for name, table in dict(value).items()}


def _factor_table(source: Any, axes: Any, permille: Any) -> FactorTable:
    """``permille`` is text: as YAML's own numbers it would take seconds to read."""
    found = {_text(name): tuple(map(_number, values)) for name, values in axes.items()}
    for values in found.values():
        if len(values) < 2 or values[0] <= 0 or any(a >= b for a, b in pairwise(values)):
            raise ValueError
    numbers = np.array(_text(permille).split(), dtype=np.int64)
    if (numbers <= 0).any() or numbers.size != prod(map(len, found.values())):
        raise ValueError
    return FactorTable(found, numbers.reshape(*map(len, found.values())), _text(source))


def _curve(value: Any) -> Curve:
    return tuple((_positive_integer(p["sms"]), _number(p["fraction"])) for p in value or ())


_PARSERS = {
    "str": _text,
    "int": _positive_integer,
    "float": _number,
    "tuple[str, ...]": _texts,
    "Mapping[str, float]": _numbers_by_name,
    "Mapping[str, str]": _text_by_name,
    "Curve": _curve,
    "Mapping[str, FactorTable]": _factor_tables,
}
_EXPECTED = {
    "str": "text",
    "int": "a whole number of at least 1",
    "float": "a number of at least 0",
    "tuple[str, ...]": "a list of texts",
    "Mapping[str, float]": "a mapping of names to numbers",
    "Mapping[str, str]": "a mapping of names to texts",
    "Curve": "a list of {sms, fraction}",
    "Mapping[str, FactorTable]": "tables of source, rising axes, and as many permille as they span",
}
