# SPDX-License-Identifier: Apache-2.0
"""What is timed, as data: operators of an 8B model, and plain memory traffic.

Each kind of work knows its FLOPs and bytes, as the roofline counts them, so one
description serves the GPU, the forecast and the files of results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from vllm_duet.roofline import BatchSummary, GpuProfile, ModelShape, Operator, Roofline
from vllm_duet.roofline.operators import Kind, linear

Phase = Literal["decode", "prefill"]

SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM",
    hidden_size=4096,
    num_layers=36,
    vocab_size=151936,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    tied_embeddings=False,
    activation_dtype="bfloat16",
    weight_dtype="bfloat16",
    kv_dtype="bfloat16",
    qk_norm=True,
)
"""Qwen3-8B. Source: its config.json on Hugging Face."""

ELEMENT_BYTES = 2
"""Everything is bfloat16."""

KV_BLOCK_TOKENS = 16
"""vLLM's default block size."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """y [rows, fan_out] = x [rows, fan_in] W^T, weights [fan_out, fan_in].

    ``kernel`` is torch's (cuBLAS) or the persistent Triton kernel. ``sm_target`` is how
    many SMs the kernel is told to size itself for; None is the whole device.
    """

    kind: ClassVar = "gemm"
    name: str
    rows: int
    fan_in: int
    fan_out: int
    kernel: Literal["cublas", "persistent"] = "cublas"
    sm_target: int | None = None

    def operator(self, phase: Phase) -> Operator:
        rows, gate = f"{phase}_tokens", f"has_{phase}"
        return linear(self.name, SHAPE, self.fan_in, self.fan_out, 1, rows=rows, gate=gate)


@dataclass(frozen=True, slots=True)
class Stream:
    """Reads ``bytes`` of memory, or copies half as many: ``bytes`` is the traffic."""

    kind: ClassVar = "stream"
    name: Literal["read", "copy"]
    bytes: int
    rows: ClassVar = None

    def operator(self, phase: Phase) -> Operator:
        gate = f"has_{phase}"
        return Operator(self.name, Kind.STREAM, 1, bytes={gate: float(self.bytes)}, gate=gate)


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """One new token of each of ``batch`` requests over ``context_len`` keys of KV blocks,
    one layer of the model."""

    kind: ClassVar = "attention"
    batch: int
    context_len: int
    rows: ClassVar = None

    @property
    def name(self) -> str:
        return "paged_attention"

    def operator(self, phase: Phase) -> Operator:
        """As roofline.operators.attention_decode counts it."""
        keys, width = self.batch * self.context_len, SHAPE.num_heads * SHAPE.head_dim
        kv_bytes = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * ELEMENT_BYTES * keys
        gate = f"has_{phase}"
        return Operator(
            self.name,
            Kind.ATTENTION,
            1,
            flops={gate: 4.0 * width * keys},
            bytes={gate: kv_bytes + 2.0 * width * ELEMENT_BYTES * self.batch},
            gate=gate,
        )


@dataclass(frozen=True, slots=True)
class SmallKernel:
    """A copy too small to take time: what remains is the cost of a kernel."""

    kind: ClassVar = "small"
    rows: ClassVar = None
    bytes: ClassVar = 4096

    @property
    def name(self) -> str:
        return "small_kernel"

    def operator(self, phase: Phase) -> Operator:
        gate = f"has_{phase}"
        return Operator(self.name, Kind.STREAM, 1, bytes={gate: float(self.bytes)}, gate=gate)


@dataclass(frozen=True, slots=True)
class SmIds:
    """Every thread block writes down the SM it runs on."""

    kind: ClassVar = "sm_ids"
    rows: ClassVar = None

    @property
    def name(self) -> str:
        return "sm_ids"

    def operator(self, phase: Phase) -> Operator:
        gate = f"has_{phase}"
        return Operator(self.name, Kind.STREAM, 1, bytes={gate: 4096.0}, gate=gate)


Work = Gemm | Stream | PagedAttention | SmallKernel | SmIds
_KINDS: Mapping[str, type[Any]] = {
    c.kind: c for c in (Gemm, Stream, PagedAttention, SmallKernel, SmIds)
}


def to_json(work: Work) -> dict[str, Any]:
    """As a record holds it."""
    return {"kind": work.kind, **asdict(work)}


def from_json(data: Mapping[str, Any]) -> Work:
    """The work of a record."""
    arguments = {key: value for key, value in data.items() if key != "kind"}
    work: Work = _KINDS[data["kind"]](**arguments)
    return work


def gemm(name: str, rows: int, **options: Any) -> Gemm:
    """A product of one of the model's layers by its vLLM name."""
    return Gemm(name, rows, *PRODUCTS[name], **options)


PRODUCTS: Mapping[str, tuple[int, int]] = {
    "qkv_proj": (4096, 6144),
    "o_proj": (4096, 4096),
    "gate_up": (4096, 2 * 12288),
    "down": (12288, 4096),
    "lm_head": (4096, 151936),
}
"""(fan_in, fan_out) of the products of SHAPE."""


def layer(rows: int, attention: PagedAttention | None = None) -> tuple[Work, ...]:
    """The products of one layer over ``rows`` tokens, with the attention in its place."""
    middle: tuple[Work, ...] = (attention,) if attention else ()
    return (
        gemm("qkv_proj", rows),
        *middle,
        *(gemm(name, rows) for name in ("o_proj", "gate_up", "down")),
    )


def operators_of(works: Sequence[Work], phase: Phase) -> list[Operator]:
    return [work.operator(phase) for work in works]


def summary_of(works: Sequence[Work], phase: Phase) -> BatchSummary:
    """The batch that the works of one lane belong to.

    Raises:
        ValueError: the products have different numbers of rows.
    """
    rows = {work.rows for work in works if work.rows is not None} or {1}
    if len(rows) > 1:
        raise ValueError(f"one lane's products must have equal rows, not {sorted(rows)}")
    [tokens] = rows
    if phase == "decode":
        return BatchSummary(decode_tokens=tokens)
    return BatchSummary(prefill_requests=1, prefill_tokens=tokens)


def predicted_ms(profile: GpuProfile, works: Sequence[Work], num_sms: int) -> float:
    """Forecast of the works one after the other, alone on ``num_sms`` SMs, in ms."""
    roofline = Roofline(SHAPE, profile, operators_of(works, "decode"))
    return float(roofline.step_ms(summary_of(works, "decode"), num_sms))


def predicted_pair_ms(
    profile: GpuProfile,
    decode: Sequence[Work],
    prefill: Sequence[Work],
    decode_sms: int,
    prefill_sms: int,
) -> tuple[float, float]:
    """Forecast of two lanes' works beside each other, in ms."""
    both = operators_of(decode, "decode") + operators_of(prefill, "prefill")
    summaries = summary_of(decode, "decode"), summary_of(prefill, "prefill")
    first, second = Roofline(SHAPE, profile, both).pair_ms(*summaries, decode_sms, prefill_sms)
    return float(first), float(second)


def amounts(works: Sequence[Work]) -> tuple[float, float]:
    """(FLOPs, bytes) of one run of the works."""
    flops = bytes_ = 0.0
    for work in works:
        operator, rows = work.operator("decode"), work.rows or 1
        units = {"has_decode": 1, "decode_tokens": rows}
        flops += sum(units[f] * amount for f, amount in operator.flops.items())
        bytes_ += sum(units[f] * amount for f, amount in operator.bytes.items())
    return flops, bytes_
