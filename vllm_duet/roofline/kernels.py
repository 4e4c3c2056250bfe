# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a forecast, compiled by Numba.

A forecast is some forty operations on arrays of a few dozen numbers. In NumPy each
of them costs a call, and between two scheduler steps all of its code has left the
CPU's caches; compiled, they are one call. predictor.py has the formulas' sources
and builds the tables.

Compiling takes seconds, so its result is kept on disk, for the next start of a server. Numba
compiles anew when the file of a function has changed, and does not look at what the function
uses: so a compiled function uses functions and constants of its own file alone.

Tables, for K operators, F features and G SMs:

* ``coefficients`` [4 K + 1, F]: K rows of compute time that is linear in the features, K
  of tile rows, K of memory time, K of fixed time, one of time between operators; ms on the
  whole GPU;
* ``per_operator`` [4, K]: tile columns, ms of a wave, ``unoverlapped``, ``contention``;
* ``by_sms`` [4, G + 1]: 1/S, 1/C(S), 1/B(S), and how much slower a tile runs on one of S
  SMs than on one of all; column 0 is never read;
* ``lookups`` [K, 3]: the features that an operator's measured factor depends on, its units and
  its amount (-1: none), and where in ``factors`` its row, or rows, begin; units of -1 mean that
  its time is the formula's;
* ``factors`` [.]: first [UNITS] of the whole step, by its tokens; then for each operator that has
  any, [UNITS], or [UNITS, LENGTHS].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

Compiled = TypeVar("Compiled", bound=Callable[..., object])

if TYPE_CHECKING:

    def njit(function: Compiled) -> Compiled: ...

else:
    import numba
    from llvmlite.binding import ffi

    # vLLM's CPU build takes vars() of all that any module holds, to find its Triton kernels, and
    # ends where one is no dict: llvmlite's library would answer with a function of that name.
    getattr(ffi.lib, "_fntab", {}).setdefault("__dict__", {})

    def njit(function):
        try:
            return numba.njit(function, cache=True)
        except RuntimeError:  # neither this folder nor the user's cache can be written to
            return numba.njit(function)


FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Features = tuple[float, ...]
Times = tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]
Tables = tuple[FloatArray, FloatArray, FloatArray, IntArray, FloatArray]

(_STEP, _TOKENS, _SAMPLED), _HAS_PREFILL = range(3), 7
_PREFILL_TOKENS, _PREFILL_PAIRS, _PREFILL_KV_TOKENS = range(8, 11)
_PREFILL_WINDOW_PAIRS, _PREFILL_WINDOW_KV_TOKENS, _EXPERTS = range(11, 14)
"""Rows of FEATURES in operators.py."""

OCTAVES = 21
"""Factors reach to 2^20 tokens; beyond, they stay."""

_BETWEEN = {17, 33, 65, 96, 129, 192, 257, 513, 768, 769, 1025, 1280, 1281, 1536, 1537, 2049, 3072}
UNITS = np.array(sorted({2**octave for octave in range(OCTAVES)} | _BETWEEN), np.float64)
"""Where the factors of an operator stand along its units: closer where a row more begins a tile."""

_OCTAVE_STARTS = np.searchsorted(UNITS, 2.0 ** np.arange(OCTAVES))
LENGTHS = 2.0 ** np.arange(OCTAVES)
"""Where they stand along the mean amount of a unit."""

TINY_MS = 1e-12
"""Stands in for a time of zero, where its numerator is zero too."""


@njit
def combined(compute_ms: float, memory_ms: float, unoverlapped: float) -> float:
    """Two times that overlap but for a part of the lesser."""
    return max(compute_ms, memory_ms) + unoverlapped * min(compute_ms, memory_ms)


@njit
def place_among_units(units: float) -> tuple[int, float]:
    """Where among UNITS: after which of them, and what share of the way to the next."""
    octave = math.frexp(units)[1] - 1
    if octave < 0:
        return 0, 0.0
    if octave >= OCTAVES - 1:
        return UNITS.size - 2, 1.0
    at = _OCTAVE_STARTS[octave]
    while UNITS[at + 1] <= units:
        at += 1
    return at, (units - UNITS[at]) / (UNITS[at + 1] - UNITS[at])


@njit
def place_among_lengths(length: float) -> tuple[int, float]:
    """The same among LENGTHS."""
    mantissa, exponent = math.frexp(length)
    if exponent < 1:
        return 0, 0.0
    if exponent >= OCTAVES:
        return OCTAVES - 2, 1.0
    return exponent - 1, 2.0 * mantissa - 1.0


@njit
def _place(features: FloatArray, row: int, places: IntArray, shares: FloatArray) -> None:
    """``place_among_units`` of a feature in all steps."""
    for n in range(features.shape[1]):
        if n > 0 and features[row, n] == features[row, n - 1]:
            places[row, n], shares[row, n] = places[row, n - 1], shares[row, n - 1]
        else:
            places[row, n], shares[row, n] = place_among_units(features[row, n])


@njit
def measured_factors(lookups: IntArray, factors: FloatArray, features: FloatArray) -> FloatArray:
    """[K + 1, N]: what the formula's time of each operator, and last of what is between them, is
    to be multiplied by."""
    operators, steps = lookups.shape[0], features.shape[1]
    found = np.empty((operators + 1, steps))
    places, shares = np.empty(features.shape, np.int64), np.empty(features.shape)
    placed = np.zeros(features.shape[0], np.bool_)
    _place(features, _TOKENS, places, shares)
    placed[_TOKENS] = True
    for n in range(steps):
        i = places[_TOKENS, n]
        found[:, n] = factors[i] + shares[_TOKENS, n] * (factors[i + 1] - factors[i])
    for k in range(operators):
        units, amount, start = lookups[k]
        if units < 0:
            continue
        if not placed[units]:
            placed[units] = True
            _place(features, units, places, shares)
        for n in range(steps):
            i, share = places[units, n], shares[units, n]
            if amount < 0:
                low, high = factors[start + i], factors[start + i + 1]
            else:
                j, part = place_among_lengths(features[amount, n] / max(features[units, n], 1.0))
                at = start + i * OCTAVES + j
                low = factors[at] + part * (factors[at + 1] - factors[at])
                at += OCTAVES
                high = factors[at] + part * (factors[at + 1] - factors[at])
            found[k, n] *= low + share * (high - low)
    return found


@njit
def _times(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    features: FloatArray,
    sms: IntArray,
    measured: FloatArray,
) -> Times:
    """``step_times`` where the measured factors [K + 1, N] are known."""
    operators, steps = per_operator.shape[1], sms.size
    rows = coefficients.shape[0]
    work = np.zeros((rows, steps))
    for r in range(rows):
        for f in range(features.shape[0]):
            if coefficients[r, f] != 0.0:
                for n in range(steps):
                    work[r, n] += coefficients[r, f] * features[f, n]
    compute, memory = np.empty((operators, steps)), np.empty((operators, steps))
    busy, total = np.empty((operators, steps)), work[rows - 1] * measured[operators]
    for k in range(operators):
        columns, wave_ms, unoverlapped = per_operator[:3, k]
        for n in range(steps):
            per_sm, per_compute, per_bandwidth, wave_scale = by_sms[:, sms[n]]
            factor = measured[k, n]
            waves = np.ceil(np.ceil(work[operators + k, n]) * columns * per_sm)
            compute[k, n] = work[k, n] * per_compute + waves * wave_ms * wave_scale
            compute[k, n] *= factor
            memory[k, n] = work[2 * operators + k, n] * per_bandwidth * factor
            busy[k, n] = combined(compute[k, n], memory[k, n], unoverlapped)
            total[n] += busy[k, n] + work[3 * operators + k, n] * factor
    return compute, memory, work[2 * operators : 3 * operators], busy, total


@njit
def _pair_totals(
    per_operator: FloatArray,
    compute: FloatArray,
    memory: FloatArray,
    bus: FloatArray,
    busy: FloatArray,
    alone: FloatArray,
) -> FloatArray:
    """``pair_totals`` where the times alone are known."""
    operators, pairs = per_operator.shape[1], alone.size // 2
    total = alone.copy()
    for n in range(2 * pairs):
        other = n + pairs if n < pairs else n - pairs
        beside = 0.0
        for k in range(operators):
            # What is faster than memory allows was read from a cache, and not over the bus.
            beside += min(bus[k, other], busy[k, other])
        beside /= max(alone[other], TINY_MS)
        for k in range(operators):
            demand = min(bus[k, n] / max(busy[k, n], TINY_MS), 1.0) + beside
            if demand > 1.0:
                growth = 1.0 + per_operator[3, k] * (demand - 1.0)
                slowed = combined(compute[k, n], memory[k, n] * growth, per_operator[2, k])
                total[n] += slowed - busy[k, n]
    return total


@njit
def step_times(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    lookups: IntArray,
    factors: FloatArray,
    features: FloatArray,
    sms: IntArray,
) -> Times:
    """Times in ms of N steps alone, ``features`` [F, N] on ``sms`` [N] SMs.

    Returns by operator [K, N] the compute time, the memory time, the memory time at the
    whole GPU's bandwidth, and compute and memory combined; and the total [N].
    """
    measured = measured_factors(lookups, factors, features)
    return _times(coefficients, per_operator, by_sms, features, sms, measured)


@njit
def pair_totals(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    lookups: IntArray,
    factors: FloatArray,
    features: FloatArray,
    sms: IntArray,
) -> FloatArray:
    """Times in ms of N steps side by side with N others: 2 N steps in, 2 N times out.

    Step n and step N + n share the memory bus; see ``Roofline.pair_ms``.
    """
    measured = measured_factors(lookups, factors, features)
    times = _times(coefficients, per_operator, by_sms, features, sms, measured)
    return _pair_totals(per_operator, *times)


@njit
def plan_totals(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    lookups: IntArray,
    factors: FloatArray,
    decode: Features,
    prefill: Features,
    decode_sms: IntArray,
    num_experts: float,
    log_miss: float,
) -> FloatArray:
    """Times in ms of all that a policy compares.

    ``decode`` [F] and ``prefill`` [F] are features, neither of an empty batch;
    ``decode_sms`` [S] the decode lanes. Returns, one after the other, the mixed step, the
    prefill and the decodes, each alone on all SMs, then the decode steps [S] and the
    prefills [S] beside each other.

    Raises:
        ValueError: a decode lane leaves no SM for prefill, or has none.
    """
    splits, num_sms = decode_sms.size, by_sms.shape[1] - 1
    features, sms = np.empty((len(decode), 3)), np.full(3, num_sms)
    for f in range(len(decode)):
        features[f, 0] = decode[f] + prefill[f]
        features[f, 1], features[f, 2] = prefill[f], decode[f]
    features[_STEP, 0] = 1
    features[_EXPERTS, 0] = -num_experts * np.expm1(features[_TOKENS, 0] * log_miss)
    measured = measured_factors(lookups, factors, features)
    alone = _times(coefficients, per_operator, by_sms, features, sms, measured)[4]
    lane_features, sms = np.empty((len(decode), 2 * splits)), np.empty(2 * splits, np.int64)
    lane_measured = np.empty((lookups.shape[0] + 1, 2 * splits))
    for s in range(splits):
        if not 0 < decode_sms[s] < num_sms:
            raise ValueError("a decode lane must have some of the SMs, and not all")
        lane_features[:, s], lane_features[:, splits + s] = features[:, 2], features[:, 1]
        lane_measured[:, s], lane_measured[:, splits + s] = measured[:, 2], measured[:, 1]
        sms[s], sms[splits + s] = decode_sms[s], num_sms - decode_sms[s]
    times = _times(coefficients, per_operator, by_sms, lane_features, sms, lane_measured)
    return np.concatenate((alone, _pair_totals(per_operator, *times)))


@njit
def capped_totals(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    lookups: IntArray,
    factors: FloatArray,
    decode: Features,
    prefills: IntArray,
    sizes: IntArray,
    window: int,
    chunked: bool,
    num_experts: float,
    log_miss: float,
) -> FloatArray:
    """Times in ms, on all SMs, of steps with the first ``sizes`` [N] tokens of the prefill.

    ``decode`` [F] are the features of the decodes, ``prefills`` [2, R] the query and
    context lengths of the prompts, taken in order; ``window`` is 0 where there is none.
    Returns [3, N]: the times, the prefill tokens, and the (query, key) pairs; for the
    formulas see BatchSummary and ``predictor._window_statistics``.
    """
    features = np.empty((len(decode), sizes.size))
    found = np.zeros((3, sizes.size))
    for n in range(sizes.size):
        for f in range(len(decode)):
            features[f, n] = decode[f]
        left = sizes[n]
        for r in range(prefills.shape[1]):
            if left <= 0:
                break
            q, c = min(prefills[0, r], left), prefills[1, r]
            left -= q
            features[_TOKENS, n] += q
            features[_SAMPLED, n] += 1
            features[_HAS_PREFILL, n] = 1
            features[_PREFILL_TOKENS, n] += q
            features[_PREFILL_PAIRS, n] += q * (c + (q + 1) / 2)
            features[_PREFILL_KV_TOKENS, n] += c + q
            if window and chunked:
                first = c % window
                last = first + q
                rest = last % window
                pairs = last // window * (window * (window + 1) / 2) + rest * (rest + 1) / 2
                features[_PREFILL_WINDOW_PAIRS, n] += pairs - first * (first + 1) / 2
                features[_PREFILL_WINDOW_KV_TOKENS, n] += last
            elif window:
                a = min(max(window - c, 0), q)
                features[_PREFILL_WINDOW_PAIRS, n] += a * (c + (a + 1) / 2) + (q - a) * window
                features[_PREFILL_WINDOW_KV_TOKENS, n] += min(c + q, q + window - 1)
        features[_EXPERTS, n] = -num_experts * np.expm1(features[_TOKENS, n] * log_miss)
        found[1, n] = features[_PREFILL_TOKENS, n]
        found[2, n] = features[_PREFILL_PAIRS, n]
    sms = np.full(sizes.size, by_sms.shape[1] - 1)
    measured = measured_factors(lookups, factors, features)
    found[0] = _times(coefficients, per_operator, by_sms, features, sms, measured)[4]
    return found
