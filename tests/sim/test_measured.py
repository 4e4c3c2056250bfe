# SPDX-License-Identifier: Apache-2.0
"""The measured truth: against tables made up by formula, and against the measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

pd = pytest.importorskip("pandas", reason="needs vllm-duet[measured]")

from sim.harness import MODEL, NO_COSTS, QUIET, roofline, simulation  # noqa: E402

from vllm_duet.measured import tables  # noqa: E402
from vllm_duet.roofline import ExpertShape, LatentShape, ModelShape  # noqa: E402
from vllm_duet.roofline.layer_shapes import LinearAttentionShape  # noqa: E402
from vllm_duet.sim import measured  # noqa: E402
from vllm_duet.sim.executor import GroundTruth  # noqa: E402
from vllm_duet.sim.measured import (  # noqa: E402
    Attention,
    GatedDelta,
    LatentAttention,
    MeasuredSteps,
    NotMeasuredError,
)
from vllm_duet.sim.simulation import Options, Simulation  # noqa: E402
from vllm_duet.sim.traces import TraceRequest  # noqa: E402

GPU = "h100-sxm"
SHAPE = ModelShape.from_hf_config(MODEL)

# ms of one unit of work; of a product a unit is one of its m n k
GEMM, PREFILL, DECODE, REDUCE, GATHER, EXPERTS = 1e-12, 1e-7, 1e-6, 3e-9, 5e-9, 1e-4
BANDWIDTH = 8 * 128 * 4 / DECODE
"""Bytes a ms, as decode attention with 8 KV heads has it."""


def made_up(gpu: str, table: str) -> pd.DataFrame:
    """Times in proportion to the work, so that interpolation is exact."""
    rows: list[dict[str, Any]] = []
    heads = dict(head_dim=128, kv_cache_dtype="bfloat16", window_size=0)
    if table == "gemm":
        sizes = (64, 1024, 65536)
        rows = [
            dict(gemm_dtype="bfloat16", m=m, n=n, k=k, ms=GEMM * m * n * k)
            for m, n, k in product((1, 16, 512, 8192), sizes, sizes)
        ]
    elif table == "context_attention":
        rows = [
            dict(batch_size=b, isl=n, ms=PREFILL * b * n**2, **heads, num_heads=h)
            | {"num_key_value_heads": h // 4}
            for b, n, h in product((1, 4, 64), (1, 256, 16384), (16, 32))
        ]
    elif table == "generation_attention":
        rows = [
            dict(batch_size=b, step=n - 1, ms=DECODE * b * n, **heads, num_heads=h)
            | {"num_key_value_heads": h // 4}
            for b, n, h in product((1, 4, 1024), (2, 256, 131072), (16, 32))
        ]
    elif table == "moe":
        sizes = dict(moe_dtype="bfloat16", hidden_size=4096, inter_size=1536, topk=8)
        rows = [
            sizes
            | dict(num_experts=128, distribution=load, num_tokens=n, moe_tp_size=tp, moe_ep_size=ep)
            | dict(ms=EXPERTS * n * (1 if load == "power_law_1.01" else 100) / tp / ep**2)
            for load, n, tp, ep in product(
                ("balanced", "power_law_1.01"), (1, 64, 16384), (1, 2), (1, 2)
            )
        ]
    elif table == "custom_allreduce":
        graph = dict(num_gpus=2, backend="vllm_graph")
        rows = [graph | dict(message_size=n, ms=REDUCE * n) for n in (1, 1 << 30)]
    else:
        unit = {"all_reduce": 2 * REDUCE, "all_gather": GATHER}
        rows = [
            dict(num_gpus=2, op_name=name, nccl_dtype="half", message_size=n, ms=unit[name] * n)
            for name, n in product(unit, (1, 1 << 30))
        ]
    frame = pd.DataFrame(rows)
    frame.attrs["source"] = "made up"
    return frame


@pytest.fixture
def forget() -> Iterator[None]:
    """What is kept of the tables, as they are replaced and after."""
    kept = (measured._gemm_table, measured._bytes_per_ms)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


@pytest.fixture
def made_up_tables(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "read", made_up)
    monkeypatch.setattr(measured, "STEP_US", 0.0)
    monkeypatch.setattr(measured, "SMALL_KERNEL_US", 0.0)


def gemms_ms(shape: ModelShape, tokens: float, sampled: float) -> float:
    hidden, wide = shape.hidden_size, shape.local_heads * shape.head_dim
    kv = shape.local_kv_heads * shape.head_dim
    layer = hidden * (2 * wide + 2 * kv) + 3 * hidden * shape.local_width(shape.intermediate_size)
    head = shape.local_vocab_size * hidden
    return GEMM * (shape.num_layers * layer * tokens + head * sampled)


def traffic_ms(shape: ModelShape, tokens: float, sampled: float) -> float:
    """Norms, rotary embedding and norm of Q and K, activation and logits, at the bandwidth
    that the made-up decode attention has."""
    wide = (shape.local_heads + shape.local_kv_heads) * shape.head_dim
    elements = 8 * shape.hidden_size + 4 * wide + 3 * shape.local_width(shape.intermediate_size)
    moved = shape.num_layers * 2 * elements * tokens + 10 * shape.vocab_size * sampled
    return moved / BANDWIDTH


def test_a_step_is_the_sum_of_its_kernels(made_up_tables: None) -> None:
    steps, layers = MeasuredSteps(SHAPE, GPU), SHAPE.num_layers
    decodes, queries, contexts = [100, 1900, 999], [700, 300], [0, 1300]
    # Whole prompts are measured: L^2 for L (L + 1) / 2 pairs; a chunk takes its share.
    attention = PREFILL * sum(
        (q + c) ** 2 * q * (c + (q + 1) / 2) / ((q + c) * (q + c + 1) / 2)
        for q, c in zip(queries, contexts, strict=True)
    )
    expected = gemms_ms(SHAPE, 1003, 5) + traffic_ms(SHAPE, 1003, 5)
    expected += layers * (attention + DECODE * (sum(decodes) + 3))
    assert steps.step_ms(decodes, queries, contexts) == pytest.approx(expected, rel=1e-3)
    # Padding is computed, and reads no KV cache.
    padded = steps.step_ms(decodes, [], [], padding=5)
    expected = gemms_ms(SHAPE, 8, 8) + traffic_ms(SHAPE, 8, 8)
    expected += layers * DECODE * (sum(decodes) + 3)
    assert padded == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("tokens", "unit"), [(512, REDUCE), (8192, 2 * REDUCE)])
def test_ranks_share_the_work_and_sum_up(made_up_tables: None, tokens: int, unit: float) -> None:
    half = replace(SHAPE, tensor_parallel_size=2)
    steps = MeasuredSteps(half, GPU)
    # Above 8 MiB, 1024 tokens of 4096 elements of 16 bits, it is NCCL, slower here.
    expected = gemms_ms(half, tokens, 1) + traffic_ms(half, tokens, 1)
    expected += (2 * half.num_layers + 1) * unit * tokens * half.hidden_size
    expected += GATHER * half.vocab_size
    expected += half.num_layers * PREFILL * tokens**2
    assert steps.step_ms([], [tokens], [0]) == pytest.approx(expected, rel=1e-3)


def test_a_window_hides_what_is_before_it(made_up_tables: None) -> None:
    windows, window = 10, 256
    some = replace(SHAPE, sliding_window=window, num_window_layers=windows)
    whole, hidden = MeasuredSteps(SHAPE, GPU), MeasuredSteps(some, GPU)
    contexts = [99, 3000]
    saved = whole.step_ms(contexts, [], []) - hidden.step_ms(contexts, [], [])
    assert saved == pytest.approx(windows * DECODE * (3001 - window), rel=1e-2)
    # No windowed prefill is in these tables: what is hidden is left out of the pairs.
    query, context = 600, 100
    pairs = query * (context + (query + 1) / 2)
    seen = sum(min(context + j, window) for j in range(1, query + 1))
    attention = PREFILL * (query + context) ** 2 / ((query + context) * (query + context + 1) / 2)
    saved = whole.step_ms([], [query], [context]) - hidden.step_ms([], [query], [context])
    assert saved == pytest.approx(windows * attention * (pairs - seen), rel=1e-2)


def test_a_measured_window_is_met() -> None:
    shape = replace(SHAPE, num_heads=64, head_dim=64)
    attention = Attention(GPU, shape, 128)
    table = tables.read(GPU, "context_attention")
    at = (table.num_heads == 64) & (table.num_key_value_heads == 8) & (table.head_dim == 64)
    at &= (table.window_size == 128) & (table.kv_cache_dtype == "bfloat16")
    rows = table[at & (table.batch_size == 1)].set_index("isl").ms
    for length in (1024, 8192, 16384):
        assert attention.prefill_ms([length], [0]) == pytest.approx(rows[length], rel=0.02)
    assert attention.decode_ms(8, 8 * 128) < Attention(GPU, shape, 0).decode_ms(8, 8 * 16384) / 3


def test_experts_are_their_layers_of_the_table(made_up_tables: None) -> None:
    experts = ExpertShape(SHAPE.num_layers - 6, 128, 8, 1536)
    some = replace(SHAPE, experts=experts)
    tokens, layers = 1000, experts.num_layers
    dense = MeasuredSteps(SHAPE, GPU).step_ms([], [tokens], [0])
    width, hidden = SHAPE.intermediate_size, SHAPE.hidden_size
    mlp = GEMM * 3 * hidden * width * tokens
    mlp += 2 * 3 * width * tokens / BANDWIDTH
    router = GEMM * hidden * 128 * tokens
    expected = dense + layers * (router + EXPERTS * tokens - mlp)
    assert MeasuredSteps(some, GPU).step_ms([], [tokens], [0]) == pytest.approx(expected, rel=1e-3)
    # Ranks that share each expert, and ranks that hold whole ones.
    two = replace(some, tensor_parallel_size=2)
    each = MeasuredSteps(two, GPU).step_ms([], [tokens], [0])
    whole = MeasuredSteps(two, GPU, expert_parallel=True).step_ms([], [tokens], [0])
    assert each - whole == pytest.approx(layers * EXPERTS * tokens * (1 / 2 - 1 / 4), rel=1e-3)
    with pytest.raises(NotMeasuredError, match="num_experts 64"):
        MeasuredSteps(replace(some, experts=replace(experts, num_experts=64)), GPU)


def test_experts_by_a_kernel_measured_of_another_model(
    made_up_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many experts of a quarter the size and as many of them a token: as many rows an
    expert at twice the tokens, and half the weights. The fixed part stays the model's own."""
    own, other = 0.03, 0.07
    columns = ("moe_dtype", "kernel_source", "hidden_size", "inter_size", "num_experts", "topk")
    some = [
        ("w4a16_mxfp4", "vllm_gptossmxfp4moe_triton", 4096, 1536, 128, 8, own, EXPERTS),
        ("w4a16_mxfp4", "vllm_x_marlin_marlinexperts", 2048, 768, 256, 8, other, 3 * EXPERTS),
        ("w4a16_mxfp4", "vllm_x_marlin_marlinexperts", 256, 128, 256, 8, 1e3, EXPERTS),
    ]
    table = pd.DataFrame(
        dict(zip(columns, case, strict=False))
        | dict(moe_tp_size=1, moe_ep_size=1, distribution="power_law_1.01")
        | dict(num_tokens=n, ms=case[-2] + case[-1] * (n - 1))
        for case in some
        for n in (1, 64, 16384)
    )
    monkeypatch.setattr(
        measured, "read", lambda gpu, name: table if name == "moe" else made_up(gpu, name)
    )
    experts = ExpertShape(SHAPE.num_layers, 128, 8, 1536, weight_dtype="mxfp4")
    shape, tokens, layers = replace(SHAPE, experts=experts), 1000, SHAPE.num_layers
    by_vllm, by_marlin = (
        MeasuredSteps(shape, GPU, moe_backend=name).step_ms([], [tokens], [0])
        for name in (None, "marlin")
    )
    expected = 2 * 3 * EXPERTS * (2 * tokens - 1) - EXPERTS * (tokens - 1)
    assert by_marlin - by_vllm == pytest.approx(layers * expected, rel=1e-3)
    with pytest.raises(NotMeasuredError, match="flashinfer_trtllm_afp8"):
        MeasuredSteps(shape, GPU, moe_backend="flashinfer_trtllm_afp8")
    plain = replace(experts, weight_dtype="bfloat16")
    with pytest.raises(NotMeasuredError, match="mxfp4"):
        MeasuredSteps(replace(SHAPE, experts=plain), GPU, moe_backend="marlin")


def test_ranks_sum_the_squares_of_q_and_k(made_up_tables: None) -> None:
    two = replace(SHAPE, tensor_parallel_size=2)
    each, joint = (
        MeasuredSteps(shape, GPU).step_ms([], [500], [0])
        for shape in (two, replace(two, joint_qk_norm=True))
    )
    assert joint - each == pytest.approx(SHAPE.num_layers * REDUCE * 4 * 500)


@pytest.mark.parametrize("size", [(2880, 1440), (3000, 1500), (3072, 1536)])
def test_experts_of_mxfp4_are_padded(size: tuple[int, int]) -> None:
    assert measured._padded(*size) == 3072 * 1536


def test_heads_that_were_not_measured_are_more_requests(made_up_tables: None) -> None:
    # 64 heads on 16 KV heads: to the kernel, twice the requests with 32 on 8.
    twice = Attention(GPU, replace(SHAPE, num_heads=64, num_kv_heads=16), 0)
    once = Attention(GPU, SHAPE, 0)
    assert twice.decode_ms(3, 3000) == pytest.approx(2 * once.decode_ms(3, 3000), rel=1e-2)
    assert twice.prefill_ms([512], [0]) == pytest.approx(2 * once.prefill_ms([512], [0]))
    # 24 heads on 8: the 32 on 8 that were; decode reads the same, prefill computes less.
    fewer = Attention(GPU, replace(SHAPE, num_heads=24), 0)
    assert fewer.decode_ms(3, 3000) == pytest.approx(once.decode_ms(3, 3000), rel=1e-2)
    assert fewer.prefill_ms([512], [0]) == pytest.approx(0.75 * once.prefill_ms([512], [0]))
    with pytest.raises(NotMeasuredError, match="5 KV heads"):
        Attention(GPU, replace(SHAPE, num_heads=10, num_kv_heads=5), 0)


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(NotMeasuredError, match="int4"):
        MeasuredSteps(replace(SHAPE, weight_dtype="int4"), GPU)
    with pytest.raises(NotMeasuredError, match="abacus"):
        MeasuredSteps(SHAPE, "abacus")
    with pytest.raises(NotMeasuredError, match="over 16"):
        MeasuredSteps(replace(SHAPE, num_kv_heads=16, tensor_parallel_size=16), GPU)


# The measured tables


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_measured_products_are_met(dtype: str) -> None:
    """But for the few that were disturbed, as their neighbours show."""
    table = tables.read(GPU, "gemm")
    table = table[(table.gemm_dtype == dtype) & (table.n >= 1024) & (table.k >= 1024)]
    ratios = []
    for (n, k), rows in table.groupby(["n", "k"]):
        found = measured.gemm_ms(GPU, dtype, n, k, rows.m.to_numpy())
        ratios.append(found / rows.ms.to_numpy())
    ratio = np.concatenate(ratios)
    assert np.mean(np.abs(ratio - 1) < 0.03) > 0.85
    assert np.mean(np.abs(ratio - 1) < 0.15) > 0.97


def test_small_block_scaled_products_do_not_wait_for_the_host() -> None:
    rows = np.array([1.0, 64.0, 256.0, 8192.0])
    for gpu in (GPU, "b200"):
        plain, block = (
            measured.gemm_ms(gpu, dtype, 2048, 4096, rows) for dtype in ("fp8", "fp8_block")
        )
        assert (block / plain < 2).all()
        table = tables.read(gpu, "gemm").set_index(["gemm_dtype", "n", "k", "m"]).ms
        assert table["fp8_block", 2048, 4096, 1] > 3 * block[0]


def left_out(gpu: str, table: str, column: str, values: list[int]) -> tuple[Any, Any]:
    whole = tables.read(gpu, table)
    held = whole[column].isin(values)
    kept = whole[~held].copy()
    kept.attrs = whole.attrs
    return kept, whole[held]


@pytest.mark.parametrize(("column", "allowed"), [("n", 0.08), ("k", 0.08), ("m", 0.10)])
def test_products_between_measured_ones(
    forget: None, monkeypatch: pytest.MonkeyPatch, column: str, allowed: float
) -> None:
    """Every other size is taken out and found again; mean absolute error."""
    table = tables.read(GPU, "gemm")
    sizes = sorted(size for size in table[column].unique() if size >= 64 or column == "m")
    kept, held = left_out(GPU, "gemm", column, sizes[1:-1:2])
    monkeypatch.setattr(measured, "read", lambda *_: kept)
    held = held[(held.gemm_dtype == "bfloat16") & (held.n >= 1024) & (held.k >= 1024)]
    held = held[held[column] < 51200]
    wrong = [
        measured.gemm_ms(GPU, "bfloat16", n, k, rows.m.to_numpy()) / rows.ms.to_numpy() - 1
        for (n, k), rows in held.groupby(["n", "k"])
    ]
    assert np.mean(np.abs(np.concatenate(wrong))) < allowed


@pytest.mark.parametrize(
    ("table", "column", "allowed"),
    [
        ("generation_attention", "step", 0.12),
        ("generation_attention", "batch_size", 0.12),
        ("context_attention", "isl", 0.08),
    ],
)
def test_attention_between_measured_ones(
    monkeypatch: pytest.MonkeyPatch, table: str, column: str, allowed: float
) -> None:
    whole = tables.read(GPU, table)
    sizes = sorted(size for size in whole[column].unique() if size >= 4)
    kept, held = left_out(GPU, table, column, sizes[1:-1:2])
    read = tables.read
    monkeypatch.setattr(
        measured, "read", lambda gpu, name: kept if name == table else read(gpu, name)
    )
    attention = Attention(GPU, SHAPE, 0)
    held = held[(held.num_heads == 32) & (held.num_key_value_heads == 8) & (held.head_dim == 128)]
    held = held[(held.kv_cache_dtype == "bfloat16") & (held.window_size == 0)]
    # What a small KV cache takes in the L2 cache is not what we want to meet.
    held = held[held.ms > 0.05]
    assert len(held) > 20
    if table == "context_attention":
        found = [
            attention.prefill_ms([r.isl] * r.batch_size, [0] * r.batch_size)
            for r in held.itertuples()
        ]
    else:
        found = [
            attention.decode_ms(r.batch_size, r.batch_size * (r.step + 1))
            for r in held.itertuples()
        ]
    assert np.mean(np.abs(found / held.ms - 1)) < allowed


def test_attention_grows_with_its_work() -> None:
    attention = Attention(GPU, SHAPE, 0)
    for batch in (1, 7, 100):
        times = [attention.decode_ms(batch, batch * kv) for kv in (10, 100, 900, 5000, 200_000)]
        assert times == sorted(times)
    for chunk in (128, 512, 3000):
        contexts = [0, 100, 1000, 8000, 30_000]
        times = [attention.prefill_ms([chunk], [context]) for context in contexts]
        assert times[1:] == sorted(times[1:])
    # No kernel reads KV from memory faster than the memory is.
    kv_bytes = 16 * 500 * 2 * 8 * 128 * 2
    assert attention.decode_ms(16, 16 * 500) > kv_bytes / 3.35e9
    # The chunks of a prompt come to about the prompt, and not to much less.
    whole = attention.prefill_ms([8192], [0])
    chunks = sum(attention.prefill_ms([1024], [1024 * n]) for n in range(8))
    assert 0.95 * whole < chunks < 1.3 * whole


LATENT = LatentShape(1536, 512, 128, 64, 128)
DEEPSEEK = replace(
    SHAPE, hidden_size=7168, num_heads=128, num_kv_heads=128, latent=LATENT, tensor_parallel_size=8
)


def test_latent_attention_is_its_module() -> None:
    attention = LatentAttention(GPU, DEEPSEEK, "fp8_block")
    table = tables.read(GPU, "mla_generation_module")
    at = (table.num_heads == 16) & (table.gemm_type == "fp8_block") & (table.step == 4096)
    rows = table[at & (table.kv_cache_dtype == "bfloat16")].set_index("batch_size").ms
    for batch, ms in rows.items():
        assert attention.decode_ms(batch, batch * 4096) == pytest.approx(ms, rel=0.03)
    whole = attention.prefill_ms([8192], [0])
    chunks = sum(attention.prefill_ms([2048], [2048 * n]) for n in range(4))
    # Each chunk pays the least that a module takes, once more.
    least = attention.prefill_ms([1], [0])
    assert chunks == pytest.approx(whole + 3 * least, rel=1e-6)
    with pytest.raises(NotMeasuredError, match="sizes"):
        LatentAttention(GPU, replace(DEEPSEEK, hidden_size=4096), "fp8_block")
    with pytest.raises(NotMeasuredError, match="nvfp4"):
        LatentAttention(GPU, DEEPSEEK, "nvfp4")


QWEN3_NEXT = replace(
    SHAPE,
    linear_attention=LinearAttentionShape(
        "gated_delta", 27, 32, 16, 128, 128, conv_width=4, chunk_tokens=64, state_dtype="float32"
    ),
)


def test_gated_delta_rule_is_its_kernels() -> None:
    layer = GatedDelta(GPU, QWEN3_NEXT)
    table = tables.read(GPU, "gdn")
    table = table[(table.num_k_heads == 16) & (table.num_v_heads == 32) & (table.d_model == 2048)]
    both = table.groupby(["phase", "batch_size", "seq_len"]).ms.sum()
    for batch in (1, 16, 512):
        measured_ms = both["generation", batch, 1]
        for kv_tokens in (batch, 9000 * batch):
            assert layer.decode_ms(batch, kv_tokens) == pytest.approx(measured_ms, rel=0.03)
    for batch, length in ((1, 4096), (8, 1024)):
        found = layer.prefill_ms([length] * batch, [0] * batch)
        assert found == pytest.approx(both["context", batch, length], rel=0.03)
        # A state is as large after a long prompt as after none.
        assert layer.prefill_ms([length] * batch, [5000] * batch) == found
    short = layer.prefill_ms([512, 2048], [0, 0])
    assert layer.prefill_ms([512, 512], [0, 0]) < short < layer.prefill_ms([2048] * 2, [0, 0])
    mamba = replace(QWEN3_NEXT.linear_attention, kind="mamba2")
    with pytest.raises(NotMeasuredError, match="mamba2"):
        GatedDelta(GPU, replace(QWEN3_NEXT, linear_attention=mamba))
    wider = replace(QWEN3_NEXT.linear_attention, num_heads=33)
    with pytest.raises(NotMeasuredError, match="num_v_heads 33"):
        GatedDelta(GPU, replace(QWEN3_NEXT, linear_attention=wider))


def test_a_step_with_linear_attention_has_its_layers() -> None:
    shape = QWEN3_NEXT
    steps, plain = MeasuredSteps(shape, GPU), MeasuredSteps(SHAPE, GPU)
    layer, attention = GatedDelta(GPU, shape), Attention(GPU, SHAPE, 0)
    contexts, layers = [4000] * 8, shape.linear_attention.num_layers
    longer = [30_000] * 8
    grown = steps.step_ms(longer, [], []) - steps.step_ms(contexts, [], [])
    kv = attention.decode_ms(8, 8 * 30_001) - attention.decode_ms(8, 8 * 4001)
    assert grown == pytest.approx((SHAPE.num_layers - layers) * kv)
    assert plain.step_ms(longer, [], []) - plain.step_ms(contexts, [], []) == pytest.approx(
        SHAPE.num_layers * kv
    )
    # Twice the recurrence is twice its kernels, and nothing else.
    slower = MeasuredSteps(shape, GPU)
    slower._attention.append((layers, layer, 0))
    more = slower.step_ms(contexts, [700], [50]) - steps.step_ms(contexts, [700], [50])
    assert more == pytest.approx(layers * (layer.decode_ms(8, 0) + layer.prefill_ms([700], [50])))


# In the simulator


def test_the_rooflines_ratio_slows_what_was_measured() -> None:
    truth = GroundTruth(roofline(), QUIET, MeasuredSteps(SHAPE, GPU))
    decode, prefill = truth.decode([2000] * 30), truth.prefill([3000], [500])
    assert decode.whole_ms == truth.measured.step_ms([2000] * 30, [], [], padding=2)
    assert truth.step_ms([2000] * 30, [], []) == decode.whole_ms
    mixed_ms = truth.measured.step_ms([2000] * 30, [3000], [500])
    assert truth.step_ms([2000] * 30, [3000], [500]) == mixed_ms
    alone = GroundTruth(roofline(), QUIET)
    lanes = (alone.decode([2000] * 30), alone.prefill([3000], [500]))
    beside, expected = truth.pair_ms(decode, prefill, 32, 100), alone.pair_ms(*lanes, 32, 100)
    for work, lane, sms, pair, ratio in zip(
        (decode, prefill), lanes, (32, 100), beside, expected, strict=True
    ):
        factor = work.whole_ms / lane.whole_ms
        assert not 0.99 < factor < 1.01
        assert truth.lane_ms(work, sms) == pytest.approx(factor * alone.lane_ms(lane, sms))
        assert pair == pytest.approx(factor * ratio)


def test_a_simulation_takes_the_measured_truth_and_says_so() -> None:
    sim = simulation("stock", truth="measured")
    assert "aiconfigurator-core" in sim.truth and "h100" in sim.truth
    (record,) = sim.run([TraceRequest(0.0, 400, 3)]).records
    steps = MeasuredSteps(SHAPE, GPU)
    expected = [steps.step_ms([], [400], [0]), steps.step_ms([400], [], [])]
    assert np.diff([0.0, *record.token_ms[:2]]) == pytest.approx(expected)
    other = Simulation(Options(MODEL, truth="roofline", disturbances=QUIET, costs=NO_COSTS))
    assert other.truth == "the roofline" and other.measured is None


def test_without_a_table_the_roofline_is_true_and_says_why(tmp_path: Any) -> None:
    sim = Simulation(Options(MODEL, weight_dtype="int8"))
    assert sim.measured is None and "int8" in sim.truth
