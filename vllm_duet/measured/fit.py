# SPDX-License-Identifier: Apache-2.0
"""Makes the shipped GPU profiles anew of operator times that NVIDIA measured.

    python -m vllm_duet.measured.fit [GPU...]     # writes vllm_duet/profiles/GPU.yaml
    python -m vllm_duet.measured.fit --errors eval/results/validation/operators.json [GPU...]

The formula's constants come first, by least squares, then tables of what the formula is off by,
each in the roofline's own terms: the same code forecasts here and in the scheduler. A quarter of
all shapes is held out, chosen by a hash of the shape; ``--errors`` says how far off they are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy import optimize, sparse
from scipy.sparse.linalg import spsolve

from vllm_duet.measured import tables
from vllm_duet.roofline import (
    BatchSummary,
    ExpertShape,
    GpuProfile,
    ModelShape,
    Operator,
    Roofline,
    operators,
)
from vllm_duet.roofline.hardware import FOLDER, FactorTable
from vllm_duet.roofline.model_shape import WEIGHT_BYTES
from vllm_duet.roofline.operators import attention_decode, attention_prefill, linear

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

L2_BYTES: Mapping[str, float] = {
    "a100-sxm-80g": 40e6,
    "h100-sxm": 50e6,
    "h200": 50e6,
    "b200": 126e6,
    "b300": 126e6,
    "l40s": 96e6,
    "rtx-pro-6000": 128e6,
}
"""Source: NVIDIA's datasheets and architecture whitepapers."""

SHAPE = ModelShape(
    architecture="",
    hidden_size=4096,
    num_layers=1,
    vocab_size=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=4096,
    tied_embeddings=True,
    activation_dtype="bfloat16",
    weight_dtype="bfloat16",
    kv_dtype="bfloat16",
)
"""A layer to take operators from; only what an operator is made of matters."""


@dataclass(frozen=True)
class Series:
    """One shape of an operator, and its measured times [N] at N sizes of the batch.

    Two things of a benchmark are not so in a step of a model. ``l2_bytes`` [N] is what it reads
    again in each of its runs, out of the L2 cache where that is large enough; a step reads it
    from memory. And a run takes no less than ``host_ms`` [N] where the CPU launches it,
    kernel by kernel; a step is a CUDA graph, or has launches waiting.
    """

    table: str
    shape: str
    operators: tuple[Operator, ...]
    summary: BatchSummary
    sizes: Mapping[str, FloatArray]
    l2_bytes: FloatArray
    ms: FloatArray
    host_ms: FloatArray | float = 0.0
    model: ModelShape = SHAPE

    @property
    def kind(self) -> str:
        return self.table.split()[0]

    @property
    def held_out(self) -> bool:
        return _held_out(self.shape)

    @property
    def plain(self) -> bool:
        """What the constants are fitted to: bf16, no window, no small product."""
        names = {"gemm bfloat16", "prefill attention bfloat16", "decode attention bfloat16"}
        sides = [self.sizes[side][0] for side in ("columns", "depth") if side in self.sizes]
        return self.table in names and min(sides, default=LARGE) >= LARGE

    def only(self, table: str, others: bool = False) -> Series:
        """Of its operators those that have the factors of ``table``, or the others."""
        ops = tuple(op for op in self.operators if (op.measured == table) is not others)
        return replace(self, operators=ops)

    @property
    def shows_the_gpu(self) -> BoolArray:
        """[N]: where it is not the CPU's time."""
        return np.asarray(self.ms > 1.5 * self.host_ms)


def _held_out(shape: str) -> bool:
    return zlib.crc32(shape.encode()) % 4 == 0


@dataclass(frozen=True)
class Warmth:
    """How far a benchmark finds its data in L2: up to ``share`` of the cache's size it takes
    ``ratio`` of the time of reading it from memory. The end is the sharper, the larger ``edge``
    is: products take turns with several weights, attention reads one KV cache again."""

    share: float = 1.0
    ratio: float = 1.0
    edge: float = 8.0


def gemms(gpu: str) -> list[Series]:
    """Matrix products of at least MIN_SIZE columns and depth."""
    found = []
    data = tables.read(gpu, "gemm")
    data = data[(data.n >= MIN_SIZE) & (data.k >= MIN_SIZE)]
    for dtype, of_dtype in data.groupby("gemm_dtype"):
        host_ms = _host_ms(of_dtype) if dtype in LAUNCHED_BY_THE_CPU else {}
        for (n, k), rows in of_dtype.groupby(["n", "k"]):
            m = rows.m.to_numpy(np.float64)
            series = gemm(dtype, m, n, k, rows.ms.to_numpy(np.float64))
            found.append(replace(series, host_ms=np.array([host_ms.get(x, 0.0) for x in m])))
    return found


def gemm(dtype: str, m: FloatArray, n: int, k: int, ms: FloatArray) -> Series:
    """Products of m rows, n columns and depth k."""
    op = linear("gemm", replace(SHAPE, weight_dtype=dtype), k, n, 1)
    return Series(
        op.measured,
        f"{n} x {k}",
        (op,),
        BatchSummary(prefill_requests=1, prefill_tokens=m),
        {"rows": m, "columns": np.full_like(m, n), "depth": np.full_like(m, k)},
        np.full_like(m, op.bytes["step"]),
        ms,
    )


LAUNCHED_BY_THE_CPU = ("fp8_block",)
"""vLLM's kernels for block-scaled weights were not timed in CUDA graphs: on a B200 a product of
any size below 8192 rows takes the same 175 us, and 55 more where the rows are no multiple of 4."""


def _host_ms(data: pd.DataFrame) -> dict[float, float]:
    """By rows, the time of products too small to take any on the GPU."""
    small = data[data.n * data.k <= 2**20]
    small = small[[not _held_out(f"{n} x {k}") for n, k in zip(small.n, small.k, strict=True)]]
    found = small.groupby("m").ms.median()
    return {float(m): float(ms) for m, ms in found.items() if m <= 4608}


MIN_SIZE = 256
"""Smaller ones are left to the formula."""

LARGE = 1024
"""From here on both ways, errors count."""


def attentions(gpu: str, phase: str) -> list[Series]:
    """Attention of whole prompts (prefill) or of one new token after a context (decode)."""
    prefill = phase == "prefill"
    data = tables.read(gpu, "context_attention" if prefill else "generation_attention")
    if prefill:
        data = data[data.isl > 1]  # vLLM runs one token as decode
    keys = ["num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype"]
    return [
        attention(
            phase,
            h,
            g,
            d,
            window,
            kv_dtype,
            rows.batch_size.to_numpy(np.float64),
            rows.isl.to_numpy(np.float64) if prefill else rows.step.to_numpy(np.float64) + 1,
            rows.ms.to_numpy(np.float64),
        )
        for (h, g, d, window, kv_dtype), rows in data.groupby(keys)
    ]


def attention(
    phase: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    kv_dtype: str,
    requests: FloatArray,
    tokens: FloatArray,
    ms: FloatArray,
) -> Series:
    """``requests`` [N] of ``tokens`` [N] each; of no window where that is 0."""
    shape = replace(
        SHAPE,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_dtype=kv_dtype,
        sliding_window=window,
        num_window_layers=1 if window else 0,
    )
    seen = np.minimum(tokens, window) if window else tokens
    prefix = "window_" if window else ""
    if phase == "prefill":
        op = attention_prefill(shape, 1, prefix)
        length, kv_tokens = seen * (seen + 1) / 2 / tokens + (tokens - seen) * seen / tokens, tokens
        units = requests * tokens * heads
        summary = BatchSummary(
            prefill_requests=requests,
            prefill_tokens=requests * tokens,
            prefill_pairs=requests * tokens * length,
            prefill_kv_tokens=requests * tokens,
            prefill_window_pairs=requests * tokens * length,
            prefill_window_kv_tokens=requests * tokens,
        )
    else:
        op = attention_decode(shape, 1, prefix)
        length, kv_tokens, units = seen, seen, requests * kv_heads
        summary = BatchSummary(
            decode_tokens=requests,
            decode_kv_tokens=requests * seen,
            decode_window_kv_tokens=requests * seen,
        )
    return Series(
        op.measured,
        f"{heads} heads, {kv_heads} KV heads",
        (op,),
        summary,
        {
            "units": units,
            "length": length,
            "group": np.full_like(units, heads / kv_heads),
            "head_dim": np.full_like(units, head_dim),
            "window": np.full_like(units, window),
            "tokens": requests * tokens,
        },
        requests * kv_tokens * 2 * kv_heads * head_dim * shape.kv_element_bytes,
        ms,
    )


def experts(gpu: str) -> list[Series]:
    """All kernels of a layer's routed experts, without expert parallelism, by load."""
    names = {theirs: ours for ours, theirs in tables.EXPERT_DTYPES.items()}
    data = tables.read(gpu, "moe")
    wide = data.inter_size >= MIN_WIDTH * data.moe_tp_size
    data = data[(data.moe_ep_size == 1) & wide].assign(moe_dtype=data.moe_dtype.replace(names))
    data = data[data.moe_dtype.isin(WEIGHT_BYTES)]
    keys = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size"]
    return [
        mixture(
            dtype, load, h, n // tp, k, e, rows.num_tokens.to_numpy(np.float64), rows.ms.to_numpy()
        )
        for (dtype, load, h, n, k, e, tp), rows in data.groupby(
            ["moe_dtype", "distribution", *keys]
        )
    ]


def mixture(
    dtype: str,
    load: str,
    hidden: int,
    width: int,
    k: int,
    e: int,
    tokens: FloatArray,
    ms: FloatArray,
) -> Series:
    """``tokens`` [N], each through k of e experts."""
    shape = replace(
        SHAPE,
        hidden_size=hidden,
        weight_dtype=dtype,
        intermediate_size=0,
        experts=ExpertShape(1, e, k, width, load=load),
    )
    ops = operators.experts(shape, EXPERT_TILE_ROWS)
    own = tuple(op for op in ops if op.measured.startswith("experts"))
    return Series(
        own[0].measured,
        f"{k} of {e} experts, {hidden} x {width}",
        own,
        BatchSummary(prefill_requests=1, prefill_tokens=tokens),
        {
            "rows": tokens * k,
            "experts": np.full_like(tokens, e),
            "width": np.full_like(tokens, width),
            "hidden": np.full_like(tokens, hidden),
            "tokens": tokens,
        },
        np.zeros_like(tokens),
        ms,
        model=shape,
    )


MIN_WIDTH = 128
"""Of an expert on one rank; the tables go on to 16, which is tensor parallelism nobody uses."""

EXPERT_TILE_ROWS = 64
"""As in every profile."""


def latent_attentions(gpu: str, phase: str) -> list[Series]:
    """DeepSeek-V3's attention with all its projections, in bf16, of whole prompts or decodes."""
    prefill = phase == "prefill"
    try:
        data = tables.read(gpu, "mla_context_module" if prefill else "mla_generation_module")
    except tables.NotMeasuredError:
        return []
    # Where several kernels were timed, the fastest; quantized products were timed outside of
    # graphs, see LAUNCHED_BY_THE_CPU.
    data = data[(data.gemm_type == "bfloat16") & ((data.isl > 1) if prefill else True)]
    data = data.groupby(
        ["num_heads", "kv_cache_dtype", "batch_size", "isl", "step"], as_index=False
    )
    return [
        latent_attention(
            phase,
            heads,
            kv_dtype,
            rows.batch_size.to_numpy(np.float64),
            (rows.isl if prefill else rows.step + 1).to_numpy(np.float64),
            rows.ms.to_numpy(),
        )
        for (heads, kv_dtype), rows in data.ms.min().groupby(["num_heads", "kv_cache_dtype"])
    ]


def latent_attention(
    phase: str, heads: int, kv_dtype: str, requests: FloatArray, tokens: FloatArray, ms: FloatArray
) -> Series:
    """``requests`` [N] of ``tokens`` [N] each."""
    shape = replace(
        SHAPE,
        hidden_size=tables.LATENT_HIDDEN_SIZE,
        num_heads=heads,
        num_kv_heads=heads,
        kv_dtype=kv_dtype,
        latent=tables.LATENT,
    )
    if phase == "prefill":
        length, units = (tokens + 1) / 2, requests * tokens
        summary = BatchSummary(
            prefill_requests=requests,
            prefill_tokens=units,
            prefill_pairs=units * length,
            prefill_kv_tokens=units,
        )
    else:
        length, units = tokens, requests
        summary = BatchSummary(decode_tokens=requests, decode_kv_tokens=requests * tokens)
    return Series(
        f"mla_{phase} {shape.kernel_kv_dtype}",
        f"{heads} latent heads",
        tuple(operators.latent_attention(shape)),
        summary,
        {
            "units": units,
            "length": length,
            "heads": np.full_like(units, heads),
            "tokens": requests * tokens,
        },
        np.zeros_like(units),
        ms,
        model=shape,
    )


def all_reduces(gpu: str) -> list[Series]:
    """vLLM's own kernel in a CUDA graph, and NCCL beyond what that takes."""
    custom, nccl = tables.read(gpu, "custom_allreduce"), tables.read(gpu, "nccl")
    custom = custom[custom.backend == "vllm_graph"]
    nccl = nccl[(nccl.op_name == "all_reduce") & (nccl.nccl_dtype == "half")]
    most = tables.CUSTOM_ALL_REDUCE_BYTES // tables.COLLECTIVE_ELEMENT_BYTES
    both = pd.concat([custom[custom.message_size <= most], nccl[nccl.message_size > most]])
    sizes = tables.COLLECTIVE_ELEMENT_BYTES * both.message_size
    return [
        all_reduce(int(gpus), np.array([size], np.float64), np.array([ms]))
        for gpus, size, ms in zip(both.num_gpus, sizes, both.ms, strict=True)
        if size >= LEAST_BYTES
    ]


LEAST_BYTES = 4096
"""One token of a hidden state of 2048."""


def all_reduce(num_gpus: int, size: FloatArray, ms: FloatArray) -> Series:
    """Sums of ``size`` [N] bytes over ``num_gpus``."""
    shape = replace(SHAPE, hidden_size=64, num_layers=0, tensor_parallel_size=num_gpus)
    op = operators.all_reduce(shape)
    return Series(
        op.measured,
        f"{size[0]:.0f} bytes over {num_gpus}",
        (op,),
        BatchSummary(prefill_requests=1, prefill_tokens=size / op.units_each),
        {"bytes": size},
        np.zeros_like(size),
        ms,
    )


AXES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "gemm": {
        "rows": (
            *(1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 96, 128, 129, 192, 256, 257, 512, 513, 768, 769),
            *(1024, 1025, 1280, 1281, 1536, 1537, 2048, 2049, 3072, 4096, 8192, 16384, 32768),
        ),
        "columns": (256, 1024, 2048, 4096, 8192, 16384, 65536),
        "depth": (256, 1024, 2048, 4096, 8192, 16384, 65536),
    },
    "decode": {
        "units": tuple(4.0**i for i in range(8)),
        "length": tuple(2.0 * 4.0**i for i in range(9)),
        "group": (1, 4, 16, 96),
        "head_dim": (64, 128, 192, 256, 512),
    },
    "experts": {
        "rows": tuple(4.0**i for i in range(10)),
        "experts": (8, 32, 128, 512),
        "width": (128, 512, 2048, 16384),
        "hidden": (2048, 7168),
    },
    "mla_decode": {
        "units": tuple(2.0**i for i in range(0, 11)),
        "length": tuple(2.0 * 4.0**i for i in range(9)),
        "heads": (1, 4, 16, 128),
    },
    "mla_prefill": {
        "units": tuple(16.0 * 4.0**i for i in range(8)),
        "length": tuple(8.0 * 4.0**i for i in range(7)),
        "heads": (1, 4, 16, 128),
    },
    "all_reduce": {"bytes": tuple(2.0**i for i in range(12, 29))},
    "prefill": {
        "units": tuple(8.0 * 8.0**i for i in range(8)),
        "length": tuple(2.0 * 4.0**i for i in range(7)),
        "group": (1, 4, 16, 96),
        "head_dim": (64, 128, 192, 256, 512),
    },
}
"""Axes of the tables, by the first word of their name."""

_WINDOWED = {
    "length": (2, 16, 64, 128, 512, 1024, 8192),
    "group": (1, 8, 96),
    "head_dim": (64, 128, 256),
    "window": (128, 1024),
}
IN_A_WINDOW: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "decode": _WINDOWED,
    "prefill": {"units": tuple(8.0 * 4.0**i for i in range(11)), **_WINDOWED},
}
"""The same within a window, where nobody sees more than the window."""

STIFFNESS = 0.5
"""Weight of bends in a table against the errors of single times, each in units of one."""

FLATNESS = 0.05
"""The same of slopes: where nothing was measured a table goes on level."""

LOOSE = {"head_dim": 0.1, "window": 0.1}
"""The same along axes where one value's kernel may not be the next one's."""


def forecast(
    profile: GpuProfile, series: Series, warmth: Warmth = Warmth(), l2: float = 1.0
) -> FloatArray:
    """Times [N] in ms that the roofline forecasts under the conditions of the benchmark."""
    roofline = Roofline(series.model, profile, series.operators)
    compute, memory, _, busy, total = roofline.operator_times(series.summary, profile.num_sms)
    if warmth.ratio < 1:
        [unoverlapped] = {float(u) for u in roofline._tables[1][2]}
        warm = 1 / (1 + (series.l2_bytes / (warmth.share * l2)) ** warmth.edge)
        memory = memory * (1 - (1 - warmth.ratio) * warm)
        combine = np.maximum(compute, memory) + unoverlapped * np.minimum(compute, memory)
        total = total + (combine - busy).sum(axis=0)
    return np.maximum(total, series.host_ms)


def fit_constants(
    profile: GpuProfile,
    series: Sequence[Series],
    bounds: Mapping[str, tuple[float, float, float]],
    l2: float,
) -> tuple[GpuProfile, Warmth]:
    """The profile with the fields of ``bounds`` set by robust least squares."""

    def at(values: FloatArray) -> tuple[GpuProfile, Warmth]:
        changed = dict(zip(bounds, map(float, values), strict=False))
        return replace(profile, **changed), Warmth(*map(float, values[-2:]))  # type: ignore[arg-type]

    def residuals(values: FloatArray) -> FloatArray:
        found, warmth = at(values)
        return np.concatenate([np.log(forecast(found, s, warmth, l2) / s.ms) for s in series])

    low, start, high = np.array([*bounds.values(), (0.03, 0.2, 1.5), (0.1, 0.4, 1.0)]).T
    fitted = optimize.least_squares(
        residuals,
        start,
        bounds=(low, high),
        x_scale=high - low,
        diff_step=1e-3,
        loss="soft_l1",
        f_scale=0.1,
        max_nfev=20,
    )
    return at(fitted.x)


def fit_warmth(profile: GpuProfile, series: Sequence[Series], l2: float) -> Warmth:
    """That under which a table describes attention's times best.

    The formula alone does not show it: what else it lacks is larger.
    """

    def error(warmth: Warmth) -> float:
        axes, sizes = AXES["decode"], _sizes(series)
        logs = np.concatenate([np.log(s.ms / forecast(profile, s, warmth, l2)) for s in series])
        found = np.log(fit_table("decode", axes, sizes, logs).permille.ravel() / 1000)
        return float(np.abs(_interpolation(axes, sizes) @ found - logs).mean())

    tried = [
        Warmth(share, ratio, edge=20)
        for share in (0.7, 0.9, 1.1, 1.3)
        for ratio in (0.25, 0.35, 0.5)
    ]
    return min([Warmth(), *tried], key=error)


def _sizes(series: Sequence[Series]) -> dict[str, FloatArray]:
    """All their sizes, one after the other."""
    return {key: np.concatenate([s.sizes[key] for s in series]) for key in series[0].sizes}


def fit_table(
    name: str,
    axes: Mapping[str, tuple[float, ...]],
    sizes: Mapping[str, FloatArray],
    log_factors: FloatArray,
    source: str = "",
    prior: FactorTable | None = None,
    formula_ms: FloatArray | None = None,
) -> FactorTable:
    """The table that is nearest to ``log_factors`` [N] at ``sizes``, and smooth.

    With a ``prior``, ``log_factors`` are beyond it, and pulled to 0 where nothing was measured.
    With ``formula_ms``, the formula's times where the table stands, its own do not fall.

    Minimises the mean absolute error (by reweighted least squares) and the squares of first and
    second differences along each axis.
    """
    shape = tuple(map(len, axes.values()))
    design = _interpolation(axes, sizes)
    rough = []
    for d, (axis, values) in enumerate(axes.items()):
        x = np.log2(values)
        slopes = sparse.diags([-1.0, 1.0], [0, 1], shape=(len(x) - 1, len(x))).tocsr()
        for differences in (LOOSE.get(axis, STIFFNESS) * _bends(x), FLATNESS * slopes):
            before, after = (sparse.identity(int(np.prod(n))) for n in (shape[:d], shape[d + 1 :]))
            rough.append(sparse.kron(sparse.kron(before, differences), after))
    bends = sparse.vstack(rough)
    pull = 0.1 if prior else 1e-4
    smooth = bends.T @ bends + pull * sparse.identity(design.shape[1])
    weights = np.ones(len(log_factors))
    for _ in range(4):
        normal = design.T @ sparse.diags(weights) @ design + smooth
        found = spsolve(normal.tocsc(), design.T @ (weights * log_factors))
        weights = 0.05 / np.maximum(np.abs(design @ found - log_factors), 0.02)
    found = found.reshape(shape) + (np.log(prior.permille / 1000) if prior else 0.0)
    if formula_ms is not None:
        seen = np.asarray(design.sum(axis=0)).reshape(shape) + 1e-3
        # A longer context costs a decode more; a longer prompt may cost less than two short ones.
        rising = [0, 1] if name.startswith(("decode", "mla_decode")) else [0]
        found = _risen(found + np.log(formula_ms), seen, rising) - np.log(formula_ms)
    permille = np.clip(np.rint(1000 * np.exp(found)), 1, None).astype(np.int64)
    return FactorTable({k: tuple(map(float, v)) for k, v in axes.items()}, permille, source)


def _risen(log_ms: FloatArray, weights: FloatArray, axes: list[int]) -> FloatArray:
    """The nearest that does not fall along any of ``axes``, by isotonic regression in turns.

    More work never takes less time, or a scheduler would ask for it: noise is levelled, and so is
    what is real, as a B200's one row in fp8, which takes twice as long as two.
    """
    for axis in axes * 5:
        x, w = np.moveaxis(log_ms, axis, -1), np.moveaxis(weights, axis, -1)
        risen = [
            optimize.isotonic_regression(a, weights=b).x
            for a, b in zip(x.reshape(-1, x.shape[-1]), w.reshape(-1, x.shape[-1]), strict=True)
        ]
        log_ms = np.moveaxis(np.reshape(risen, x.shape), -1, axis)
    return log_ms


def formula_at(profile: GpuProfile, name: str, axes: Mapping[str, tuple[float, ...]]) -> FloatArray:
    """Times in ms, without factors, where a table stands."""
    values = [np.array(x, dtype=np.float64) for x in axes.values()]
    dtype = name.split()[-1]
    if name.startswith("gemm"):
        rows, columns, depth = values
        found = [
            forecast(profile, gemm(dtype, rows, int(n), int(k), rows))
            for n in columns
            for k in depth
        ]
        return np.moveaxis(np.reshape(found, [len(x) for x in (columns, depth, rows)]), -1, 0)
    if name.startswith("all_reduce"):
        return forecast(profile, all_reduce(int(dtype), values[0], values[0]))
    if name.startswith("experts"):
        rows, num_experts, width, hidden = values
        found = [
            forecast(
                profile, mixture(name.split()[1], dtype, int(h), int(w), 2, int(e), rows / 2, rows)
            )
            for e in num_experts
            for w in width
            for h in hidden
        ]
        return np.moveaxis(np.reshape(found, [len(x) for x in (*values[1:], rows)]), -1, 0)
    units, length = (x.ravel() for x in np.meshgrid(values[0], values[1], indexing="ij"))
    found = []
    if name.startswith("mla"):
        phase = name.removeprefix("mla_").split()[0]
        tokens = 2 * length - 1 if phase == "prefill" else length
        requests = units / tokens if phase == "prefill" else units
        for heads in values[2]:
            series = latent_attention(phase, int(heads), dtype, requests, tokens, units)
            found.append(forecast(profile, _with_context(series.only(name), units, length)))
        ms = np.reshape(found, [len(values[i]) for i in (2, 0, 1)])
        return np.moveaxis(ms, 0, 2)
    for group in values[2]:
        for head_dim in values[3]:
            # Of one KV head, and for prefill of whole prompts.
            prefill = name.startswith("prefill")
            tokens = 2 * length - 1 if prefill else length
            requests = units / (group * tokens) if prefill else units
            shape = (int(group), 1, int(head_dim), 0, dtype)
            series = attention(name.split()[0], *shape, requests, tokens, units)
            found.append(forecast(profile, _with_context(series, units / group, length)))
    ms = np.reshape(found, [len(values[i]) for i in (2, 3, 0, 1)])
    ms = np.moveaxis(ms, (2, 3), (0, 1))
    return np.repeat(ms[..., None], len(values[4]), axis=-1) if values[4:] else ms


def _with_context(series: Series, tokens: FloatArray, length: FloatArray) -> Series:
    """Where whole prompts cannot have so long a mean, ``tokens`` [N] are the end of one."""
    kv_tokens = np.maximum(tokens, length + tokens / 2)
    return replace(series, summary=replace(series.summary, prefill_kv_tokens=kv_tokens))


def _interpolation(axes: Mapping[str, tuple[float, ...]], sizes: Mapping[str, FloatArray]) -> Any:
    """[N, size of the table]: the weights of multilinear interpolation, as FactorTable.at does."""
    count = len(next(iter(sizes.values())))
    columns, weights = np.zeros((1, count), dtype=np.int64), np.ones((1, count))
    for name, values in axes.items():
        x = np.log2(values)
        wanted = np.clip(np.log2(np.maximum(sizes[name], values[0])), x[0], x[-1])
        low = np.clip(np.searchsorted(x, wanted, side="right") - 1, 0, len(x) - 2)
        share = (wanted - x[low]) / (x[low + 1] - x[low])
        columns = np.concatenate([columns * len(x) + low, columns * len(x) + low + 1])
        weights = np.concatenate([weights * (1 - share), weights * share])
    rows = np.broadcast_to(np.arange(count), columns.shape)
    size = int(np.prod([len(values) for values in axes.values()]))
    entries = (weights.ravel(), (rows.ravel(), columns.ravel()))
    return sparse.csr_matrix(entries, shape=(count, size))


def _bends(x: FloatArray) -> Any:
    """[len(x) - 2, len(x)]: second differences, in units of the mean spacing."""
    gaps = np.diff(x)
    slopes = sparse.diags([-1 / gaps, 1 / gaps], [0, 1], shape=(len(x) - 1, len(x))).tocsr()
    spacing = 2 * gaps[:-1] * gaps[1:] / (gaps[:-1] + gaps[1:])
    return sparse.diags(spacing / 2) @ (slopes[1:] - slopes[:-1])


GEMM_BOUNDS = {
    "gemm_fraction": (0.3, 0.8, 1.0),
    "hbm_fraction": (0.5, 0.9, 1.0),
    "unoverlapped": (0.0, 0.3, 1.0),
    "gemm_overhead_us": (0.0, 3.0, 20.0),
    "wave_fraction": (0.0, 0.15, 0.9),
}
DECODE_BOUNDS = {
    "attention_hbm_fraction": (0.3, 0.8, 1.0),
    "attention_overhead_us": (0.0, 10.0, 40.0),
}
PREFILL_BOUNDS = {"attention_fraction": (0.1, 0.45, 1.0)}
"""(least, start, most) of the fields of GpuProfile that are fitted."""


@dataclass(frozen=True)
class Fit:
    """A fitted profile, all that was measured, and the benchmarks' warmth by kind."""

    profile: GpuProfile
    series: Sequence[Series]
    warmth: Mapping[str, Warmth]

    def forecast(self, series: Series) -> FloatArray:
        l2 = L2_BYTES[self.profile.name]
        return forecast(self.profile, series, self.warmth[series.kind], l2)


TABLES: Mapping[str, tables.Table] = {
    "gemm": "gemm",
    "prefill": "context_attention",
    "decode": "generation_attention",
    "experts": "moe",
    "mla_prefill": "mla_context_module",
    "mla_decode": "mla_generation_module",
    "all_reduce": "custom_allreduce",
}
"""Where the times come from, by the first word of the name of a table of factors."""


def fit(gpu: str) -> Fit:
    """The profile of a GPU in tables.SYSTEMS, fitted to what is not held out."""
    base = GpuProfile.load(gpu)
    # The benchmarks' kernels follow each other too, so the gap is in their times.
    profile = replace(base, factors={}, measured="published", launch_gap_us=0.0)
    l2 = L2_BYTES[gpu]
    series = gemms(gpu) + experts(gpu) + all_reduces(gpu)
    for phase in ("prefill", "decode"):
        series += attentions(gpu, phase) + latent_attentions(gpu, phase)
    kinds = {s.kind for s in series}
    source = {k: "measured: " + tables.read(gpu, TABLES[k]).attrs["source"] for k in kinds}
    source["all_reduce"] += "; NCCL's for more than 8 MiB"
    warmth = dict.fromkeys(kinds, Warmth())
    for kind, bounds in (
        ("gemm", GEMM_BOUNDS),
        ("decode", DECODE_BOUNDS),
        ("prefill", PREFILL_BOUNDS),
    ):
        some = [s for s in series if s.kind == kind and s.plain and not s.held_out]
        profile, warmth[kind] = fit_constants(profile, some[::3], bounds, l2)
        text = f"{source[kind]}; fitted to {len(some[::3])} shapes in bf16"
        profile = replace(profile, sources={**profile.sources, **dict.fromkeys(bounds, text)})
        if kind == "decode":
            warmth[kind] = fit_warmth(profile, some, l2)
    factors: dict[str, FactorTable] = {}
    for name in sorted({s.table for s in series}):
        some = [s for s in series if s.table == name and not s.held_out and s.shows_the_gpu.any()]
        if not some:
            continue
        kind = some[0].kind
        # What block-scaled products do not show, the others in fp8 do.
        prior = factors.get("gemm fp8") if name == "gemm fp8_block" else None
        based = replace(profile, factors={**factors, **({name: prior} if prior else {})})
        shown = np.concatenate([s.shows_the_gpu for s in some])
        logs = []
        for s in some:
            others = s.only(name, others=True)
            with_gaps = replace(based, launch_gap_us=base.launch_gap_us)
            rest = forecast(with_gaps, others) if others.operators else 0.0
            own = forecast(based, s.only(name), warmth[kind], l2)
            logs.append(np.log(np.maximum(s.ms - rest, 0.05 * s.ms) / own))
        axes = {**AXES[kind], **(IN_A_WINDOW[kind] if " window " in name else {})}
        factors[name] = fit_table(
            name,
            axes,
            {key: values[shown] for key, values in _sizes(some).items()},
            np.concatenate(logs)[shown],
            f"{source[kind]}; fitted to {len(some)} shapes",
            prior,
            formula_at(profile, name, axes),
        )
    return Fit(replace(profile, factors=factors, launch_gap_us=base.launch_gap_us), series, warmth)


ROW_RANGES = ((1, 16), (17, 64), (65, 256), (257, 1024), (1025, 4096), (4097, 16384))
MANY_TOKENS = {"prefill": 1_000, "decode": 10_000}


NEIGHBOURS = "each row by the two next to it"
"""No forecast: how far a time is from those of the same product with a few more and fewer rows.
Where that is much, no smooth table is near."""


def _by_neighbours(series: Series) -> FloatArray:
    order = np.argsort(series.sizes["rows"])
    x, y = np.log(series.sizes["rows"][order]), np.log(series.ms[order])
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    return np.asarray(np.exp(y[:-2] + share * (y[2:] - y[:-2]) - y[1:-1]) - 1)


def errors(fitted: Fit) -> dict[str, dict[str, dict[str, float]]]:
    """Errors on held-out shapes by table and by size of the batch.

    Each is the mean of abs(forecast / measured - 1), "mean", its median bias, "bias", and the
    number of times, "count". Of products, both sides are at least LARGE.
    """
    ratios: dict[str, dict[str, list[FloatArray]]] = defaultdict(lambda: defaultdict(list))
    for s in fitted.series:
        if not s.held_out:
            continue
        ratio, found = fitted.forecast(s) / s.ms - 1, ratios[s.table]
        if s.kind == "gemm":
            if min(s.sizes["columns"][0], s.sizes["depth"][0]) < LARGE:
                continue
            found["all"].append(ratio)
            found[NEIGHBOURS].append(_by_neighbours(s))
            for low, high in ROW_RANGES:
                inside = (s.sizes["rows"] >= low) & (s.sizes["rows"] <= high)
                found[f"{low}-{high} rows"].append(ratio[inside])
        elif s.kind not in MANY_TOKENS:
            found["all"].append(ratio)
        else:
            limit = MANY_TOKENS[s.kind]
            many = s.sizes["tokens"] >= limit
            found[f"from {limit} tokens"].append(ratio[many])
            found[f"below {limit} tokens"].append(ratio[~many])
    return {
        table: {
            name: {
                "mean": round(float(np.abs(r).mean()), 4),
                "bias": round(float(np.median(r)), 4),
                "count": r.size,
            }
            for name, each in found.items()
            if (r := np.concatenate(each)).size
        }
        for table, found in sorted(ratios.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpus", nargs="*", metavar="GPU", help=", ".join(tables.SYSTEMS))
    parser.add_argument("--errors", type=Path, help="write errors as JSON, and no profiles")
    args = parser.parse_args()
    console, found = Console(width=130), {}
    for gpu in args.gpus or tables.SYSTEMS:
        fitted = fit(gpu)
        warm = {k: asdict(w) for k, w in sorted(fitted.warmth.items()) if w.ratio < 1}
        found[gpu] = {"warmth": warm}
        found[gpu]["errors"] = errors(fitted)
        _print(gpu, found[gpu]["errors"], console)
        if not args.errors:
            write(fitted)
    if args.errors:
        provenance = {
            "label": "forecasts, against times of single operators measured by NVIDIA",
            "measured": tables.release(),
            "held_out": "a quarter of all shapes, by a hash; nothing was fitted to them, but the"
            " tables' axes and stiffness were chosen with their errors in sight",
            "command": shlex.join(["python", "-m", "vllm_duet.measured.fit", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
        }
        args.errors.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance, "gpus": found}, indent=1)
        args.errors.write_text(text + "\n")


def write(fitted: Fit) -> None:
    """Replace the shipped profile, and those of GPUs that nobody has measured and are alike."""
    profile = fitted.profile
    _save(profile)
    for name in (name for name, like in ALIKE.items() if like == profile.name):
        keys = [*GEMM_BOUNDS, *DECODE_BOUNDS, *PREFILL_BOUNDS]
        source = f"assumption: as fitted for {profile.name}"
        factors = {
            table: FactorTable(found.axes, found.permille, source)
            for table, found in profile.factors.items()
        }
        alike = GpuProfile.load(name)
        _save(
            replace(
                alike,
                **{key: getattr(profile, key) for key in keys},
                sources={**alike.sources, **dict.fromkeys(keys, source)},
                factors=factors,
            )
        )


ALIKE = {"h100-pcie": "h100-sxm"}


def _save(profile: GpuProfile) -> None:
    path = FOLDER / f"{profile.name}.yaml"
    title = path.read_text().splitlines()[0].removeprefix("# ")
    profile.save(path, [title, "Made by python -m vllm_duet.measured.fit."])


def _print(gpu: str, found: Mapping[str, Mapping[str, Mapping[str, float]]], to: Console) -> None:
    table = Table(gpu, "size", "error", "bias", "times")
    for name, by_size in found.items():
        for size, error in by_size.items():
            numbers = f"{error['mean']:.1%}", f"{error['bias']:+.1%}", f"{error['count']}"
            table.add_row(name, size, *numbers)
            name = ""
    to.print(table)


if __name__ == "__main__":
    main()
