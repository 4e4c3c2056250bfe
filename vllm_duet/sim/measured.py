# SPDX-License-Identifier: Apache-2.0
"""The time of a step on a whole GPU, from operators that others have measured.

The ground truth of the simulator where there are tables (vllm_duet.measured). Nothing here is
shared with the roofline, by which the policy under test forecasts, but for the model's sizes:
a policy is then wrong by what a roofline really is wrong.

A step is a sum over kernels. What depends on the number of tokens alone (GEMMs, row-wise
kernels, all-reduces) is one curve of time against tokens, made once for a model; what is left is
attention, looked up by batch and length. A step then costs some twenty microseconds.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from vllm_duet.measured.tables import (
    COLLECTIVE_ELEMENT_BYTES,
    CUSTOM_ALL_REDUCE_BYTES,
    EXPERT_DTYPES,
    EXPERT_MULTIPLES,
    LATENT,
    LATENT_HIDDEN_SIZE,
    MOE_BACKENDS,
    NotMeasuredError,
    Table,
    read,
)
from vllm_duet.roofline import ModelShape

__all__ = ["Attention", "GatedDelta", "LatentAttention", "MeasuredSteps", "NotMeasuredError"]

FloatArray = npt.NDArray[np.float64]

SMALL_KERNEL_US = 2.0
"""A kernel of a few rows inside a CUDA graph, its launch included: norm, rotary embedding,
activation. The smallest kernel in the tables (GDN's convolution of one token on an H100) takes
1.8 us."""

SPIKE = 1.4
"""How much slower than its neighbours a product has to be to count as a disturbed benchmark."""

ONE_TILE_ROWS = 128
"""Rows of a product that a kernel's tile holds."""

BEYOND_CACHES = 5e8
"""Bytes of KV cache of which an L2 cache, of 40 to 126 MB, holds little."""

EXPERT_LOAD = "power_law_1.01"
"""How tokens fall on experts, of the three ways that were measured: neither evenly nor, as with
power_law_1.2, the most unevenly. An assumption."""

LARGEST_STEP = 1 << 20
"""Tokens of the largest step that a curve knows."""

STEP_US = 300.0
"""What the GPU does in a step beyond the model: copies of the step's inputs, the sampler's and
the attention metadata's small kernels. An assumption, as the profiles have it."""


class MeasuredSteps:
    """Steps of one model on one GPU (one tensor-parallel rank), with nothing beside them.

    Thread-safe: nothing changes after construction.
    """

    def __init__(
        self,
        shape: ModelShape,
        gpu: str,
        *,
        expert_parallel: bool = False,
        moe_backend: str | None = None,
    ) -> None:
        """``gpu`` is a name in ``tables.SYSTEMS``; ``expert_parallel``: ranks hold whole experts;
        ``moe_backend``: one of ``tables.MOE_BACKENDS`` instead of vLLM's own choice.

        Raises:
            NotMeasuredError: a table of this GPU lacks a kernel of this model; says which.
        """
        self._gpu, self._shape, self._expert_parallel = gpu, shape, expert_parallel
        self._moe_backend = moe_backend
        self._window = shape.sliding_window or 0
        for present, what in (
            (not shape.gated_mlp, "MLPs without a gate"),
            (shape.indexer, "sparse attention"),
            (shape.full_heads, "layers of different heads"),
            (shape.chunked_window, "attention by chunks"),
            (shape.experts and shape.experts.latent_size, "latent experts"),
        ):
            if present:
                raise NotMeasuredError(f"no truth is made of tables for {what} yet")
        quantized = _table_dtype(shape.weight_dtype)
        self._expert_dtype = _table_dtype(shape.expert_dtype)
        self._attention: list[tuple[int, Attention | LatentAttention | GatedDelta, int]] = []
        for layers, window in (
            (shape.num_full_layers, 0),
            (shape.num_window_layers, self._window),
        ):
            if layers:
                one = (
                    LatentAttention(gpu, shape, quantized)
                    if shape.latent
                    else Attention(gpu, shape, window)
                )
                self._attention.append((layers, one, window))
        if linear := shape.linear_attention:
            self._attention.append((linear.num_layers, GatedDelta(gpu, shape), 0))
        bandwidth = _bytes_per_ms(gpu)
        tokens, rows = _token_grid(gpu), _token_grid(gpu)
        self._tokens_ms = _Curve(tokens, self._per_token(tokens, quantized, bandwidth))
        self._sampled_ms = _Curve(rows, self._per_sampled(rows, bandwidth))

    @property
    def source(self) -> str:
        """Whose tables, for a summary."""
        return read(self._gpu, "gemm").attrs["source"]

    def step_ms(
        self,
        decode_context_lens: Sequence[int],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        padding: int = 0,
    ) -> float:
        """One step, in ms: decodes by the tokens each has in the KV cache, prefills by new
        tokens and those in the cache. ``padding`` rows are computed for nothing."""
        decodes, prefills = len(decode_context_lens), len(query_lens)
        ms = 1e-3 * STEP_US
        ms += self._tokens_ms(decodes + padding + sum(query_lens))
        ms += self._sampled_ms(decodes + padding + prefills)
        for layers, attention, window in self._attention:
            if decodes:
                seen = (
                    sum(min(c + 1, window) for c in decode_context_lens)
                    if window
                    else sum(decode_context_lens) + decodes
                )
                ms += layers * attention.decode_ms(decodes, seen)
            if prefills:
                ms += layers * attention.prefill_ms(query_lens, context_lens)
        return ms

    def _per_token(self, tokens: FloatArray, dtype: str, bandwidth: float) -> FloatArray:
        """All layers' kernels whose work is in proportion to the step's tokens, in ms."""
        shape, layers = self._shape, self._shape.num_layers
        hidden, d = shape.hidden_size, shape.head_dim
        q_width, kv_width = shape.local_heads * d, shape.local_kv_heads * d
        products: list[tuple[int, int, int]] = []
        # Elements that a kernel reads and writes for a token.
        small = [(layers * shape.norms_per_layer, 4.0 * hidden)]
        if not shape.latent:  # whose modules were measured with their projections
            attentions, gates = shape.num_attention_layers, int(shape.output_gate)
            columns = (1 + gates) * q_width + 2 * kv_width
            products += [(attentions, columns, hidden), (attentions, hidden, q_width)]
            small += [(attentions * (2 if shape.qk_norm else 1), 2.0 * (q_width + kv_width))]
            small += [(attentions * gates, 3.0 * q_width)]
        if linear := shape.linear_attention:
            value = shape.local_share(linear.num_heads) * linear.value_dim
            products += [(linear.num_layers, shape.linear_attention_columns, hidden)]
            products += [(linear.num_layers, hidden, value)]
            # The gates' projection, and the norm of what comes out beside its gate.
            gate = gemm_ms(self._gpu, "bfloat16", 2 * linear.num_heads, hidden, tokens)
            small += [(linear.num_layers, 3.0 * value)]
        experts = shape.experts
        mlps = [(shape.num_dense_layers, shape.intermediate_size)]
        if experts and experts.shared_intermediate_size:
            mlps += [(experts.num_layers, experts.shared_intermediate_size)]
        for repeats, size in mlps:
            if repeats:
                width = shape.local_width(size)
                products += [(repeats, 2 * width, hidden), (repeats, hidden, width)]
                small += [(repeats, 3.0 * width)]
        ms = linear.num_layers * gate if linear else np.zeros(tokens.size)
        for repeats, n, k in products:
            ms = ms + repeats * gemm_ms(self._gpu, dtype, n, k, tokens)
        for repeats, elements in small:
            moved = elements * shape.activation_bytes * tokens
            ms += repeats * (1e-3 * SMALL_KERNEL_US + moved / bandwidth)
        if experts:
            router = gemm_ms(self._gpu, "bfloat16", experts.num_experts, hidden, tokens)
            ms += experts.num_layers * (router + self._experts_ms(tokens))
        if shape.tensor_parallel_size > 1:
            ranks = shape.tensor_parallel_size
            ms += (2 * layers + 1) * all_reduce_ms(self._gpu, ranks, hidden * tokens)
            if shape.joint_qk_norm:  # two numbers of 32 bits
                ms += shape.num_attention_layers * all_reduce_ms(self._gpu, ranks, 4 * tokens)
        return ms

    def _experts_ms(self, tokens: FloatArray) -> FloatArray:
        """The routed experts of a layer: choosing, both products, activation and sum, in ms."""
        shape, experts, gpu = self._shape, self._shape.experts, self._gpu
        assert experts is not None
        table = read(gpu, "moe")
        ranks = shape.tensor_parallel_size
        tp, ep = (1, ranks) if self._expert_parallel else (ranks, 1)
        of_ranks = (("moe_tp_size", tp), ("moe_ep_size", ep))
        of_shape = (
            ("hidden_size", shape.hidden_size),
            ("inter_size", experts.intermediate_size),
            ("topk", experts.experts_per_token),
            ("num_experts", experts.num_experts),
        )
        loaded = table[table.distribution == EXPERT_LOAD]
        dtype = EXPERT_DTYPES.get(self._expert_dtype, self._expert_dtype)
        if self._moe_backend and self._expert_dtype != "mxfp4":
            raise NotMeasuredError(f"--moe-backend is known of mxfp4 experts, not {dtype}")
        own = self._only(loaded, (("moe_dtype", dtype), *of_shape))
        if self._moe_backend is None:
            return _experts_curve(self._only(own, of_ranks), tokens)
        dtype, kernel = MOE_BACKENDS[self._moe_backend]
        chosen = loaded[
            (loaded.moe_dtype == dtype) & loaded.kernel_source.str.contains(kernel, regex=False)
        ]
        if chosen.empty:
            raise NotMeasuredError(f"no experts by {self._moe_backend} are measured on {gpu}")
        # The model whose experts are most nearly as large; of one as large, the model itself.
        size = shape.hidden_size * experts.intermediate_size
        far = np.abs(np.log(chosen.hidden_size * chosen.inter_size / size))
        chosen = chosen[far == far.min()]
        other = chosen.iloc[0]
        # As many rows for each expert take as long for each of its weights: within 8 % of one
        # another for the two models measured with mxfp8, and 10 to 16 % for most of those with
        # block-scaled fp8. What is no product takes what it takes for this model.
        rows = experts.experts_per_token / experts.num_experts
        scale = rows * other.num_experts / other.topk
        weights = experts.num_experts * _padded(shape.hidden_size, experts.intermediate_size // tp)
        weights /= other.num_experts * _padded(other.hidden_size, other.inter_size // tp)
        ms = _experts_curve(self._only(chosen, of_ranks), tokens * scale)
        least, other_least = (each[each.num_tokens == 1].ms.min() for each in (own, chosen))
        return np.asarray(least + weights * np.maximum(ms - other_least, 0.0))

    def _only(self, table: Any, wanted: Sequence[tuple[str, Any]]) -> Any:
        for column, value in wanted:
            table = table[table[column] == value]
            if table.empty:
                raise NotMeasuredError(
                    f"no experts like {self._shape.architecture}'s are measured on {self._gpu}:"
                    f" none with {column} {value}"
                )
        return table

    def _per_sampled(self, rows: FloatArray, bandwidth: float) -> FloatArray:
        """The lm_head, and logits in 16 and 32 bits as the sampler reads them, in ms."""
        shape = self._shape
        ms = gemm_ms(self._gpu, "bfloat16", shape.local_vocab_size, shape.hidden_size, rows)
        if shape.tensor_parallel_size > 1:
            elements = shape.vocab_size * rows
            ms = ms + nccl_ms(self._gpu, "all_gather", shape.tensor_parallel_size, elements)
        return np.asarray(ms + 10.0 * shape.vocab_size * rows / bandwidth)


class Attention:
    """Attention kernels of one layer on one rank, their KV write included."""

    def __init__(self, gpu: str, shape: ModelShape, window: int) -> None:
        """``window``: the last tokens that a token sees, 0 for all."""
        context, self._split, scale = _heads(gpu, "context_attention", shape, window)
        decode, self._decode_split, decode_scale = _heads(
            gpu, "generation_attention", shape, window
        )
        self._window = window
        # Where this window is not measured, all is scaled by what it hides.
        self._measured_window = window if (context.window_size == window).any() else 0
        self.bytes_per_token = (
            2 * shape.local_kv_heads * shape.head_dim * shape.kv_element_bytes / self._decode_split
        )
        self._prefill = _Surface.of(context, "batch_size", "isl", scale).filled().logs()
        lengths = decode.assign(tokens=decode["step"] + 1)
        self._floor_ms = float(self._prefill.z.min())
        measured = _Surface.of(lengths, "batch_size", "tokens", decode_scale)
        kept = np.minimum(measured.y, self._measured_window or np.inf)
        moved = np.outer(measured.x, kept) * self.bytes_per_token
        # As fast as the memory is, or as an fp8 KV cache lets the kernel be.
        large = moved >= BEYOND_CACHES
        bytes_per_ms = np.nanmax((moved / measured.z)[large], initial=0.0) or _bytes_per_ms(gpu)
        # The benchmark reads one KV cache again and again, so that a small one comes from the L2
        # cache. A layer's comes from memory: it takes the floor and the bytes at least.
        floor = float(np.nanmin(measured.z))
        measured.z = np.fmax(measured.z, floor + moved / bytes_per_ms)
        self._decode = measured.filled().logs()

    def decode_ms(self, num_requests: int, kv_tokens: float) -> float:
        """One new token for each request, which see ``kv_tokens`` together.

        Requests of different lengths take what as many of the mean length do.
        """
        split = self._decode_split
        return self._decode(split * num_requests, max(kv_tokens / num_requests, 1.0))

    def prefill_ms(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> float:
        """Prompts, or chunks of them after what is in the cache.

        Measured are whole prompts, T(P, L) for P of L tokens. Of what that is above the least a
        kernel takes, a chunk of q tokens after c has the share that its (query, key) pairs are
        of the pairs of a whole prompt of c + q tokens, so that the chunks of a prompt come to
        about the prompt. Among P prompts of different lengths, each takes a P-th of what P of
        its length do.
        """
        count, ms = len(query_lens), self._floor_ms
        for q, c in zip(query_lens, context_lens, strict=True):
            share = self._pairs(q, c, self._window)
            share /= self._pairs(q + c, 0, self._measured_window)
            whole_ms = self._prefill(self._split * count, c + q)
            ms += share * (whole_ms - self._floor_ms) / count
        return ms

    @staticmethod
    def _pairs(q: int, c: int, window: int) -> float:
        if not window:
            return q * (c + (q + 1) / 2)
        whole = min(max(window - c, 0), q)
        return whole * (c + (whole + 1) / 2) + (q - whole) * window


class LatentAttention:
    """DeepSeek-V3's attention module of one layer on one rank, its projections included."""

    def __init__(self, gpu: str, shape: ModelShape, dtype: str) -> None:
        """``dtype``: what the tables call the projections' weights."""
        if (shape.hidden_size, shape.latent) != (LATENT_HIDDEN_SIZE, LATENT):
            raise NotMeasuredError(
                f"latent attention of {shape.architecture}'s sizes is not measured"
            )
        kv_dtype = shape.kernel_kv_dtype
        modules: tuple[tuple[Table, str], ...] = (
            ("mla_context_module", "isl"),
            ("mla_generation_module", "step"),
        )
        surfaces = []
        for name, length in modules:
            table = read(gpu, name)
            for column, value in (
                ("num_heads", shape.local_heads),
                ("gemm_type", dtype),
                ("kv_cache_dtype", kv_dtype),
                ("mla_dtype", "bfloat16"),
            ):
                table = table[table[column] == value]
            if table.empty:
                raise NotMeasuredError(
                    f"no {name} of {shape.local_heads} heads with {dtype} weights and a"
                    f" {kv_dtype} KV cache is measured on {gpu}"
                )
            surfaces.append(_Surface.of(table, "batch_size", length, 1.0).filled().logs())
        self._prefill, self._decode = surfaces

    def decode_ms(self, num_requests: int, kv_tokens: float) -> float:
        """As Attention.decode_ms."""
        return self._decode(num_requests, max(kv_tokens / num_requests, 1.0))

    def prefill_ms(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> float:
        """As Attention.prefill_ms, but that a chunk of q tokens after c takes what whole prompts
        of c + q take beyond those of c: projections are in proportion to tokens, not to pairs."""
        count, ms = len(query_lens), self._prefill(1, 1)
        for q, c in zip(query_lens, context_lens, strict=True):
            before = self._prefill(count, c) if c else count * self._prefill(1, 1)
            ms += max(0.0, self._prefill(count, c + q) - before) / count
        return ms


class GatedDelta:
    """Convolution and recurrence of one layer of gated delta rule (Qwen3-Next) on one rank; its
    projections are products as others are."""

    def __init__(self, gpu: str, shape: ModelShape) -> None:
        linear = shape.linear_attention
        assert linear is not None
        if linear.kind != "gated_delta":
            raise NotMeasuredError(f"no {linear.kind} is measured")
        table = read(gpu, "gdn")
        for column, value in (
            ("num_k_heads", shape.local_share(linear.num_key_heads)),
            ("num_v_heads", shape.local_share(linear.num_heads)),
            ("head_k_dim", linear.key_dim),
            ("head_v_dim", linear.value_dim),
            ("d_conv", linear.conv_width),
        ):
            table = table[table[column] == value]
            if table.empty:
                raise NotMeasuredError(
                    f"no gated delta rule like {shape.architecture}'s is measured on {gpu}:"
                    f" none with {column} {value}"
                )
        self._decode: list[_Curve] = []
        self._prefill: list[_Surface] = []
        for (phase, _), kernel in table.groupby(["phase", "kernel_source"]):
            if phase == "context":
                self._prefill.append(_Surface.of(kernel, "batch_size", "seq_len", 1.0))
                self._prefill[-1].filled().logs()
            else:
                means = kernel.groupby("batch_size").ms.mean()
                at = means.index.to_numpy(dtype=np.float64)
                self._decode.append(_Curve(at, means.to_numpy(dtype=np.float64)))

    def decode_ms(self, num_requests: int, _: float) -> float:
        """A token for each request: its state, whatever came before."""
        return sum(kernel(num_requests) for kernel in self._decode)

    def prefill_ms(self, query_lens: Sequence[int], _: Sequence[int]) -> float:
        """Prompts or chunks of them; among P of different lengths, each takes a P-th of what P
        of its length do."""
        count = len(query_lens)
        return sum(kernel(count, q) for kernel in self._prefill for q in query_lens) / count


def gemm_ms(gpu: str, dtype: str, n: int, k: int, rows: FloatArray) -> FloatArray:
    """Times in ms of [rows, k] x [k, n] products, for each of ``rows``.

    Between measured n and k, log-linear in each; beyond the largest, in proportion; between
    measured rows, linear.

    Raises:
        NotMeasuredError: this dtype was not measured.
    """
    m_grid, n_grid, k_grid, log_ms = _gemm_table(gpu, dtype)
    (i, u), (j, v) = _place(n_grid, math.log(n)), _place(k_grid, math.log(k))
    at = (1 - u) * ((1 - v) * log_ms[:, i, j] + v * log_ms[:, i, j + 1])
    at = at + u * ((1 - v) * log_ms[:, i + 1, j] + v * log_ms[:, i + 1, j + 1])
    beyond = max(1.0, n / math.exp(n_grid[-1])) * max(1.0, k / math.exp(k_grid[-1]))
    measured = np.exp(at) * beyond
    ms = np.interp(rows, m_grid, measured)
    return np.asarray(np.where(rows > m_grid[-1], measured[-1] * rows / m_grid[-1], ms))


def all_reduce_ms(gpu: str, num_gpus: int, elements: FloatArray) -> FloatArray:
    """Times in ms to sum tensors of 16-bit ``elements`` over ranks: vLLM's kernel inside a
    CUDA graph up to CUSTOM_ALL_REDUCE_BYTES, above it NCCL's.

    Raises:
        NotMeasuredError: not with as many GPUs.
    """
    table = read(gpu, "custom_allreduce")
    table = table[table.backend == "vllm_graph"]
    custom = _by_size(table[table.num_gpus == num_gpus], gpu, num_gpus)
    return np.asarray(
        np.where(
            COLLECTIVE_ELEMENT_BYTES * elements <= CUSTOM_ALL_REDUCE_BYTES,
            _of_size(custom, elements),
            nccl_ms(gpu, "all_reduce", num_gpus, elements),
        )
    )


def nccl_ms(gpu: str, operation: str, num_gpus: int, elements: FloatArray) -> FloatArray:
    """Times in ms of one of NCCL's collectives on tensors of 16-bit ``elements``.

    Raises:
        NotMeasuredError: not with as many GPUs.
    """
    table = read(gpu, "nccl")
    chosen = (
        (table.op_name == operation) & (table.num_gpus == num_gpus) & (table.nccl_dtype == "half")
    )
    return _of_size(_by_size(table[chosen], gpu, num_gpus), elements)


@functools.cache
def _bytes_per_ms(gpu: str) -> float:
    """Memory bandwidth: the most that any decode attention read, of BEYOND_CACHES or more."""
    table = read(gpu, "generation_attention")
    table = table[(table.window_size == 0) & (table.kv_cache_dtype == "bfloat16")]
    moved = table.batch_size * (table["step"] + 1) * table.num_key_value_heads * table.head_dim * 4
    beyond = moved >= BEYOND_CACHES
    return float((moved / table.ms)[beyond].max())


def _table_dtype(weight_dtype: str) -> str:
    """What the tables call weights of this dtype; of int4 they do not say the groups."""
    return {"float16": "bfloat16", "int4_group32": "int4"}.get(weight_dtype, weight_dtype)


def _token_grid(gpu: str) -> FloatArray:
    """Where a curve against tokens has its points: at the rows that were measured."""
    rows = np.unique(read(gpu, "gemm")["m"].to_numpy(dtype=np.float64))
    return np.append(rows, LARGEST_STEP)


@functools.cache
def _gemm_table(gpu: str, dtype: str) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Rows [M], log n [N], log k [K] and log ms [M, N, K] of all measured products."""
    table = read(gpu, "gemm")
    table = table[table.gemm_dtype == dtype]
    if table.empty:
        raise NotMeasuredError(f"no GEMM of {dtype} weights is measured on {gpu}")
    m, n, k = (np.unique(table[c].to_numpy(dtype=np.float64)) for c in ("m", "n", "k"))
    ms = np.full((m.size, n.size, k.size), np.nan)
    at = [np.searchsorted(grid, table[c]) for grid, c in ((m, "m"), (n, "n"), (k, "k"))]
    ms[tuple(at)] = table.ms
    # The few largest that did not fit: in proportion to their columns and rows.
    for i in range(1, n.size):
        ms[:, i] = np.where(np.isnan(ms[:, i]), ms[:, i - 1] * n[i] / n[i - 1], ms[:, i])
    for i in range(1, m.size):
        ms[i] = np.where(np.isnan(ms[i]), ms[i - 1] * m[i] / m[i - 1], ms[i])
    # Below one tile of rows the weights are all there is to read, so that times of neighbouring
    # rows differ by how busy the GPU was: by up to 15 %, in two modes, on an H100.
    few = int(np.searchsorted(m, ONE_TILE_ROWS, side="right"))
    ms[:few] = ndimage.median_filter(ms[:few], size=(5, 1, 1), mode="nearest")
    log_ms = _without_spikes(np.log(ms), np.log(n), np.log(k))
    if dtype == "fp8_block":
        log_ms = np.minimum(log_ms, _block_from_plain_fp8(gpu, log_ms))
    return m, np.log(n), np.log(k), log_ms


def _block_from_plain_fp8(gpu: str, log_ms: FloatArray) -> FloatArray:
    """What block-scaled products take at most: as many times what plain fp8 ones do as where both
    are long, at the 90th percentile.

    The benchmark of small ones waited for the host to launch them, for 60 us on an H100 and 200
    on a B200, which inside a CUDA graph nothing does.
    """
    m, log_n, log_k, plain = _gemm_table(gpu, "fp8")
    at = np.ix_(m >= 2048, log_n >= math.log(4096), log_k >= math.log(4096))
    return np.asarray(plain + np.percentile(log_ms[at] - plain[at], 90))


def _heads(gpu: str, name: Table, shape: ModelShape, window: int) -> tuple[Any, int, float]:
    """The rows for a rank's heads, as (rows, split, scale).

    To a kernel, ``split`` times as many requests with a ``split``-th of the heads are the same
    work, so that is taken where the heads themselves were not measured; and where that was not
    either, the next larger number of query heads on as many KV heads. Of head sizes the nearest
    is taken, and times scaled in proportion.
    """
    table = read(gpu, name)
    kv_dtype = shape.kernel_kv_dtype
    table = table[table.kv_cache_dtype == kv_dtype]
    measured = window if (table.window_size == window).any() else 0
    table = table[table.window_size == measured]
    sizes = table.head_dim.unique()
    if not sizes.size:
        raise NotMeasuredError(f"no {name} with a KV cache of {kv_dtype} is measured on {gpu}")
    nearest = min(sizes, key=lambda size: abs(math.log(size / shape.head_dim)))
    table = table[table.head_dim == nearest]
    scale = shape.head_dim / nearest
    heads, kv_heads = shape.local_heads, shape.local_kv_heads
    splits = [n for n in range(1, kv_heads + 1) if not (heads % n or kv_heads % n)]
    for split in splits:
        rows = table[
            (table.num_heads == heads // split) & (table.num_key_value_heads == kv_heads // split)
        ]
        if not rows.empty:
            return rows, split, scale
    for split in splits:
        rows = table[
            (table.num_heads > heads // split) & (table.num_key_value_heads == kv_heads // split)
        ]
        if not rows.empty:
            more = rows.num_heads.min()
            # Prefill is arithmetic; decode reads the same KV cache for more queries.
            fewer = heads / split / more if name == "context_attention" else 1.0
            return rows[rows.num_heads == more], split, scale * fewer
    raise NotMeasuredError(
        f"no {name} of {heads} heads on {kv_heads} KV heads is measured on {gpu}"
    )


def _padded(*sizes: int) -> float:
    """Weights of an expert of [hidden, width] as its kernel has them."""
    pairs = zip(sizes, EXPERT_MULTIPLES, strict=True)
    return float(math.prod(n * math.ceil(size / n) for size, n in pairs))


def _experts_curve(table: Any, tokens: FloatArray) -> FloatArray:
    means = table.groupby("num_tokens").ms.mean()
    counts, ms = means.index.to_numpy(dtype=np.float64), means.to_numpy(dtype=np.float64)
    beyond = np.maximum(1.0, tokens / counts[-1])
    return np.asarray(np.interp(tokens, counts, ms) * beyond)


def _by_size(table: Any, gpu: str, num_gpus: int) -> tuple[FloatArray, FloatArray]:
    if table.empty:
        raise NotMeasuredError(f"no collective over {num_gpus} of {gpu} is measured")
    means = table.groupby("message_size").ms.mean()
    ms = _never_slower(means.to_numpy(dtype=np.float64), axis=0)
    return means.index.to_numpy(dtype=np.float64), ms


def _of_size(measured: tuple[FloatArray, FloatArray], elements: FloatArray) -> FloatArray:
    sizes, ms = measured
    beyond = np.maximum(1.0, elements / sizes[-1])
    return np.asarray(np.interp(elements, sizes, ms) * beyond)


def _without_spikes(log_ms: FloatArray, log_n: FloatArray, log_k: FloatArray) -> FloatArray:
    """Products that take SPIKE times what those of neighbouring n and k do, put right.

    Bursts of other work disturbed some benchmarks: 17 rows take 28 us on a B200, and 32 take 17.
    That a number of rows suits a kernel badly is left as it is, since it shows at every n and k.
    """
    expected = np.full((2, *log_ms.shape), np.nan)
    for axis, grid in ((1, log_n), (2, log_k)):
        steps = (grid[1:-1] - grid[:-2]) / (grid[2:] - grid[:-2])
        share = steps[:, None] if axis == 1 else steps
        low, high = (np.take(log_ms, range(i, grid.size - 2 + i), axis) for i in (0, 2))
        inside = (
            (slice(None), slice(1, -1)) if axis == 1 else (slice(None), slice(None), slice(1, -1))
        )
        expected[axis - 1][inside] = (1 - share) * low + share * high
    # At the corners of the table there are no neighbours.
    found = np.nanmean(
        np.append(expected, [np.where(np.isnan(expected).all(0), log_ms, np.nan)], 0), 0
    )
    return np.where(log_ms > found + math.log(SPIKE), found, log_ms)


def _never_slower(ms: FloatArray, axis: int) -> FloatArray:
    """Less work takes no longer than more: takes out what disturbed a benchmark."""
    return np.flip(np.minimum.accumulate(np.flip(ms, axis), axis), axis)


def _place(grid: FloatArray, at: float) -> tuple[int, float]:
    """The interval of ``grid`` that holds ``at``, and where in it, within 0 and 1."""
    i = min(max(int(np.searchsorted(grid, at, side="right")) - 1, 0), grid.size - 2)
    return i, min(max((at - grid[i]) / (grid[i + 1] - grid[i]), 0.0), 1.0)


class _Curve:
    """Linear between points, read at whole numbers. Lists, since one number is wanted."""

    def __init__(self, x: FloatArray, y: FloatArray) -> None:
        self._x, self._y = x.tolist(), y.tolist()

    def __call__(self, at: int) -> float:
        x, y = self._x, self._y
        i = min(max(bisect_right(x, at) - 1, 0), len(x) - 2)
        return y[i] + (y[i + 1] - y[i]) * max(0.0, (at - x[i]) / (x[i + 1] - x[i]))


class _Surface:
    """Times z [X, Y] against x and y; logs of all are linear between points."""

    def __init__(self, x: FloatArray, y: FloatArray, z: FloatArray) -> None:
        self.x, self.y, self.z = x, y, z

    @classmethod
    def of(cls, table: Any, x: str, y: str, scale: float) -> _Surface:
        wide = table.pivot_table(index=x, columns=y, values="ms").sort_index()
        return cls(
            wide.index.to_numpy(dtype=np.float64),
            wide.columns.to_numpy(dtype=np.float64),
            scale * wide.to_numpy(dtype=np.float64),
        )

    def filled(self) -> _Surface:
        """What was not measured, in proportion to the largest x that was."""
        for i in range(1, self.x.size):
            more = self.z[i - 1] * self.x[i] / self.x[i - 1]
            self.z[i] = np.where(np.isnan(self.z[i]), more, self.z[i])
        self.z = _never_slower(_never_slower(self.z, axis=0), axis=1)
        return self

    def logs(self) -> _Surface:
        self._log_x, self._log_y = np.log(self.x).tolist(), np.log(self.y).tolist()
        self._log_z = np.log(self.z).tolist()
        return self

    def __call__(self, x: float, y: float) -> float:
        log_x, log_y, z = self._log_x, self._log_y, self._log_z
        at_x, at_y = math.log(x), math.log(y)
        i = min(max(bisect_right(log_x, at_x) - 1, 0), len(log_x) - 2)
        j = min(max(bisect_right(log_y, at_y) - 1, 0), len(log_y) - 2)
        # Below the table its first point; beyond it, on along the last two.
        u = max(0.0, (at_x - log_x[i]) / (log_x[i + 1] - log_x[i]))
        v = max(0.0, (at_y - log_y[j]) / (log_y[j + 1] - log_y[j]))
        low = z[i][j] + v * (z[i][j + 1] - z[i][j])
        high = z[i + 1][j] + v * (z[i + 1][j + 1] - z[i + 1][j])
        return math.exp(low + u * (high - low))
