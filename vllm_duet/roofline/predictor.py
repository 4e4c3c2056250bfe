# SPDX-License-Identifier: Apache-2.0
"""Roofline: the time of a step on S SMs, and of two steps side by side.

A scheduler calls this at every step, so an operator list is compiled once into
tables of coefficients, and a forecast is one call of a compiled kernel (kernels.py)
on a few statistics of the batch (BatchSummary). ``predict`` reads the same arrays
out by operator; there is no second set of formulas.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_duet.roofline.hardware import GpuProfile
from vllm_duet.roofline.kernels import (
    LENGTHS,
    UNITS,
    Features,
    Times,
    capped_totals,
    measured_factors,
    pair_totals,
    plan_totals,
    step_times,
)
from vllm_duet.roofline.model_shape import ModelShape
from vllm_duet.roofline.operators import FEATURES, Kind, Operator, operators

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
FloatOrArray = float | FloatArray
IntOrArray = int | IntArray
_Values = tuple[float | npt.NDArray[Any], ...]
Bound = Literal["compute", "bandwidth", "overhead", "link"]

_FEATURE = {name: row for row, name in enumerate(FEATURES)}


@dataclass(frozen=True, eq=False)
class Batch:
    """The requests of one step.

    Request i computes ``query_lens[i]`` >= 1 new tokens after the
    ``context_lens[i]`` >= 0 it has in the KV cache; both are [num_requests] and
    become read-only int64 arrays. ``num_sampled`` rows go through the lm_head;
    None means one for each request, which is what vLLM computes.

    Raises:
        ValueError: empty, unequal lengths, not integers, or out of range.
    """

    query_lens: Sequence[int] | IntArray
    context_lens: Sequence[int] | IntArray
    num_sampled: int | None = None

    def __post_init__(self) -> None:
        query = _lengths("query_lens", self.query_lens)
        context = _lengths("context_lens", self.context_lens)
        if query.shape != context.shape or query.ndim != 1 or not query.size:
            raise ValueError(
                "query_lens and context_lens must be flat, of equal length and not empty,"
                f" not of shapes {query.shape} and {context.shape}"
            )
        if query.min() < 1:
            raise ValueError(f"every query length must be at least 1, not {query.min()}")
        if context.min() < 0:
            raise ValueError(f"every context length must be at least 0, not {context.min()}")
        if self.num_sampled is not None and self.num_sampled < 0:
            raise ValueError(f"num_sampled must be at least 0, not {self.num_sampled}")
        query.flags.writeable = context.flags.writeable = False
        object.__setattr__(self, "query_lens", query)
        object.__setattr__(self, "context_lens", context)


@dataclass(frozen=True, slots=True, eq=False)
class BatchSummary:
    """All that the roofline needs of a batch; summaries of two batches add up.

    Every field is a number, or an array of any shape: one entry for each candidate
    batch. Requests with one new token are *decode*, those with more *prefill*.

    ``*_kv_tokens`` is sum(c_i + q_i), the KV tokens read; ``prefill_pairs`` is
    sum(q_i (c_i + (q_i + 1)/2)), the (query, key) pairs under the causal mask (a
    decode request has as many pairs as KV tokens). ``*_window_*`` are the same
    inside the model's sliding window, and 0 where it has none.
    """

    num_sampled: FloatOrArray = 0.0
    decode_tokens: FloatOrArray = 0.0
    decode_kv_tokens: FloatOrArray = 0.0
    decode_window_kv_tokens: FloatOrArray = 0.0
    prefill_requests: FloatOrArray = 0.0
    prefill_tokens: FloatOrArray = 0.0
    prefill_pairs: FloatOrArray = 0.0
    prefill_kv_tokens: FloatOrArray = 0.0
    prefill_window_pairs: FloatOrArray = 0.0
    prefill_window_kv_tokens: FloatOrArray = 0.0

    @property
    def num_tokens(self) -> FloatOrArray:
        """New tokens of the step, sum(q_i)."""
        return self.decode_tokens + self.prefill_tokens

    @property
    def num_requests(self) -> FloatOrArray:
        """Requests of the step."""
        return self.decode_tokens + self.prefill_requests

    def __add__(self, other: BatchSummary) -> BatchSummary:
        """The summary of both batches in one step."""
        return BatchSummary(
            self.num_sampled + other.num_sampled,
            self.decode_tokens + other.decode_tokens,
            self.decode_kv_tokens + other.decode_kv_tokens,
            self.decode_window_kv_tokens + other.decode_window_kv_tokens,
            self.prefill_requests + other.prefill_requests,
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_pairs + other.prefill_pairs,
            self.prefill_kv_tokens + other.prefill_kv_tokens,
            self.prefill_window_pairs + other.prefill_window_pairs,
            self.prefill_window_kv_tokens + other.prefill_window_kv_tokens,
        )


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator's share of a step, all its runs together.

    ``ms`` is what it adds to the step. ``compute_ms`` is the time of its
    arithmetic (of a row-wise kernel: of its thread blocks) and ``bandwidth_ms``
    that of its memory traffic, each as if alone; ``overhead_ms`` is its fixed cost,
    ``link_ms`` its transfer to other ranks. ``bound`` names the largest.
    """

    name: str
    ms: float
    compute_ms: float
    bandwidth_ms: float
    overhead_ms: float
    link_ms: float
    flops: float
    bytes: float

    @property
    def bound(self) -> Bound:
        parts: dict[Bound, float] = {
            "compute": self.compute_ms,
            "bandwidth": self.bandwidth_ms,
            "overhead": self.overhead_ms,
            "link": self.link_ms,
        }
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The forecast of one step on ``num_sms`` SMs, by operator in order of execution."""

    ms: float
    num_sms: int
    operators: tuple[OperatorTime, ...]

    def explain(self) -> str:
        """A table for people: one line an operator."""
        lines = [
            f"{self.ms:.3f} ms on {self.num_sms} SMs",
            f"{'operator':<26}{'ms':>9}{'%':>6}{'GFLOP':>11}{'MB':>11}  bound by",
        ]
        for op in self.operators:
            share = 100 * op.ms / self.ms if self.ms else 0.0
            lines.append(
                f"{op.name:<26}{op.ms:>9.3f}{share:>6.1f}{op.flops / 1e9:>11.1f}"
                f"{op.bytes / 1e6:>11.1f}  {op.bound if op.ms else '-'}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class PairPrediction:
    """Two steps side by side: each alone on its SMs, and as slowed by the other."""

    decode: Prediction
    prefill: Prediction
    decode_ms: float
    prefill_ms: float

    def explain(self) -> str:
        """A table for people: the two lanes, then each alone by operator."""
        lines = [f"{'lane':<10}{'SMs':>5}{'alone ms':>11}{'beside ms':>11}{'slower':>9}"]
        for name, alone, ms in (
            ("decode", self.decode, self.decode_ms),
            ("prefill", self.prefill, self.prefill_ms),
        ):
            slower = ms / alone.ms - 1 if alone.ms else 0.0
            lines.append(f"{name:<10}{alone.num_sms:>5}{alone.ms:>11.3f}{ms:>11.3f}{slower:>9.1%}")
        return "\n".join(
            [
                *lines,
                "",
                "decode alone",
                self.decode.explain(),
                "",
                "prefill alone",
                self.prefill.explain(),
            ]
        )


class LaneFactor(NamedTuple):
    """Measured over forecast time of a decode step on a lane of ``decode_sms`` SMs, and of a
    prefill beside it on all others."""

    decode_sms: int
    decode: float
    prefill: float


class AnchorFactors(NamedTuple):
    """What measured steps make of a forecast, see ``vllm_duet.anchors``.

    ``steps`` are (tokens, factor) of a whole step; in between the logarithm of the factor is
    linear in that of the tokens, and beyond the ends the factor stays. ``decode_attention`` and
    ``prefill_attention`` are factors of those operators alone, and ``prefill_step_ms`` is what
    a step with a prefill costs beside, before the step's factor. ``lanes`` are factors, on top of
    the others, of steps side by side.
    """

    steps: tuple[tuple[int, float], ...] = ((1, 1.0),)
    decode_attention: float = 1.0
    prefill_attention: float = 1.0
    prefill_step_ms: float = 0.0
    lanes: tuple[LaneFactor, ...] = ()

    def of_step(self, tokens: FloatOrArray) -> FloatArray:
        """The factor of steps of so many tokens."""
        known, factors = np.log(np.array(self.steps)).T
        return np.asarray(np.exp(np.interp(np.log(tokens), known, factors)))

    def of(self, op: Operator) -> float:
        """The factor of one operator."""
        if op.kind is not Kind.ATTENTION:
            return 1.0
        return self.decode_attention if op.gate == "has_decode" else self.prefill_attention


NO_ANCHORS = AnchorFactors()
"""Nothing was measured: the forecast is the roofline's."""

_NO_LANE = 1.0, 1.0


class Roofline:
    """Forecasts steps of one model on one GPU (one tensor-parallel rank of it).

    Source: design.md, "Roofline, in short", after DuetServe (arXiv 2511.04791):
    t(op) = max(FLOPs / C(S), bytes / B(S)) + overhead, summed over operators and
    layers. Three refinements come from measured operators (see profiles/):

    * compute and memory time overlap only in part, t = max + u min, with
      u = ``unoverlapped``;
    * part of the compute comes in whole waves over the SMs: with W tiles, it is
      ceil(W / S) times the time of one tile;
    * what is measured of an operator over this formula, on all SMs, is a factor of its time
      on any number of them.

    Thread-safe: nothing changes after construction.
    """

    def __init__(
        self,
        shape: ModelShape,
        profile: GpuProfile,
        step_operators: Sequence[Operator] | None = None,
        anchors: AnchorFactors = NO_ANCHORS,
    ) -> None:
        """``step_operators`` are what a step consists of, in place of all of the
        model's: what was measured of operators is forecast a few at a time."""
        self.shape = shape
        self.profile = profile
        self.anchors = anchors
        self._lanes = {sms: (decode, prefill) for sms, decode, prefill in anchors.lanes}
        self.operators = tuple(step_operators or operators(shape, profile.expert_tile_rows))
        sms = np.arange(profile.num_sms + 1, dtype=np.float64)
        compute = profile.compute_fractions()
        with np.errstate(divide="ignore", invalid="ignore"):
            by_sms = np.stack(
                [
                    1 / sms,
                    1 / compute,
                    1 / profile.bandwidth_fractions(),
                    sms / (profile.num_sms * compute),
                ]
            )
        self._tables = (
            *self._compile(self.operators),
            by_sms,
            *self._lookups(self.operators),
        )
        window = shape.sliding_window
        self._window = window if shape.num_window_layers else None
        self._chunked = shape.chunked_window
        if shape.experts:
            experts = shape.experts
            miss = 1 - experts.experts_per_token / experts.num_experts
            self._num_experts = float(experts.num_experts)
            # Not -inf where k = E, as 0 tokens have to touch 0 experts.
            self._log_miss = float(np.log(max(miss, 1e-300)))
        else:
            self._num_experts, self._log_miss = 0.0, 0.0

    def anchored(self, anchors: AnchorFactors) -> Roofline:
        """The same with ``anchors`` in the place of its own."""
        return type(self)(self.shape, self.profile, self.operators, anchors)

    def _compile(self, ops: Sequence[Operator]) -> tuple[FloatArray, FloatArray]:
        """The tables ``coefficients`` and ``per_operator`` of kernels.py, all runs of an
        operator together."""
        profile, count = self.profile, len(ops)
        compute, rows, memory, overhead, link = (np.zeros((count, len(FEATURES))) for _ in range(5))
        columns, wave, unoverlapped = (np.zeros((count, 1)) for _ in range(3))
        contention, gaps = np.full((count, 1), profile.contention), np.zeros_like(overhead)
        self._flops = np.stack([op.repeats * _vector(op.flops) for op in ops])
        self._bytes = np.stack([op.repeats * _vector(op.bytes) for op in ops])
        for k, op in enumerate(ops):
            overhead[k, _FEATURE[op.gate]] = 1e-3 * op.repeats * _overhead_us(op, profile)
            if op.kind is not Kind.STEP and op.measured not in profile.factors:
                # What was measured was measured between others of its kind.
                gaps[k, _FEATURE[op.gate]] = 1e-3 * op.repeats * profile.launch_gap_us
            if op.kind is Kind.LINK:
                link[k] = 1e3 * self._bytes[k] / profile.link_bytes_per_s
            else:
                memory[k] = 1e3 * self._bytes[k] / _bytes_per_s(op, profile)
            if op.kind is Kind.ROWWISE:
                row_us = 1e6 * op.bytes["tokens"] / profile.row_bytes_per_s
                row_us += op.reductions * profile.row_reduction_us
                rows[k, _FEATURE["tokens"]] = 1 / profile.row_blocks_per_sm
                columns[k], wave[k] = 1, 1e-3 * op.repeats * row_us
            if op.kind in (Kind.GEMM, Kind.ATTENTION):
                flops_per_s = _flops_per_s(op, profile, self.shape.activation_dtype)
                whole_waves = profile.wave_fraction if op.columns else 0.0
                compute[k] = (1 - whole_waves) * 1e3 * self._flops[k] / flops_per_s
                unoverlapped[k] = profile.unoverlapped
                rows[k, _FEATURE[op.rows]] = 1 / profile.tile_rows
                columns[k] = -(-op.columns // profile.tile_columns)
                tile_flops = 2 * profile.tile_rows * profile.tile_columns * op.depth
                tile_ms = 1e3 * tile_flops * profile.num_sms / flops_per_s
                wave[k] = op.repeats * whole_waves * tile_ms
        gaps[0, _FEATURE["has_prefill"]] += self.anchors.prefill_step_ms
        self._overhead, self._link, self._gaps = overhead, link, gaps
        return (
            np.vstack([compute, rows, memory, overhead + link, gaps.sum(axis=0)]),
            np.hstack([columns, wave, unoverlapped, contention]).T.copy(),
        )

    def _lookups(self, ops: Sequence[Operator]) -> tuple[IntArray, FloatArray]:
        """The tables ``lookups`` and ``factors`` of kernels.py."""
        lookups, found = np.full((len(ops), 3), -1), [self.anchors.of_step(UNITS)]
        start = UNITS.size
        for k, op in enumerate(ops):
            table, anchored = self.profile.factors.get(op.measured), self.anchors.of(op)
            if table is None and anchored == 1.0:
                continue
            units, amount = op.units or "tokens", op.amount
            if table is None:
                amount, factors = "", np.full(UNITS.size, anchored)
            else:
                lengths = (LENGTHS,) if amount else ()
                factors = anchored * table.at(UNITS * op.units_each, *lengths, *op.at)
            lookups[k] = _FEATURE[units], _FEATURE.get(amount, -1), start
            found.append(factors.ravel())
            start += factors.size
        return lookups, np.concatenate(found)

    def summarize(self, batch: Batch) -> BatchSummary:
        """The batch's statistics, with windowed ones where the model has windows."""
        query, context = np.asarray(batch.query_lens), np.asarray(batch.context_lens)
        count = query.size
        sampled = count if batch.num_sampled is None else batch.num_sampled
        is_prefill = query > 1
        q, c = query[is_prefill], context[is_prefill]
        prefills = q.size
        decodes = count - prefills
        c_sum = int(c.sum())
        decode_kv = int(context.sum()) - c_sum + decodes
        decode_window_kv = window_pairs = window_kv = 0.0
        if self._window is not None:
            before = context[~is_prefill]
            seen = before % self._window + 1 if self._chunked else before + 1
            seen = np.minimum(seen, self._window)
            pairs_each, kv_each = _window_statistics(q, c, self._window, self._chunked)
            decode_window_kv = float(seen.sum())
            window_pairs, window_kv = float(pairs_each.sum()), float(kv_each.sum())
        if not prefills:
            return BatchSummary(sampled, decodes, decode_kv, decode_window_kv)
        q_sum = int(q.sum())
        return BatchSummary(
            sampled,
            decodes,
            decode_kv,
            decode_window_kv,
            prefills,
            q_sum,
            int(q @ c) + (int(q @ q) + q_sum) / 2,
            q_sum + c_sum,
            window_pairs,
            window_kv,
        )

    def decode_summary(self, context_lens: Sequence[int], tokens_each: int = 1) -> BatchSummary:
        """``summarize`` of one new token for each context length, without a Batch.

        With ``tokens_each``, of so many: a token and its drafts, all of which are sampled from
        one reading of the KV cache. A scheduler asks for it at every step: sums of plain ints are
        faster than arrays.
        """
        count, window_kv = len(context_lens), 0
        if self._window is not None and self._chunked:
            window_kv = sum(c % self._window + tokens_each for c in context_lens)
        elif self._window is not None:
            window_kv = sum(min(c + tokens_each, self._window) for c in context_lens)
        rows = count * tokens_each
        return BatchSummary(rows, rows, sum(context_lens) + rows, window_kv)

    def prefill_summary(
        self, query_lens: Sequence[int], context_lens: Sequence[int]
    ) -> BatchSummary:
        """``summarize`` of a few prefills, without a Batch; one token left is prefill too."""
        pairs = window_pairs = 0.0
        kv_tokens = window_kv_tokens = 0
        for q, c in zip(query_lens, context_lens, strict=True):
            pairs += q * (c + (q + 1) / 2)
            kv_tokens += c + q
            if self._window is not None and self._chunked:
                c %= self._window
                window_pairs += _chunk_pairs(c + q, self._window) - c * (c + 1) / 2
                window_kv_tokens += c + q
            elif self._window is not None:
                a = min(max(self._window - c, 0), q)  # as in _window_statistics
                window_pairs += a * (c + (a + 1) / 2) + (q - a) * self._window
                window_kv_tokens += min(c + q, q + self._window - 1)
        count, tokens = len(query_lens), sum(query_lens)
        return BatchSummary(
            num_sampled=count,
            prefill_requests=count,
            prefill_tokens=tokens,
            prefill_pairs=pairs,
            prefill_kv_tokens=kv_tokens,
            prefill_window_pairs=window_pairs,
            prefill_window_kv_tokens=window_kv_tokens,
        )

    def prefill_chunk_summary(
        self, chunk_tokens: IntOrArray, context_len: IntOrArray
    ) -> BatchSummary:
        """The next ``chunk_tokens`` tokens of one prefill after ``context_len``.

        Both broadcast; fields take their shape. A chunk of 0 is no work at all. A
        chunk of 1 counts as prefill here, where ``summarize`` takes it for a decode.
        """
        chunk = np.asarray(chunk_tokens, dtype=np.float64)
        context = np.asarray(context_len, dtype=np.float64)
        some = (chunk > 0).astype(np.float64)
        window_pairs: FloatOrArray = 0.0
        window_kv: FloatOrArray = 0.0
        if self._window is not None:
            window_pairs, window_kv = _window_statistics(
                chunk, context, self._window, self._chunked
            )
            window_kv = window_kv * some
        return BatchSummary(
            num_sampled=some,
            prefill_requests=some,
            prefill_tokens=chunk,
            prefill_pairs=chunk * (context + (chunk + 1) / 2),
            prefill_kv_tokens=(context + chunk) * some,
            prefill_window_pairs=window_pairs,
            prefill_window_kv_tokens=window_kv,
        )

    def step_ms(self, summary: BatchSummary, num_sms: int | IntArray) -> FloatOrArray:
        """Time of one step alone on ``num_sms`` SMs, in ms.

        ``num_sms`` and the summary's fields broadcast against each other; the
        result has their common shape, and is a float where all are numbers.

        Raises:
            ValueError: ``num_sms`` is not within 1..the GPU's.
        """
        times, shape = self._times(summary, num_sms)
        return _shaped(times[4], shape)

    def operator_times(self, summary: BatchSummary, num_sms: int | IntArray) -> Times:
        """What :meth:`step_ms` adds up, as ``kernels.step_times`` returns it, steps flattened."""
        return self._times(summary, num_sms)[0]

    def _times(
        self, summary: BatchSummary, num_sms: int | IntArray
    ) -> tuple[Times, tuple[int, ...]]:
        values, sms = self._feature_values(summary), np.asarray(num_sms)
        shape = _common_shape(values, sms)
        features = np.empty((len(FEATURES), *shape))
        _fill(features, values)
        sms = self._checked(np.broadcast_to(sms, shape))
        return step_times(*self._tables, features.reshape(len(FEATURES), -1), sms), shape

    def pair_ms(
        self,
        decode: BatchSummary,
        prefill: BatchSummary,
        decode_sms: int | IntArray,
        prefill_sms: int | IntArray,
    ) -> tuple[FloatOrArray, FloatOrArray]:
        """Times of two steps side by side on disjoint SM groups, in ms: (decode, prefill).

        Broadcasts as :meth:`step_ms`. SM groups do not divide bandwidth. Alone,
        operator k of a lane takes the share d_k of the memory bus while it runs,
        and the other lane takes D on average. Where d_k + D > 1 the memory time of k
        grows by 1 + c (d_k + D - 1), with c = the profile's ``contention``; its
        arithmetic does not. At c = 1 both are served in proportion. Source:
        design.md, "Roofline, in short" (demands add up); the sharing rule is an
        assumption, and c its measure on a GPU.

        Raises:
            ValueError: a group is not within 1..the GPU's SMs.
        """
        decode_values, prefill_values = map(self._feature_values, (decode, prefill))
        first, second = np.asarray(decode_sms), np.asarray(prefill_sms)
        shape = _common_shape(decode_values + prefill_values, first, second)
        # Both lanes go through as one array of steps; they are axis 1.
        features = np.empty((len(FEATURES), 2, *shape))
        _fill(features[:, 0], decode_values)
        _fill(features[:, 1], prefill_values)
        sms = np.empty((2, *shape), dtype=np.int64)
        sms[0], sms[1] = first, second
        flat = features.reshape(len(FEATURES), -1)
        total = pair_totals(*self._tables, flat, self._checked(sms)).reshape(2, -1)
        if self._lanes:
            lanes = np.array([self._lanes.get(n, _NO_LANE) for n in sms[0].ravel().tolist()])
            total *= lanes.T
        return _shaped(total[0], shape), _shaped(total[1], shape)

    def plan_ms(
        self, decode: BatchSummary, prefill: BatchSummary, decode_sms: IntArray
    ) -> tuple[float, float, float, list[float], list[float]]:
        """All the times a policy compares, in one pass, in ms.

        Returns the mixed step, the prefill alone and the decodes alone, on all SMs, and
        of the splits with ``decode_sms`` [S] SMs for decode and the rest for prefill,
        the times of both lanes [S], as :meth:`pair_ms` gives them. The summaries'
        fields are numbers, and neither summary is empty.

        Raises:
            ValueError: a decode lane leaves no SM for prefill, or has none.
        """
        times = plan_totals(
            *self._tables,
            self._features(decode),
            self._features(prefill),
            decode_sms,
            self._num_experts,
            self._log_miss,
        )
        mixed_ms, prefill_ms, decode_ms, *lanes = times.tolist()
        splits = decode_sms.size
        steps_ms, prefills_ms = lanes[:splits], lanes[splits:]
        if self._lanes:
            for n, sms in enumerate(decode_sms.tolist()):
                of_decode, of_prefill = self._lanes.get(sms, _NO_LANE)
                steps_ms[n] *= of_decode
                prefills_ms[n] *= of_prefill
        return mixed_ms, prefill_ms, decode_ms, steps_ms, prefills_ms

    def capped_ms(
        self,
        decode: BatchSummary,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        sizes: IntArray,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Mixed steps with only the first ``sizes`` [N] tokens of the prefills, in ms.

        The prefills are taken in order, on all SMs. Also returns the prefill tokens and
        the (query, key) pairs of each [N]. A prompt with one token left counts as
        prefill, as plan.split_output has it.
        """
        ms, tokens, pairs = capped_totals(
            *self._tables,
            self._features(decode),
            np.array([query_lens, context_lens]),
            sizes,
            self._window or 0,
            self._chunked,
            self._num_experts,
            self._log_miss,
        )
        return ms, tokens, pairs

    def predict(self, batch: Batch, num_sms: int) -> Prediction:
        """Time of one step alone on ``num_sms`` SMs, by operator.

        Equals :meth:`step_ms` of the batch's summary.

        Raises:
            ValueError: ``num_sms`` is not within 1..the GPU's.
        """
        features = np.array(self._features(self.summarize(batch)))
        compute, memory, _, busy, total = step_times(
            *self._tables, features[:, None], self._checked(np.array([num_sms]))
        )
        factors = measured_factors(*self._tables[3:], features[:, None])[:, 0]
        overhead, link, gaps, flops, moved = (
            matrix @ features
            for matrix in (self._overhead, self._link, self._gaps, self._flops, self._bytes)
        )
        of_step, factors = factors[-1], factors[:-1]
        overhead, link = factors * overhead + of_step * gaps, factors * link
        times = tuple(
            OperatorTime(op.name, *map(float, numbers))
            for op, *numbers in zip(
                self.operators,
                busy[:, 0] + overhead + link,
                compute[:, 0],
                memory[:, 0],
                overhead,
                link,
                flops,
                moved,
                strict=True,
            )
        )
        return Prediction(float(total[0]), num_sms, times)

    def predict_pair(
        self, decode_batch: Batch, prefill_batch: Batch, decode_sms: int, prefill_sms: int
    ) -> PairPrediction:
        """Two steps side by side, each also alone and by operator; see :meth:`pair_ms`.

        Raises:
            ValueError: the two groups do not fit the GPU.
        """
        if decode_sms + prefill_sms > self.profile.num_sms:
            raise ValueError(
                f"groups of {decode_sms} and {prefill_sms} SMs do not fit"
                f" {self.profile.name}'s {self.profile.num_sms}"
            )
        decode_ms, prefill_ms = self.pair_ms(
            self.summarize(decode_batch), self.summarize(prefill_batch), decode_sms, prefill_sms
        )
        return PairPrediction(
            self.predict(decode_batch, decode_sms),
            self.predict(prefill_batch, prefill_sms),
            float(decode_ms),
            float(prefill_ms),
        )

    def _checked(self, sms: IntArray) -> IntArray:
        """SM counts, flattened. Numba reads beside an array without a word."""
        listed = sms.ravel().tolist()
        if min(listed) < 1 or max(listed) > self.profile.num_sms:
            wrong = next(s for s in listed if not 1 <= s <= self.profile.num_sms)
            raise ValueError(f"num_sms must be within 1..{self.profile.num_sms}, not {wrong}")
        return sms.reshape(-1)

    def _features(self, summary: BatchSummary) -> Features:
        """[F] of a summary of numbers; a kernel is given a tuple sooner than an array."""
        values: Any = self._feature_values(summary)
        return tuple(map(float, values))

    def _feature_values(self, s: BatchSummary) -> _Values:
        """The summary in the order of FEATURES."""
        tokens = s.num_tokens
        experts: FloatOrArray = 0.0
        if self._num_experts:
            # 1 - (1 - k/E)^T, precise where T k/E is small.
            experts = -self._num_experts * np.expm1(tokens * self._log_miss)
        return (
            tokens > 0,
            tokens,
            s.num_sampled,
            s.decode_tokens > 0,
            s.decode_tokens,
            s.decode_kv_tokens,
            s.decode_window_kv_tokens,
            s.prefill_tokens > 0,
            s.prefill_tokens,
            s.prefill_pairs,
            s.prefill_kv_tokens,
            s.prefill_window_pairs,
            s.prefill_window_kv_tokens,
            experts,
        )


def _vector(amounts: Mapping[str, float]) -> FloatArray:
    """Amounts by feature, in the order of FEATURES."""
    return np.array([amounts.get(name, 0.0) for name in FEATURES], dtype=np.float64)


def _bytes_per_s(op: Operator, profile: GpuProfile) -> float:
    """Memory bandwidth the operator reaches on the whole GPU."""
    attention = op.kind is Kind.ATTENTION
    fraction = profile.attention_hbm_fraction if attention else profile.hbm_fraction
    return profile.hbm_bytes_per_s * fraction


def _flops_per_s(op: Operator, profile: GpuProfile, activation_dtype: str) -> float:
    """Arithmetic rate the operator reaches on the whole GPU."""
    attention = op.kind is Kind.ATTENTION
    fraction = profile.attention_fraction if attention else profile.gemm_fraction
    return profile.peak_flops_per_s(op.dtype, activation_dtype) * fraction


def _overhead_us(op: Operator, profile: GpuProfile) -> float:
    """Fixed cost of one run."""
    if op.kind is Kind.STEP:
        return profile.step_overhead_us
    return {
        Kind.GEMM: profile.gemm_overhead_us,
        Kind.ATTENTION: profile.attention_overhead_us,
        Kind.ROWWISE: profile.rowwise_overhead_us,
        Kind.STREAM: profile.rowwise_overhead_us,
        Kind.LINK: profile.link_latency_us,
    }[op.kind]


def _lengths(name: str, given: Sequence[int] | IntArray) -> IntArray:
    """A copy as int64."""
    if isinstance(given, np.ndarray) and given.dtype.kind in "iu":
        return given.astype(np.int64)
    try:
        # Twice as fast on a list as np.array, and takes integers only.
        return np.frombuffer(array("q", given), dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name} must hold integers") from error


def _window_statistics(
    query: IntArray | FloatArray, context: IntArray | FloatArray, window: int, chunked: bool
) -> tuple[FloatArray, FloatArray]:
    """(pairs, KV tokens) of each request under a window of w tokens.

    Sliding: query j = 1..q sees min(c + j, w) keys: the first a = clip(w - c, 0, q) see all,
    hence pairs = a (c + (a + 1)/2) + (q - a) w. Together they read the last
    min(c + q, q + w - 1) tokens. Chunked: query j sees the (c + j - 1) mod w + 1 keys since the
    last multiple of w, and together they read q + c mod w. Source: arithmetic.
    """
    if chunked:
        start = context % window
        pairs = _chunk_pairs(start + query, window) - start * (start + 1) / 2
        return pairs, (start + query).astype(np.float64)
    a = np.clip(window - context, 0, query)
    pairs = a * (context + (a + 1) / 2) + (query - a) * window
    return pairs, np.minimum(context + query, query + window - 1).astype(np.float64)


def _chunk_pairs(tokens: Any, window: int) -> Any:
    """Pairs of the first ``tokens``, each with those of its chunk up to itself."""
    rest = tokens % window
    return tokens // window * (window * (window + 1) / 2) + rest * (rest + 1) / 2


def _common_shape(values: _Values, *sms: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """The shape that all broadcast to."""
    shapes = {value.shape for value in values if isinstance(value, np.ndarray)}
    shapes.update(s.shape for s in sms)
    shapes.discard(())
    if len(shapes) > 1:
        # As slow as all the rest of a forecast, so only where it is needed.
        return np.broadcast_shapes(*shapes)
    return shapes.pop() if shapes else ()


def _fill(features: FloatArray, values: _Values) -> None:
    """Set features [F, ...] to F values, each broadcast."""
    if any(isinstance(value, np.ndarray) for value in values):
        for row, value in enumerate(values):
            features[row] = value
    else:
        features.T[...] = values


def _shaped(values: FloatArray, shape: tuple[int, ...]) -> FloatOrArray:
    return values.reshape(shape) if shape else float(values[0])
