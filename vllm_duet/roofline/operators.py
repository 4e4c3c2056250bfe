# SPDX-License-Identifier: Apache-2.0
"""FLOPs and bytes of each operator of a decoder step.

An operator's work is linear in a few statistics of the batch (FEATURES), so a
model is a short list of coefficients, compiled once by predictor.py. Only what
belongs to the model is here; how fast a GPU does it is hardware.py's business.

Formulas: design.md, "Roofline, in short", after DuetServe (arXiv 2511.04791).
Symbols: T tokens of the step; for request i, q_i of them, after c_i tokens of
context; h query heads and g KV heads of one rank, of dimension d. A layer's window
is what its attention sees at most: the last tokens, those since the start of a
chunk, or those that an indexer chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Final

from vllm_duet.roofline.layer_shapes import HeadShape
from vllm_duet.roofline.model_shape import WEIGHT_BYTES, ModelShape

FEATURES: Final = (
    "step",  # 1 where the step has any token
    "tokens",
    "sampled",  # rows through the lm_head
    "has_decode",  # 1 where a request has exactly one new token
    "decode_tokens",
    "decode_kv_tokens",
    "decode_window_kv_tokens",
    "has_prefill",  # 1 where a request has more than one
    "prefill_tokens",
    "prefill_pairs",  # (query, key) pairs under the causal mask
    "prefill_kv_tokens",
    "prefill_window_pairs",
    "prefill_window_kv_tokens",
    "experts_touched",  # expected distinct experts in each layer that has experts
)
"""Statistics of a batch that an operator's work may be linear in."""


class Kind(Enum):
    """Which of a GPU's rates an operator runs at."""

    GEMM = auto()
    ATTENTION = auto()
    ROWWISE = auto()
    """One thread block per token: norms, rotary embedding, activation."""
    STREAM = auto()
    """Plain memory traffic: gathers, copies."""
    LINK = auto()
    """Bytes are exchanged with the other ranks, not with memory."""
    STEP = auto()
    """Costs its overhead and nothing else."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One kernel and how often a step runs it.

    ``flops`` and ``bytes`` map names of FEATURES to the amount that one unit of
    the feature adds in *one* run; a step has ``repeats`` runs. The overhead is
    paid where the feature ``gate`` is not 0. ``dtype`` is what it multiplies in.
    A GEMM computes ``rows`` (a feature) by ``columns`` outputs of ``depth``
    products each; 0 columns means it is not one plain GEMM and is not quantised
    to tiles. ``reductions`` is how often a row is summed over in a ROWWISE operator.
    The elementwise arithmetic of ROWWISE and STREAM operators is not counted.

    ``measured`` names the profile's table of factors for it. The table's first axis is
    ``units_each`` times the feature ``units``; its second, where ``amount`` is a feature, is
    that one over ``units``, a mean; the remaining axes are at ``at``.
    """

    name: str
    kind: Kind
    repeats: int
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    gate: str = "step"
    dtype: str = "bfloat16"
    rows: str = "tokens"
    columns: int = 0
    depth: int = 0
    reductions: int = 0
    measured: str = ""
    units: str = ""
    units_each: float = 1.0
    amount: str = ""
    at: tuple[float, ...] = ()


def operators(shape: ModelShape, expert_tile_rows: int = 0) -> tuple[Operator, ...]:
    """All operators of one step of the model on one rank, in order of execution.

    ``expert_tile_rows``: see :func:`experts`.
    """
    found = [step(), embedding(shape), norms(shape)]
    if shape.indexer:
        found += sparse_attention(shape)
    else:
        found += latent_attention(shape) if shape.latent else grouped_attention(shape)
    if shape.linear_attention:
        found += linear_attention(shape)
    if shape.num_dense_layers:
        found += mlp(shape, "", shape.intermediate_size, shape.num_dense_layers)
    if shape.experts:
        found += experts(shape, expert_tile_rows)
    if shape.tensor_parallel_size > 1:
        found.append(all_reduce(shape))
        if shape.joint_qk_norm:
            found.append(qk_norm_sum(shape))
    found += [lm_head(shape), sampler(shape)]
    return tuple(found)


def step() -> Operator:
    """What a step costs before any operator runs: input preparation, graph launch."""
    return Operator("step", Kind.STEP, repeats=1)


def linear(
    name: str,
    shape: ModelShape,
    fan_in: int,
    fan_out: int,
    repeats: int,
    *,
    rows: str = "tokens",
    gate: str = "step",
    quantized: bool = True,
) -> Operator:
    """A matrix product. With N rows: FLOPs = 2 N fan_in fan_out, bytes = the weights
    + N (fan_in + fan_out) activations. Source: arithmetic.

    ``quantized=False`` keeps the weights in the activations' dtype.
    """
    element = shape.weight_element_bytes if quantized else shape.activation_bytes
    dtype = shape.weight_dtype if quantized else shape.activation_dtype
    return Operator(
        name,
        Kind.GEMM,
        repeats,
        flops={rows: 2.0 * fan_in * fan_out},
        bytes={
            gate: fan_in * fan_out * element,
            rows: (fan_in + fan_out) * shape.activation_bytes,
        },
        gate=gate,
        dtype=shape.compute_dtype if quantized else shape.activation_dtype,
        rows=rows,
        columns=fan_out,
        depth=fan_in,
        measured=f"gemm {_timed_as(dtype)}",
        units=rows,
        at=(fan_out, fan_in),
    )


def _timed_as(weight_dtype: str) -> str:
    """Either dtype of 16 bits takes the times of the other, and so does int4 of any groups."""
    return {"float16": "bfloat16", "int4_group32": "int4"}.get(weight_dtype, weight_dtype)


def rowwise(
    name: str, shape: ModelShape, elements: float, repeats: int, reductions: int = 0
) -> Operator:
    """A kernel that moves ``elements`` activations a token, read and written together."""
    return Operator(
        name,
        Kind.ROWWISE,
        repeats,
        bytes={"tokens": elements * shape.activation_bytes},
        reductions=reductions,
    )


def embedding(shape: ModelShape) -> Operator:
    """Gather one row a token: read and write hidden_size elements."""
    size = 2 * shape.hidden_size * shape.activation_bytes
    return Operator("embedding", Kind.STREAM, repeats=1, bytes={"tokens": size})


def norms(shape: ModelShape) -> Operator:
    """RMS norm fused with the residual addition, as vLLM runs it: reads x and the
    residual, writes both. The final norm is one more."""
    repeats = shape.norms_per_layer * shape.num_layers + 1
    return rowwise("norms", shape, 4 * shape.hidden_size, repeats, reductions=1)


def grouped_attention(shape: ModelShape) -> list[Operator]:
    """Projections and attention of MHA, GQA and MQA.

    Where layers with a window have other heads than those without, all of it is done
    twice: for the layers with one, whose operators begin with ``window_``, and the others.
    """
    found = []
    windows = (("window_", shape.num_window_layers), ("", shape.num_full_layers))
    for index, (layers, heads) in enumerate(shape.head_groups):
        differ = len(shape.head_groups) > 1
        prefix, attention = (
            (windows[index][0], windows[index : index + 1]) if differ else ("", windows)
        )
        found += projected(shape, heads, layers, prefix)
        for window, count in attention:
            if count:
                found += [
                    attention_prefill(shape, count, window, heads),
                    attention_decode(shape, count, window, heads),
                ]
        if shape.output_gate:
            # Reads the gate and attention's output, writes their product.
            found.append(
                rowwise("attention_gate", shape, 3 * shape.local_heads * heads.head_dim, layers)
            )
        found.append(o_proj(shape, shape.local_heads * heads.head_dim, layers, prefix))
    return found


def projected(shape: ModelShape, heads: HeadShape, layers: int, prefix: str) -> list[Operator]:
    """From the hidden state to queries with rotary embedding, and keys and values in the cache."""
    q_width = shape.local_heads * heads.head_dim
    kv_width = shape.local_share(heads.num_kv_heads) * heads.head_dim
    rope_layers = min(layers, shape.num_rope_layers)
    found = [qkv_proj(shape, heads, layers, prefix)]
    if shape.output_gate:
        # vLLM norms, rotates and parts queries and gate in one kernel.
        found.append(rope(shape, 2 * q_width + kv_width, rope_layers, prefix))
    else:
        if rope_layers:
            found.append(rope(shape, q_width + kv_width, rope_layers, prefix))
        if shape.qk_norm:
            # Rows are heads here, short and many, so this is plain traffic.
            size = 2 * (q_width + kv_width) * shape.activation_bytes
            name = f"{prefix}qk_norm"
            found.append(Operator(name, Kind.STREAM, rope_layers, bytes={"tokens": size}))
    return found


def qkv_proj(shape: ModelShape, heads: HeadShape, layers: int, prefix: str = "") -> Operator:
    """The fused projection hidden -> (h + 2 g) d, or (2 h + 2 g) d where queries have a gate."""
    queries = (2 if shape.output_gate else 1) * shape.local_heads
    out = (queries + 2 * shape.local_share(heads.num_kv_heads)) * heads.head_dim
    return linear(f"{prefix}qkv_proj", shape, shape.hidden_size, out, layers)


def o_proj(shape: ModelShape, width: int, layers: int, prefix: str = "") -> Operator:
    """The output projection from ``width`` concatenated head elements to hidden."""
    return linear(f"{prefix}o_proj", shape, width, shape.hidden_size, layers)


def rope(shape: ModelShape, width: int, layers: int, prefix: str = "") -> Operator:
    """Rotary embedding in place: reads and writes ``width`` elements of Q and K a token."""
    return rowwise(f"{prefix}rope", shape, 2 * width, layers)


def kv_write(shape: ModelShape, width: int, layers: int) -> Operator:
    """Copy ``width`` new elements a token into their KV blocks."""
    size = width * (shape.activation_bytes + shape.kv_element_bytes)
    return Operator("kv_write", Kind.ROWWISE, layers, bytes={"tokens": size})


def attention_prefill(
    shape: ModelShape, repeats: int, window: str = "", heads: HeadShape | None = None
) -> Operator:
    """Causal attention of the requests with q_i > 1; compute bound as a rule.

    FLOPs = 4 h d sum_i q_i (c_i + (q_i + 1)/2): two products over each visible
    (query, key) pair. Bytes = 2 g d sum_i (c_i + q_i) of KV, and Q and O, and the new K and V
    that are copied into their blocks, which is measured as part of it. With
    ``window="window_"`` pairs and KV are those inside the window. Attention sinks
    (gpt-oss) are one more logit a head, and not counted.
    """
    return _attention(shape, "prefill", f"prefill_{window}pairs", repeats, window, heads)


def attention_decode(
    shape: ModelShape, repeats: int, window: str = "", heads: HeadShape | None = None
) -> Operator:
    """Attention of the requests with q_i = 1; bandwidth bound as a rule.

    As :func:`attention_prefill`, where one query sees c_i + 1 keys, so the number
    of pairs is the number of KV tokens read.
    """
    return _attention(shape, "decode", f"decode_{window}kv_tokens", repeats, window, heads)


def _attention(
    shape: ModelShape, phase: str, pairs: str, repeats: int, window: str, heads: HeadShape | None
) -> Operator:
    heads = heads or HeadShape(shape.num_kv_heads, shape.head_dim)
    width = shape.local_heads * heads.head_dim
    kv_heads = shape.local_share(heads.num_kv_heads)
    kv_width = kv_heads * heads.head_dim
    written = 2 * kv_width * (shape.activation_bytes + shape.kv_element_bytes)
    return Operator(
        f"attention_{phase}{'_window' if window else ''}",
        Kind.ATTENTION,
        repeats,
        flops={pairs: 4.0 * width},
        bytes={
            f"{phase}_{window}kv_tokens": 2 * kv_width * shape.kv_element_bytes,
            f"{phase}_tokens": 2 * width * shape.activation_bytes + written,
        },
        gate=f"has_{phase}",
        dtype=shape.activation_dtype,
        measured=f"{phase} attention {'window ' if window else ''}{shape.kernel_kv_dtype}",
        units=f"{phase}_tokens",
        units_each=kv_heads if phase == "decode" else shape.local_heads,
        amount=pairs,
        at=(
            shape.local_heads / kv_heads,
            heads.head_dim,
            *([shape.sliding_window or 0] if window else []),
        ),
    )


def latent_attention(shape: ModelShape) -> list[Operator]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as vLLM runs it.

    Prefill expands the latent of all c_i + q_i tokens to per-head K and V and
    attends over those; decode folds the expansion into Q and O ("absorbed") and
    attends over the latent itself. Symbols: r = kv_lora_rank, e = rope_head_dim,
    n = nope_head_dim, v = v_head_dim.
    """
    m = shape.latent
    assert m is not None
    layers, h, act = shape.num_attention_layers, shape.local_heads, shape.activation_bytes
    r, e, n, v = m.kv_lora_rank, m.rope_head_dim, m.nope_head_dim, m.v_head_dim
    kv_b = linear(
        "kv_b_proj", shape, r, h * (n + v), layers, rows="prefill_kv_tokens", gate="has_prefill"
    )
    prefill = Operator(
        "attention_prefill",
        Kind.ATTENTION,
        layers,
        flops={"prefill_pairs": 2.0 * h * (n + e + v)},
        bytes={
            "prefill_kv_tokens": h * (n + e + v) * act,
            "prefill_tokens": h * (n + e + v) * act,
        },
        gate="has_prefill",
        dtype=shape.activation_dtype,
        measured=f"mla_prefill {shape.kernel_kv_dtype}",
        units="prefill_tokens",
        amount="prefill_pairs",
        at=(h,),
    )
    return [
        *latent_projections(shape),
        kv_write(shape, m.cache_dim, layers),
        kv_b,
        absorb(shape, "decode_tokens", "has_decode"),
        prefill,
        replace(
            absorbed_attention(shape, "decode", "decode_kv_tokens", "decode_kv_tokens", h),
            measured=f"mla_decode {shape.kernel_kv_dtype}",
            units="decode_tokens",
            amount="decode_kv_tokens",
            at=(h,),
        ),
        o_proj(shape, h * v, layers),
    ]


def latent_projections(shape: ModelShape) -> list[Operator]:
    """Hidden state to latents, latents to queries, and their rotary embedding."""
    m = shape.latent
    assert m is not None
    layers, h, e = shape.num_attention_layers, shape.local_heads, m.rope_head_dim
    q_in = m.q_lora_rank or shape.hidden_size
    return [
        linear("qkv_a_proj", shape, shape.hidden_size, m.q_lora_rank + m.cache_dim, layers),
        linear("q_b_proj", shape, q_in, h * (m.nope_head_dim + e), layers),
        rope(shape, (h + 1) * e, layers),
    ]


def absorb(shape: ModelShape, rows: str, gate: str) -> Operator:
    """Expansion of the latent, folded into Q and O: h products n -> r and h products r -> v."""
    m = shape.latent
    assert m is not None
    h, act = shape.local_heads, shape.activation_bytes
    r, wide = m.kv_lora_rank, m.nope_head_dim + m.v_head_dim
    return Operator(
        "absorb",
        Kind.GEMM,
        shape.num_attention_layers,
        flops={rows: 2.0 * h * r * wide},
        bytes={gate: h * r * wide * act, rows: h * (wide + 2 * r) * act},
        gate=gate,
        dtype=shape.activation_dtype,
    )


def absorbed_attention(
    shape: ModelShape, phase: str, pairs: str, kv_tokens: str, heads: int
) -> Operator:
    """Attention over the latent itself, which all ``heads`` share: r + e wide for K, r for V."""
    m = shape.latent
    assert m is not None
    r, e, act = m.kv_lora_rank, m.rope_head_dim, shape.activation_bytes
    return Operator(
        f"attention_{phase}",
        Kind.ATTENTION,
        shape.num_attention_layers,
        flops={pairs: 2.0 * heads * (r + e + r)},
        bytes={
            kv_tokens: shape.cached_bytes,
            f"{phase}_tokens": shape.local_heads * (r + e + r) * act,
        },
        gate=f"has_{phase}",
        dtype=shape.activation_dtype,
    )


def sparse_attention(shape: ModelShape) -> list[Operator]:
    """Latent attention over the tokens that an indexer chose (DeepSeek-V3.2, arXiv 2512.02556).

    vLLM attends over the latent in prefill too, since each query has other tokens: the products
    of ``absorb`` are of all tokens. Query j of request i sees min(c_i + j, topk) tokens, which is
    what a sliding window gives. Its kernels work on multiples of 64 heads. A prefill reads each
    cached token at least once; the reads of other queries are taken to hit the L2 cache.
    Prompts up to topk tokens, for which vLLM may expand the latent instead, are not told apart.
    """
    m, indexer = shape.latent, shape.indexer
    assert m is not None and indexer is not None
    padded = -(-shape.local_heads // SPARSE_HEADS) * SPARSE_HEADS
    seen = "decode_window_kv_tokens"
    layers = shape.num_attention_layers
    written = layers * m.cache_dim * (shape.activation_bytes + shape.kv_element_bytes)
    written += indexer.num_layers * (
        indexer.head_dim * shape.activation_bytes + indexer.cache_bytes
    )
    return [
        *latent_projections(shape),
        *index(shape),
        Operator("kv_write", Kind.ROWWISE, layers, bytes={"tokens": written / layers}),
        absorb(shape, "tokens", "step"),
        absorbed_attention(shape, "prefill", "prefill_window_pairs", "prefill_kv_tokens", padded),
        absorbed_attention(shape, "decode", seen, seen, padded),
        o_proj(shape, shape.local_heads * m.v_head_dim, layers),
    ]


SPARSE_HEADS = 64
"""Heads that FlashMLA's sparse kernels work on at least. Source: ``prefill_padding`` of vLLM's
flashmla_sparse.py, compute capability 9.x; on 10.x it is 128."""


def index(shape: ModelShape) -> list[Operator]:
    """The indexer's projections, its scores of all earlier tokens, and the choice of the best.

    A score is sum_h w_h relu(q_h k) over its heads: FLOPs = 2 h d a (query, key) pair, in fp8,
    and 4 bytes written, which the choice reads. Keys' and weights' projection is one product, not
    quantised; nothing is sharded. Source: vLLM's sparse_attn_indexer.
    """
    m, indexer = shape.latent, shape.indexer
    assert m is not None and indexer is not None
    layers, heads, d = indexer.num_layers, indexer.num_heads, indexer.head_dim

    def scores(phase: str, pairs: str) -> Operator:
        return Operator(
            f"index_{phase}",
            Kind.ATTENTION,
            layers,
            flops={pairs: 2.0 * heads * d},
            bytes=_added(
                (f"{phase}_kv_tokens", float(indexer.cache_bytes)),
                (pairs, 4.0),
                (f"{phase}_tokens", float(heads * d)),
            ),
            gate=f"has_{phase}",
            dtype="fp8",
        )

    q_in = m.q_lora_rank or shape.hidden_size
    return [
        linear("index_k_proj", shape, shape.hidden_size, d + heads, layers, quantized=False),
        linear("index_q_proj", shape, q_in, heads * d, layers),
        rowwise("index_rope", shape, 2 * heads * d, layers),
        scores("prefill", "prefill_pairs"),
        scores("decode", "decode_kv_tokens"),
        Operator(
            "index_choice",
            Kind.STREAM,
            layers,
            bytes={"prefill_pairs": 4.0, "decode_kv_tokens": 4.0},
        ),
    ]


def _added(*amounts: tuple[str, float]) -> dict[str, float]:
    """Amounts by feature, those of one feature together."""
    found: dict[str, float] = {}
    for feature, amount in amounts:
        found[feature] = found.get(feature, 0.0) + amount
    return found


def linear_attention(shape: ModelShape) -> list[Operator]:
    """A gated delta net (arXiv 2412.06464) or Mamba2 (arXiv 2405.21060), as vLLM runs them.

    One product gives keys, queries, values and the output's gate; a delta net's two gates a head
    are another, not quantised, while Mamba2's step size is a part of the first. A convolution
    goes over keys, queries and values. The state does not grow: decode costs the same at every
    context, prefill is linear in the tokens.
    """
    m = shape.linear_attention
    assert m is not None
    layers, hidden, act = m.num_layers, shape.hidden_size, shape.activation_bytes
    heads, columns = shape.local_share(m.num_heads), shape.local_conv_dim
    value = heads * m.value_dim
    found = [linear("linear_in_proj", shape, hidden, shape.linear_attention_columns, layers)]
    if m.kind == "gated_delta":
        found.append(linear("linear_gates", shape, hidden, 2 * heads, layers, quantized=False))
    return [
        *found,
        convolution(shape, columns),
        linear_attention_prefill(shape),
        linear_attention_decode(shape),
        # The norm's rows are heads: plain traffic of the output, its gate, and their product.
        Operator("linear_norm", Kind.STREAM, layers, bytes={"tokens": 3 * value * act}),
        linear("linear_out_proj", shape, value, hidden, layers),
    ]


def convolution(shape: ModelShape, columns: int) -> Operator:
    """Reads and writes ``columns`` a token; a decode also the tokens before it that are kept."""
    m = shape.linear_attention
    assert m is not None
    act = shape.activation_bytes
    return Operator(
        "linear_conv",
        Kind.ROWWISE,
        m.num_layers,
        bytes={
            "step": m.conv_width * columns * act,
            "tokens": 2 * columns * act,
            "decode_tokens": 2 * shape.conv_state_bytes,
        },
    )


def linear_attention_prefill(shape: ModelShape) -> Operator:
    """By chunks of C tokens: products inside a chunk, and with the state between chunks.

    With H heads whose state is v by k, FLOPs a token are, for a gated delta net,
    H (6 v k + 2 C (3 k + 2 v)): state times query, state times key, and the state's update; inside
    a chunk KK', QK' and the inverse of a triangle times keys and values, and scores times values
    (the inverse itself, a tenth, is left out). For Mamba2, H (4 v k + C v) + G C k: the state's
    update and state times query; inside a chunk, under the causal mask, scores times values, and
    the scores, once for each of G groups. A delta net is one kernel, which keeps the state on the
    SM; Mamba2's writes the chunks' states, passes them on and reads them, four times v k a chunk.
    One prompt a step is taken to read and write its state.

    Chunks of a prompt follow one another, on as many SMs as there are heads. FLOPs are counted at
    the whole GPU's rate, which is too fast for a few prompts: an H200 takes 0.40 ms for 8192
    tokens and 32 heads, whether of one prompt or of four of that length
    (aiconfigurator-core 0.24.0, gdn_perf of vLLM, measured by NVIDIA).
    """
    m = shape.linear_attention
    assert m is not None
    heads, groups = shape.local_share(m.num_heads), shape.local_share(m.num_key_heads)
    state, chunk = m.value_dim * m.key_dim, m.chunk_tokens
    moved = (shape.local_conv_dim + heads * m.value_dim) * shape.activation_bytes
    if m.kind == "gated_delta":
        flops = heads * (6 * state + 2 * chunk * (3 * m.key_dim + 2 * m.value_dim))
    else:
        flops = heads * (4 * state + chunk * m.value_dim) + groups * chunk * m.key_dim
        moved += 4 * shape.state_bytes / chunk
    return Operator(
        "linear_attention_prefill",
        Kind.ATTENTION,
        m.num_layers,
        flops={"prefill_tokens": float(flops)},
        bytes={"prefill_tokens": moved, "has_prefill": 2 * shape.state_bytes},
        gate="has_prefill",
        dtype=shape.activation_dtype,
    )


def linear_attention_decode(shape: ModelShape) -> Operator:
    """One step of the recurrence for each request: reads and writes the state.

    FLOPs = 6 H v k: state times key (of Mamba2: the decay), the update, state times query.
    """
    m = shape.linear_attention
    assert m is not None
    heads = shape.local_share(m.num_heads)
    moved = (shape.local_conv_dim + heads * m.value_dim) * shape.activation_bytes
    return Operator(
        "linear_attention_decode",
        Kind.ATTENTION,
        m.num_layers,
        flops={"decode_tokens": 6.0 * heads * m.value_dim * m.key_dim},
        bytes={"decode_tokens": 2 * shape.state_bytes + moved},
        gate="has_decode",
        dtype=shape.activation_dtype,
    )


def mlp(shape: ModelShape, prefix: str, intermediate_size: int, repeats: int) -> list[Operator]:
    """A gated MLP: fused gate and up, activation (reads two, writes one), down. Without a gate:
    up, activation (reads one, writes one), down."""
    width = shape.local_width(intermediate_size)
    first, parts = ("gate_up", 2) if shape.gated_mlp else ("up", 1)
    return [
        linear(f"{prefix}{first}", shape, shape.hidden_size, parts * width, repeats),
        rowwise(f"{prefix}act", shape, (parts + 1) * width, repeats),
        linear(f"{prefix}down", shape, width, shape.hidden_size, repeats),
    ]


def experts(shape: ModelShape, expert_tile_rows: int) -> list[Operator]:
    """Router, routed experts and shared experts.

    With E experts, k for each token and T tokens, the expected number of distinct
    experts touched is E (1 - (1 - k/E)^T) under uniform routing (experts_touched):
    only their weights are read. The rows of each are padded to a tile, by half of
    ``expert_tile_rows`` on average. Source: arithmetic. What an uneven load changes is in the
    measured factors, which are one table for the four kernels of a layer together.
    """
    m = shape.experts
    assert m is not None
    layers, act = m.num_layers, shape.activation_bytes
    hidden = m.latent_size or shape.hidden_size
    k, width = m.experts_per_token, shape.local_width(m.intermediate_size)
    first, parts = ("gate_up", 2) if shape.gated_mlp else ("up", 1)

    case: dict[str, Any] = dict(
        measured=f"experts {_timed_as(shape.expert_dtype)} {m.load}",
        units="tokens",
        units_each=k,
        at=(m.num_experts, width, hidden),
    )

    def grouped(name: str, fan_in: int, fan_out: int) -> Operator:
        flops = 2.0 * fan_in * fan_out
        return Operator(
            name,
            Kind.GEMM,
            layers,
            flops={"tokens": k * flops, "experts_touched": expert_tile_rows / 2 * flops},
            bytes={
                "experts_touched": fan_in * fan_out * WEIGHT_BYTES[shape.expert_dtype],
                "tokens": k * (fan_in + fan_out) * act,
            },
            dtype=shape.multiplied_in(shape.expert_dtype),
            **case,
        )

    found = [
        linear("router", shape, shape.hidden_size, m.num_experts, layers, quantized=False),
        grouped(f"experts_{first}", hidden, parts * width),
        replace(rowwise("experts_act", shape, (parts + 1) * k * width, layers), **case),
        grouped("experts_down", width, hidden),
        replace(rowwise("experts_sum", shape, (k + 1) * hidden, layers), **case),
    ]
    if m.latent_size:
        found += [
            linear("latent_in_proj", shape, shape.hidden_size, m.latent_size, layers),
            linear("latent_out_proj", shape, m.latent_size, shape.hidden_size, layers),
        ]
    if m.shared_intermediate_size:
        found += mlp(shape, "shared_", m.shared_intermediate_size, layers)
    if m.shared_gate:
        found += [
            linear("shared_gate", shape, shape.hidden_size, 1, layers, quantized=False),
            rowwise("shared_gated", shape, 2 * shape.hidden_size, layers),
        ]
    return found


def all_reduce(shape: ModelShape) -> Operator:
    """Sum the hidden state over P ranks after the embedding, each attention and each MLP.

    Each rank sends 2 (P - 1)/P of the tensor over its links (ring and two-shot
    all-reduce alike). Source: arithmetic.
    """
    p = shape.tensor_parallel_size
    size = 2 * (p - 1) / p * shape.hidden_size * shape.activation_bytes
    sums = 1 + shape.num_attention_layers + shape.num_dense_layers
    sums += shape.linear_attention.num_layers if shape.linear_attention else 0
    sums += shape.experts.num_layers if shape.experts else 0
    return Operator(
        "all_reduce",
        Kind.LINK,
        sums,
        bytes={"tokens": size},
        measured=f"all_reduce {p}",
        units="tokens",
        units_each=shape.hidden_size * shape.activation_bytes,
    )


def qk_norm_sum(shape: ModelShape) -> Operator:
    """Sum two 32-bit numbers a token over P ranks in each attention layer: the squares of Q's and
    K's heads. Source: vLLM's MiniMaxText01RMSNormTP.forward_qk."""
    p = shape.tensor_parallel_size
    return replace(
        all_reduce(shape),
        name="qk_norm_sum",
        repeats=shape.num_attention_layers,
        bytes={"tokens": 2 * (p - 1) / p * 8},
        units_each=8,
    )


def lm_head(shape: ModelShape) -> Operator:
    """Logits of the sampled rows; never quantized."""
    return linear(
        "lm_head",
        shape,
        shape.hidden_size,
        shape.local_vocab_size,
        1,
        rows="sampled",
        quantized=False,
    )


def sampler(shape: ModelShape) -> Operator:
    """Logits widened to 32 bits and read once: 2 + 4 + 4 bytes each."""
    return Operator(
        "sampler", Kind.STREAM, repeats=1, bytes={"sampled": 10.0 * shape.local_vocab_size}
    )
