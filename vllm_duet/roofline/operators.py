# SPDX-License-Identifier: Apache-2.0
"""FLOPs and bytes of each operator of a decoder step.

An operator's work is linear in a few statistics of the batch (FEATURES), so a
model is a short list of coefficients, compiled once by predictor.py. Only what
belongs to the model is here; how fast a GPU does it is hardware.py's business.

Formulas: design.md, "Roofline, in short", after DuetServe (arXiv 2511.04791).
Symbols: T tokens of the step; for request i, q_i of them, after c_i tokens of
context; h query heads and g KV heads of one rank, of dimension d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Final

from vllm_duet.roofline.model_shape import ModelShape

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
    found += latent_attention(shape) if shape.latent else grouped_attention(shape)
    if shape.num_dense_layers:
        found += mlp(shape, "", shape.intermediate_size, shape.num_dense_layers)
    if shape.experts:
        found += experts(shape, expert_tile_rows)
    if shape.tensor_parallel_size > 1:
        found.append(all_reduce(shape))
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
        measured=f"gemm {dtype if dtype != 'float16' else 'bfloat16'}",
        units=rows,
        at=(fan_out, fan_in),
    )


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
    """Projections and attention of MHA, GQA and MQA."""
    layers, d = shape.num_layers, shape.head_dim
    q_width, kv_width = shape.local_heads * d, shape.local_kv_heads * d
    found = [qkv_proj(shape), rope(shape, q_width + kv_width)]
    if shape.qk_norm:
        # Rows are heads here, short and many, so this is plain traffic.
        size = 2 * (q_width + kv_width) * shape.activation_bytes
        found.append(Operator("qk_norm", Kind.STREAM, layers, bytes={"tokens": size}))
    for window, count in (("", shape.num_full_layers), ("window_", shape.num_window_layers)):
        if count:
            found += [
                attention_prefill(shape, count, window),
                attention_decode(shape, count, window),
            ]
    found.append(o_proj(shape, q_width))
    return found


def qkv_proj(shape: ModelShape) -> Operator:
    """The fused projection hidden -> (h + 2 g) d."""
    out = (shape.local_heads + 2 * shape.local_kv_heads) * shape.head_dim
    return linear("qkv_proj", shape, shape.hidden_size, out, shape.num_layers)


def o_proj(shape: ModelShape, width: int) -> Operator:
    """The output projection from ``width`` concatenated head elements to hidden."""
    return linear("o_proj", shape, width, shape.hidden_size, shape.num_layers)


def rope(shape: ModelShape, width: int) -> Operator:
    """Rotary embedding in place: reads and writes ``width`` elements of Q and K a token."""
    return rowwise("rope", shape, 2 * width, shape.num_layers)


def kv_write(shape: ModelShape, width: int) -> Operator:
    """Copy ``width`` new elements a token into their KV blocks."""
    size = width * (shape.activation_bytes + shape.kv_element_bytes)
    return Operator("kv_write", Kind.ROWWISE, shape.num_layers, bytes={"tokens": size})


def attention_prefill(shape: ModelShape, repeats: int, window: str = "") -> Operator:
    """Causal attention of the requests with q_i > 1; compute bound as a rule.

    FLOPs = 4 h d sum_i q_i (c_i + (q_i + 1)/2): two products over each visible
    (query, key) pair. Bytes = 2 g d sum_i (c_i + q_i) of KV, and Q and O, and the new K and V
    that are copied into their blocks, which is measured as part of it. With
    ``window="window_"`` pairs and KV are those inside the sliding window.
    """
    return _attention(shape, "prefill", f"prefill_{window}pairs", repeats, window)


def attention_decode(shape: ModelShape, repeats: int, window: str = "") -> Operator:
    """Attention of the requests with q_i = 1; bandwidth bound as a rule.

    As :func:`attention_prefill`, where one query sees c_i + 1 keys, so the number
    of pairs is the number of KV tokens read.
    """
    return _attention(shape, "decode", f"decode_{window}kv_tokens", repeats, window)


def _attention(shape: ModelShape, phase: str, pairs: str, repeats: int, window: str) -> Operator:
    width, kv_width = shape.local_heads * shape.head_dim, shape.local_kv_heads * shape.head_dim
    kv_write = 2 * kv_width * (shape.activation_bytes + shape.kv_element_bytes)
    heads = shape.local_kv_heads if phase == "decode" else shape.local_heads
    kv_dtype = "fp8" if shape.kv_element_bytes == 1 else "bfloat16"
    return Operator(
        f"attention_{phase}{'_window' if window else ''}",
        Kind.ATTENTION,
        repeats,
        flops={pairs: 4.0 * width},
        bytes={
            f"{phase}_{window}kv_tokens": 2 * kv_width * shape.kv_element_bytes,
            f"{phase}_tokens": 2 * width * shape.activation_bytes + kv_write,
        },
        gate=f"has_{phase}",
        dtype=shape.activation_dtype,
        measured=f"{phase} attention {'window ' if window else ''}{kv_dtype}",
        units=f"{phase}_tokens",
        units_each=heads,
        amount=pairs,
        at=(
            shape.local_heads / shape.local_kv_heads,
            shape.head_dim,
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
    layers, h, act = shape.num_layers, shape.local_heads, shape.activation_bytes
    r, e, n, v = m.kv_lora_rank, m.rope_head_dim, m.nope_head_dim, m.v_head_dim
    qkv_a_out = m.q_lora_rank + m.cache_dim
    q_in = m.q_lora_rank or shape.hidden_size
    kv_b = linear(
        "kv_b_proj", shape, r, h * (n + v), layers, rows="prefill_kv_tokens", gate="has_prefill"
    )
    absorb = Operator(
        "absorb",
        Kind.GEMM,
        layers,
        flops={"decode_tokens": 2.0 * h * r * (n + v)},
        bytes={"has_decode": h * r * (n + v) * act, "decode_tokens": h * (n + v + 2 * r) * act},
        gate="has_decode",
        dtype=shape.activation_dtype,
    )
    kv_dtype = "fp8" if shape.kv_element_bytes == 1 else "bfloat16"
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
        measured=f"mla_prefill {kv_dtype}",
        units="prefill_tokens",
        amount="prefill_pairs",
        at=(h,),
    )
    decode = Operator(
        "attention_decode",
        Kind.ATTENTION,
        layers,
        flops={"decode_kv_tokens": 2.0 * h * (r + e + r)},
        bytes={
            "decode_kv_tokens": m.cache_dim * shape.kv_element_bytes,
            "decode_tokens": h * (r + e + r) * act,
        },
        gate="has_decode",
        dtype=shape.activation_dtype,
        measured=f"mla_decode {kv_dtype}",
        units="decode_tokens",
        amount="decode_kv_tokens",
        at=(h,),
    )
    return [
        linear("qkv_a_proj", shape, shape.hidden_size, qkv_a_out, layers),
        linear("q_b_proj", shape, q_in, h * (n + e), layers),
        rope(shape, (h + 1) * e),
        kv_write(shape, m.cache_dim),
        kv_b,
        absorb,
        prefill,
        decode,
        o_proj(shape, h * v),
    ]


def mlp(shape: ModelShape, prefix: str, intermediate_size: int, repeats: int) -> list[Operator]:
    """A gated MLP: fused gate and up, activation (reads two, writes one), down."""
    width = shape.local_width(intermediate_size)
    return [
        linear(f"{prefix}gate_up", shape, shape.hidden_size, 2 * width, repeats),
        rowwise(f"{prefix}act", shape, 3 * width, repeats),
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
    layers, hidden, act = m.num_layers, shape.hidden_size, shape.activation_bytes
    k, width = m.experts_per_token, shape.local_width(m.intermediate_size)

    dtype = "bfloat16" if shape.weight_dtype == "float16" else shape.weight_dtype
    case: dict[str, Any] = dict(
        measured=f"experts {dtype} {m.load}",
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
                "experts_touched": fan_in * fan_out * shape.weight_element_bytes,
                "tokens": k * (fan_in + fan_out) * act,
            },
            dtype=shape.compute_dtype,
            **case,
        )

    found = [
        linear("router", shape, hidden, m.num_experts, layers, quantized=False),
        grouped("experts_gate_up", hidden, 2 * width),
        replace(rowwise("experts_act", shape, 3 * k * width, layers), **case),
        grouped("experts_down", width, hidden),
        replace(rowwise("experts_sum", shape, (k + 1) * hidden, layers), **case),
    ]
    if m.shared_intermediate_size:
        found += mlp(shape, "shared_", m.shared_intermediate_size, layers)
    return found


def all_reduce(shape: ModelShape) -> Operator:
    """Sum the hidden state over P ranks after the embedding, each attention and each MLP.

    Each rank sends 2 (P - 1)/P of the tensor over its links (ring and two-shot
    all-reduce alike). Source: arithmetic.
    """
    p = shape.tensor_parallel_size
    size = 2 * (p - 1) / p * shape.hidden_size * shape.activation_bytes
    return Operator(
        "all_reduce",
        Kind.LINK,
        2 * shape.num_layers + 1,
        bytes={"tokens": size},
        measured=f"all_reduce {p}",
        units="tokens",
        units_each=shape.hidden_size * shape.activation_bytes,
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
