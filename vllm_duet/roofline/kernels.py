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

* ``coefficients`` [3 K + 1, F]: K rows of compute time that is linear in the features, K
  of tile rows, K of memory time, one of fixed time; ms on the whole GPU;
* ``per_operator`` [4, K]: tile columns, ms of a wave, ``unoverlapped``, ``contention``;
* ``by_sms`` [4, G + 1]: 1/S, 1/C(S), 1/B(S), and how much slower a tile runs on one of S
  SMs than on one of all; column 0 is never read.
"""

from __future__ import annotations

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

(_STEP, _TOKENS, _SAMPLED), _HAS_PREFILL = range(3), 7
_PREFILL_TOKENS, _PREFILL_PAIRS, _PREFILL_KV_TOKENS = range(8, 11)
_PREFILL_WINDOW_PAIRS, _PREFILL_WINDOW_KV_TOKENS, _EXPERTS = range(11, 14)
"""Rows of FEATURES in operators.py."""

TINY_MS = 1e-12
"""Stands in for a time of zero, where its numerator is zero too."""


@njit
def combined(compute_ms: float, memory_ms: float, unoverlapped: float) -> float:
    """Two times that overlap but for a part of the lesser."""
    return max(compute_ms, memory_ms) + unoverlapped * min(compute_ms, memory_ms)


@njit
def step_times(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    features: FloatArray,
    sms: IntArray,
) -> Times:
    """Times in ms of N steps alone, ``features`` [F, N] on ``sms`` [N] SMs.

    Returns by operator [K, N] the compute time, the memory time, the memory time at the
    whole GPU's bandwidth, and compute and memory combined; and the total [N].
    """
    operators, steps = per_operator.shape[1], sms.size
    rows = coefficients.shape[0]
    work = np.zeros((rows, steps))
    for r in range(rows):
        for f in range(features.shape[0]):
            if coefficients[r, f] != 0.0:
                for n in range(steps):
                    work[r, n] += coefficients[r, f] * features[f, n]
    compute, memory = np.empty((operators, steps)), np.empty((operators, steps))
    busy, total = np.empty((operators, steps)), work[rows - 1].copy()
    for k in range(operators):
        columns, wave_ms, unoverlapped = per_operator[:3, k]
        for n in range(steps):
            per_sm, per_compute, per_bandwidth, wave_scale = by_sms[:, sms[n]]
            waves = np.ceil(np.ceil(work[operators + k, n]) * columns * per_sm)
            compute[k, n] = work[k, n] * per_compute + waves * wave_ms * wave_scale
            memory[k, n] = work[2 * operators + k, n] * per_bandwidth
            busy[k, n] = combined(compute[k, n], memory[k, n], unoverlapped)
            total[n] += busy[k, n]
    return compute, memory, work[2 * operators : 3 * operators], busy, total


@njit
def pair_totals(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
    features: FloatArray,
    sms: IntArray,
) -> FloatArray:
    """Times in ms of N steps side by side with N others: 2 N steps in, 2 N times out.

    Step n and step N + n share the memory bus; see ``Roofline.pair_ms``.
    """
    compute, memory, bus, busy, alone = step_times(
        coefficients, per_operator, by_sms, features, sms
    )
    operators, pairs = per_operator.shape[1], sms.size // 2
    total = alone.copy()
    for n in range(2 * pairs):
        other = n + pairs if n < pairs else n - pairs
        beside = 0.0
        for k in range(operators):
            beside += bus[k, other]
        beside /= max(alone[other], TINY_MS)
        for k in range(operators):
            demand = bus[k, n] / max(busy[k, n], TINY_MS) + beside
            if demand > 1.0:
                growth = 1.0 + per_operator[3, k] * (demand - 1.0)
                slowed = combined(compute[k, n], memory[k, n] * growth, per_operator[2, k])
                total[n] += slowed - busy[k, n]
    return total


@njit
def plan_totals(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
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
    alone = step_times(coefficients, per_operator, by_sms, features, sms)[4]
    lane_features, sms = np.empty((len(decode), 2 * splits)), np.empty(2 * splits, np.int64)
    for s in range(splits):
        if not 0 < decode_sms[s] < num_sms:
            raise ValueError("a decode lane must have some of the SMs, and not all")
        lane_features[:, s], lane_features[:, splits + s] = features[:, 2], features[:, 1]
        sms[s], sms[splits + s] = decode_sms[s], num_sms - decode_sms[s]
    lanes = pair_totals(coefficients, per_operator, by_sms, lane_features, sms)
    return np.concatenate((alone, lanes))


@njit
def capped_totals(
    coefficients: FloatArray,
    per_operator: FloatArray,
    by_sms: FloatArray,
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
    found[0] = step_times(coefficients, per_operator, by_sms, features, sms)[4]
    return found
