# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_configs import (
    ALL,
    DEEPSEEK_V2_LITE,
    GEMMA3_1B,
    LLAMA3_8B,
    LLAMA4_SCOUT,
    QWEN3_8B,
    QWEN3_30B_A3B,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_duet.roofline import (
    Batch,
    BatchSummary,
    GpuProfile,
    ModelShape,
    OperatorTime,
    Roofline,
    kernels,
)
from vllm_duet.roofline.kernels import step_times
from vllm_duet.roofline.operators import FEATURES

SMS = 132
DENT = 0.01
BATCHES = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(1, 5000)), st.integers(0, 30000)),
    min_size=1,
    max_size=12,
).map(lambda pairs: Batch([q for q, _ in pairs], [c for _, c in pairs]))
MODELS = st.sampled_from(
    [
        "qwen3-8b",
        "gemma3-1b",
        "qwen3-30b-a3b",
        "deepseek-v2-lite",
        "deepseek-v3.2",
        "llama4-scout",
        "qwen3-next-80b-a3b",
        "gemma4-26b-a4b",
        "nemotron-3-super",
    ]
)


@cache
def roofline_of(name: str, tensor_parallel_size: int = 1) -> Roofline:
    shape = ModelShape.from_hf_config(ALL[name], tensor_parallel_size=tensor_parallel_size)
    return Roofline(shape, GpuProfile.load("h100-sxm"))


def by_name(roofline: Roofline, batch: Batch) -> dict[str, OperatorTime]:
    return {op.name: op for op in roofline.predict(batch, SMS).operators}


# Work, by hand


def test_dense_work_by_hand() -> None:
    ops = by_name(roofline_of("qwen3-8b"), Batch([2048, 1, 1], [100, 900, 4000]))
    tokens, layers = 2050, 36
    assert ops["qkv_proj"].flops == layers * 2 * tokens * 4096 * (32 + 16) * 128
    assert ops["gate_up"].flops == layers * 2 * tokens * 4096 * 2 * 12288
    assert ops["down"].bytes == layers * 2 * (12288 * 4096 + tokens * (12288 + 4096))
    assert ops["lm_head"].flops == 2 * 3 * 4096 * 151936
    pairs = sum(100 + j for j in range(1, 2049))
    assert ops["attention_prefill"].flops == layers * 4 * 32 * 128 * pairs
    kv = 4 * 8 * 128  # bytes of K and V of one token in one layer
    # Each new token's query, output, and K and V, which are read and written.
    new = 2 * 32 * 128 * 2 + 2 * kv
    assert ops["attention_prefill"].bytes == layers * (2148 * kv + 2048 * new)
    assert ops["attention_decode"].flops == layers * 4 * 32 * 128 * (901 + 4001)
    assert ops["attention_decode"].bytes == layers * ((901 + 4001) * kv + 2 * new)


def test_num_sampled_is_the_rows_of_the_lm_head() -> None:
    roofline = roofline_of("qwen3-8b")
    assert by_name(roofline, Batch([8], [0], num_sampled=0))["lm_head"].flops == 0
    assert by_name(roofline, Batch([8], [0], num_sampled=5))["lm_head"].flops == 10 * 4096 * 151936


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
def test_every_weight_is_read_once_when_all_experts_are_hit(
    name: str, tensor_parallel_size: int
) -> None:
    roofline = roofline_of(name, tensor_parallel_size)
    gemms = {op.name for op in roofline.operators if op.depth or op.name.startswith("experts")}
    gemms.add("linear_conv")
    shape = roofline.shape
    read = 0.0
    many = 10**9
    # The part of the bytes that does not grow with the tokens.
    for op in roofline.operators:
        if op.name == "absorb" and shape.indexer:
            # The latent's expansion, read in the activations' dtype, and never by itself.
            read += op.repeats * op.bytes["step"] * shape.weight_element_bytes / 2
        if op.name not in gemms or op.name in ("experts_act", "experts_sum"):
            continue
        fixed = op.bytes.get(op.gate, 0.0)
        if "experts_touched" in op.bytes and shape.experts:
            expected = shape.experts.num_experts
            miss = 1 - shape.experts.experts_per_token / shape.experts.num_experts
            fixed = op.bytes["experts_touched"] * expected * (1 - miss**many)
        read += op.repeats * fixed
    embedding = shape.local_vocab_size * shape.hidden_size * shape.activation_bytes
    held = shape.weight_bytes - (0 if shape.tied_embeddings else embedding)
    assert read == pytest.approx(held)


def test_sliding_window_by_hand() -> None:
    ops = by_name(roofline_of("gemma3-1b"), Batch([300, 1, 1], [400, 100, 9000]))
    visible = sum(min(400 + j, 512) for j in range(1, 301))
    assert ops["attention_prefill_window"].flops == 22 * 4 * 4 * 256 * visible
    assert ops["attention_decode_window"].flops == 22 * 4 * 4 * 256 * (101 + 512)
    assert ops["attention_decode"].flops == 4 * 4 * 4 * 256 * (101 + 9001)
    # The 300 queries together read the last 300 + 512 - 1 of 700 tokens: all of them.
    kv = 2 * 1 * 256 * 2
    new = 2 * 4 * 256 * 2 + 2 * kv
    assert ops["attention_prefill_window"].bytes == 22 * (700 * kv + 300 * new)


def test_latent_attention_by_hand() -> None:
    ops = by_name(roofline_of("deepseek-v2-lite"), Batch([64, 1], [36, 999]))
    pairs = sum(36 + j for j in range(1, 65))
    assert ops["attention_prefill"].flops == 27 * 2 * 16 * (192 + 128) * pairs
    assert ops["kv_b_proj"].flops == 27 * 2 * 100 * 512 * 16 * 256
    assert ops["attention_decode"].flops == 27 * 2 * 16 * (576 + 512) * 1000
    latent_read = 27 * 1000 * 576 * 2
    query_and_output = 27 * 16 * (576 + 512) * 2
    assert ops["attention_decode"].bytes == latent_read + query_and_output


def test_chunked_window_by_hand() -> None:
    """Llama 4 Scout: 36 layers whose attention begins anew each 8192 tokens, 12 that see all."""
    ops = by_name(roofline_of("llama4-scout"), Batch([9000, 1, 1], [10_000, 100, 17_000]))
    pair = 4 * 40 * 128
    seen = sum((10_000 + j) % 8192 + 1 for j in range(9000))
    assert ops["attention_prefill_window"].flops == 36 * pair * seen
    assert ops["attention_prefill"].flops == 12 * pair * sum(10_001 + j for j in range(9000))
    assert ops["attention_decode_window"].flops == 36 * pair * (101 + 17_000 % 8192 + 1)
    # From the chunk's start, token 8192, to the last of 19000 tokens.
    kv, width = 2 * 8 * 128 * 2, 40 * 128
    # Beside it queries, outputs, and the new keys and values on their way into the cache.
    moved = (19_000 - 8192) * kv + 9000 * (2 * width * 2 + 2 * kv)
    assert ops["attention_prefill_window"].bytes == 36 * moved
    assert ops["rope"].bytes == 36 * 9002 * 2 * 48 * 128 * 2
    assert ops["qk_norm"].bytes == ops["rope"].bytes
    assert "qk_norm" not in by_name(roofline_of("llama4-maverick"), Batch([1], [0]))


@pytest.mark.parametrize("name", ["llama4-scout", "gpt-oss-120b", "deepseek-v3.2"])
def test_capped_prefills_see_the_same_window(name: str) -> None:
    """The compiled sums of a capped step's first tokens are those of ``summarize``."""
    roofline = roofline_of(name)
    decode = roofline.summarize(Batch([1, 1], [50, 20_000]))
    queries, contexts = [5000, 12_000, 100], [3000, 9000, 0]
    sizes = np.array([700, 5000, 9300, 17_050])
    ms, tokens, _ = roofline.capped_ms(decode, queries, contexts, sizes)
    assert tokens.tolist() == sizes.tolist()
    for size, found in zip(sizes.tolist(), ms, strict=True):
        taken = np.clip(size - np.cumsum([0, *queries[:-1]]), 0, queries)
        first = [(int(q), c) for q, c in zip(taken, contexts, strict=True) if q]
        mixed = decode + roofline.summarize(Batch(*zip(*first, strict=True)))
        assert found == pytest.approx(float(roofline.step_ms(mixed, SMS)))


def test_heads_that_differ_by_window_by_hand() -> None:
    """Gemma 4 31B: 50 layers with a window and 16 KV heads of 256, 10 with 4 of 512."""
    ops = by_name(roofline_of("gemma4-31b"), Batch([1, 1], [99, 4999]))
    assert ops["window_qkv_proj"].flops == 50 * 2 * 2 * 5376 * (32 + 2 * 16) * 256
    assert ops["qkv_proj"].flops == 10 * 2 * 2 * 5376 * (32 + 2 * 4) * 512
    assert ops["o_proj"].flops == 10 * 2 * 2 * 32 * 512 * 5376
    assert ops["norms"].bytes == (60 * 4 + 1) * 2 * 4 * 5376 * 2
    # With experts beside the MLP, four more a layer, and the router's is one of them.
    beside = by_name(roofline_of("gemma4-26b-a4b"), Batch([1], [0]))
    assert beside["norms"].bytes == (30 * 8 + 1) * 4 * 2816 * 2
    assert beside["gate_up"].flops == 30 * 2 * 2816 * 2 * 2112
    assert beside["experts_sum"].bytes == 30 * 9 * 2816 * 2
    # Of both requests: the query and the output, and a new key and value, read and written.
    query_and_output = 2 * 2 * 32 * 2
    assert ops["attention_decode_window"].bytes == 50 * (
        (100 + 1024) * 2 * 16 * 256 * 2 + query_and_output * 256 + 2 * 2 * 2 * 16 * 256 * 2
    )
    assert ops["attention_decode"].bytes == 10 * (
        (100 + 5000) * 2 * 4 * 512 * 2 + query_and_output * 512 + 2 * 2 * 2 * 4 * 512 * 2
    )


def test_sparse_attention_by_hand() -> None:
    """DeepSeek-V3.2: 2048 tokens of each context, and scores of 64 heads of 128 of all."""
    ops = by_name(roofline_of("deepseek-v3.2"), Batch([3000, 1], [1000, 9999]))
    pairs = sum(1000 + j for j in range(1, 3001))
    chosen = sum(min(1000 + j, 2048) for j in range(1, 3001))
    assert ops["attention_prefill"].flops == 61 * 2 * 128 * (576 + 512) * chosen
    assert ops["attention_decode"].flops == 61 * 2 * 128 * (576 + 512) * 2048
    assert ops["attention_decode"].bytes == 61 * (2048 * 576 * 2 + 128 * (576 + 512) * 2)
    assert ops["index_prefill"].flops == 61 * 2 * 64 * 128 * pairs
    assert ops["index_decode"].bytes == 61 * (10_000 * (132 + 4) + 64 * 128)
    assert ops["index_choice"].bytes == 61 * 4 * (pairs + 10_000)
    assert ops["index_k_proj"].flops == 61 * 2 * 3001 * 7168 * (128 + 64)
    assert ops["absorb"].flops == 61 * 2 * 3001 * 128 * 512 * 256
    assert "kv_b_proj" not in ops
    # 16 heads of a rank are computed as 64.
    eighth = by_name(roofline_of("deepseek-v3.2", 8), Batch([1], [9999]))
    assert eighth["attention_decode"].flops == ops["attention_decode"].flops / 2


def test_gated_delta_net_by_hand() -> None:
    """Qwen3-Next: 36 layers of 32 heads with a state of 128 x 128 in 16 bits."""
    ops = by_name(roofline_of("qwen3-next-80b-a3b"), Batch([1000, 1, 1], [0, 10, 100_000]))
    assert ops["linear_in_proj"].flops == 36 * 2 * 1002 * 2048 * (2 * 2048 + 2 * 4096)
    assert ops["linear_gates"].flops == 36 * 2 * 1002 * 2048 * 2 * 32
    assert ops["linear_out_proj"].flops == 36 * 2 * 1002 * 4096 * 2048
    state = 32 * 128 * 128 * 2
    columns = 2 * 2048 + 4096
    assert ops["linear_attention_decode"].bytes == 36 * 2 * (2 * state + (columns + 4096) * 2)
    each = 6 * 128 * 128 + 2 * 64 * (3 * 128 + 2 * 128)
    assert ops["linear_attention_prefill"].flops == 36 * 1000 * 32 * each
    assert ops["linear_attention_prefill"].bytes == 36 * (1000 * (columns + 4096) * 2 + 2 * state)
    moved = 4 * columns * 2 + 1002 * 2 * columns * 2 + 2 * 2 * 3 * columns * 2
    assert ops["linear_conv"].bytes == 36 * moved
    # Attention in the other 12, with queries as wide again for their gate.
    assert ops["qkv_proj"].flops == 12 * 2 * 1002 * 2048 * (2 * 16 + 2 * 2) * 256
    assert ops["attention_gate"].bytes == 12 * 1002 * 3 * 16 * 256 * 2
    assert ops["shared_gate"].flops == 48 * 2 * 1002 * 2048


def test_mamba2_and_experts_on_a_latent_by_hand() -> None:
    """Nemotron 3 Super: 40 Mamba2 blocks, 40 of experts 1024 wide without a gate, 8 attentions."""
    ops = by_name(roofline_of("nemotron-3-super"), Batch([512, 1], [0, 7]))
    value, key = 128 * 64, 8 * 128
    assert ops["linear_in_proj"].flops == 40 * 2 * 513 * 4096 * (2 * value + 2 * key + 128)
    assert "linear_gates" not in ops
    state = 128 * 64 * 128 * 4
    assert ops["linear_attention_decode"].bytes == 40 * (2 * state + (2 * value + 2 * key) * 2)
    each = 128 * (4 * 64 * 128 + 128 * 64) + 8 * 128 * 128
    assert ops["linear_attention_prefill"].flops == 40 * 512 * each
    assert ops["experts_act"].bytes == 40 * 513 * 22 * 2 * 2688 * 2
    routed = 22 * 513 * 2 * 1024 * 2688
    assert 40 * routed < ops["experts_up"].flops < 40 * (routed + 512 * 64 * 2 * 1024 * 2688)
    assert ops["latent_in_proj"].flops == 40 * 2 * 513 * 4096 * 1024
    assert ops["shared_up"].flops == ops["shared_down"].flops == 40 * 2 * 513 * 4096 * 5376
    assert ops["norms"].bytes == 89 * 513 * 4 * 4096 * 2
    assert "rope" not in ops
    sums = by_name(roofline_of("nemotron-3-super", 2), Batch([512, 1], [0, 7]))["all_reduce"]
    assert sums.bytes == 89 * 2 * 1 / 2 * 513 * 4096 * 2


def test_mxfp4_experts_are_read_in_four_bits_and_multiplied_in_sixteen() -> None:
    roofline = roofline_of("gpt-oss-120b")
    batch = Batch([1], [0])
    weights = 36 * 4 * 2880 * 2880 * (0.5 + 1 / 32)
    activations = 36 * 4 * (2880 + 2880) * 2
    assert by_name(roofline, batch)["experts_down"].bytes == pytest.approx(weights + activations)
    dtypes = {op.name: op.dtype for op in roofline.operators}
    assert dtypes["experts_down"] == dtypes["o_proj"] == "bfloat16"


@pytest.mark.parametrize(("tokens", "touched"), [(1, 8.0), (2, 128 * (1 - (120 / 128) ** 2))])
def test_few_tokens_touch_few_experts(tokens: int, touched: float) -> None:
    ops = by_name(roofline_of("qwen3-30b-a3b"), Batch([1] * tokens, [0] * tokens))
    weights = 48 * 2 * 2048 * 768 * 2
    activations = 48 * tokens * 8 * (2048 + 2 * 768) * 2
    assert ops["experts_gate_up"].bytes == pytest.approx(touched * weights + activations)


def test_many_tokens_touch_all_experts() -> None:
    ops = by_name(roofline_of("qwen3-30b-a3b"), Batch([4096], [0]))
    weights = 48 * 128 * 768 * 2048 * 2
    activations = 48 * 4096 * 8 * (2048 + 768) * 2
    assert ops["experts_down"].bytes == pytest.approx(weights + activations)


def test_all_reduce_by_hand() -> None:
    batch = Batch([512], [0])
    assert "all_reduce" not in by_name(roofline_of("llama3-8b"), batch)
    shape = ModelShape.from_hf_config(LLAMA3_8B, tensor_parallel_size=4)
    formula = Roofline(shape, replace(GpuProfile.load("h100-sxm"), factors={}))
    op = by_name(formula, batch)["all_reduce"]
    assert op.bytes == 65 * 2 * 3 / 4 * 512 * 4096 * 2
    assert op.link_ms == pytest.approx(op.bytes / 450e9 * 1e3)
    assert op.ms == op.link_ms + op.overhead_ms


def test_decode_is_bandwidth_bound_and_prefill_compute_bound() -> None:
    """64 requests after 1500 tokens read the weights and 64 * 1501 tokens of KV."""
    roofline = roofline_of("qwen3-8b")
    decode = roofline.predict(Batch([1] * 64, [1500] * 64), SMS)
    moved = 16.4e9 - 151936 * 4096 * 2 + 64 * 1501 * 147456
    assert moved / 3.35e12 * 1e3 < decode.ms < 2 * moved / 3.35e12 * 1e3
    bounds = {op.name: op.bound for op in decode.operators}
    assert bounds["gate_up"] == bounds["attention_decode"] == "bandwidth"

    prefill = roofline.predict(Batch([8192], [0]), SMS)
    flops = sum(op.flops for op in prefill.operators)
    assert flops / 989e12 * 1e3 < prefill.ms < 2 * flops / 989e12 * 1e3
    bounds = {op.name: op.bound for op in prefill.operators}
    assert bounds["gate_up"] == bounds["attention_prefill"] == "compute"
    assert bounds["step"] == "overhead"


def test_explain_names_every_operator_and_its_bound() -> None:
    prediction = roofline_of("qwen3-8b").predict(Batch([2048, 1], [0, 900]), SMS)
    table = prediction.explain()
    assert table.startswith(f"{prediction.ms:.3f} ms on 132 SMs")
    for op in prediction.operators:
        assert op.name in table
    assert prediction.ms == pytest.approx(sum(op.ms for op in prediction.operators))


# One set of formulas, several ways in


@given(MODELS, BATCHES, st.integers(1, SMS))
@settings(max_examples=60)
def test_predict_equals_step_ms(name: str, batch: Batch, num_sms: int) -> None:
    roofline = roofline_of(name)
    ms = roofline.step_ms(roofline.summarize(batch), num_sms)
    assert isinstance(ms, float)
    prediction = roofline.predict(batch, num_sms)
    assert prediction.ms == pytest.approx(ms, rel=1e-12)
    assert sum(op.ms for op in prediction.operators) == pytest.approx(ms, rel=1e-12)


@given(MODELS, BATCHES, BATCHES)
@settings(max_examples=40)
def test_summaries_add_up(name: str, first: Batch, second: Batch) -> None:
    roofline = roofline_of(name)
    both = Batch(
        [*first.query_lens, *second.query_lens], [*first.context_lens, *second.context_lens]
    )
    added = roofline.summarize(first) + roofline.summarize(second)
    whole = roofline.summarize(both)
    for field in fields(BatchSummary):
        assert getattr(added, field.name) == getattr(whole, field.name)
    assert whole.num_tokens == sum(both.query_lens)
    assert whole.num_requests == len(both.query_lens)


@pytest.mark.parametrize("name", ALL)
def test_chunk_summary_equals_summarize(name: str) -> None:
    roofline = roofline_of(name)
    for context in (0, 300, 9000):
        for chunk in (2, 511, 512, 513, 4096):
            expected = roofline.summarize(Batch([chunk], [context]))
            found = roofline.prefill_chunk_summary(chunk, context)
            for field in fields(BatchSummary):
                assert getattr(found, field.name) == getattr(expected, field.name)


@pytest.mark.parametrize("name", ["qwen3-8b", "gemma3-1b", "qwen3-30b-a3b", "deepseek-v2-lite"])
def test_arrays_equal_one_by_one(name: str) -> None:
    roofline = roofline_of(name)
    decode = roofline.summarize(Batch([1] * 40, list(range(100, 4100, 100))))
    chunks, sms = np.arange(0, 2048, 256), np.arange(8, 72, 8)
    mixed = decode + roofline.prefill_chunk_summary(chunks, 700)
    each = [
        decode + roofline.prefill_chunk_summary(int(chunk), 700) if chunk else decode
        for chunk in chunks
    ]

    along = roofline.step_ms(mixed, sms)
    assert along == pytest.approx(
        [roofline.step_ms(m, int(s)) for m, s in zip(each, sms, strict=True)]
    )
    fixed = roofline.step_ms(mixed, SMS)
    assert fixed == pytest.approx([roofline.step_ms(m, SMS) for m in each])
    grid = roofline.step_ms(mixed, sms[:3, None])
    assert isinstance(grid, np.ndarray) and grid.shape == (3, len(chunks))
    assert grid[2] == pytest.approx(roofline.step_ms(mixed, int(sms[2])))

    prefill = roofline.summarize(Batch([3000], [0]))
    pairs = roofline.pair_ms(decode, prefill, sms, SMS - sms)
    singles = [roofline.pair_ms(decode, prefill, int(s), SMS - int(s)) for s in sms]
    assert np.stack(pairs, axis=1) == pytest.approx(np.array(singles))
    chunked = roofline.pair_ms(decode, roofline.prefill_chunk_summary(chunks, 0), 32, 100)
    one = roofline.pair_ms(decode, roofline.prefill_chunk_summary(int(chunks[3]), 0), 32, 100)
    assert (chunked[0][3], chunked[1][3]) == pytest.approx(one)  # type: ignore[index]


def test_no_work_takes_no_time() -> None:
    roofline = roofline_of("qwen3-30b-a3b")
    assert roofline.step_ms(BatchSummary(), SMS) == 0
    assert roofline.step_ms(roofline.prefill_chunk_summary(0, 4000), SMS) == 0
    decode = roofline.summarize(Batch([1], [10]))
    beside = roofline.pair_ms(decode, BatchSummary(), 32, 100)
    assert beside[0] == pytest.approx(roofline.step_ms(decode, 32))
    assert beside[1] == 0


# How it must behave


@given(MODELS, BATCHES)
@settings(max_examples=30)
def test_more_sms_are_never_slower(name: str, batch: Batch) -> None:
    roofline = roofline_of(name)
    ms = roofline.step_ms(roofline.summarize(batch), np.arange(1, SMS + 1))
    assert (np.diff(ms) <= 1e-9 * np.max(ms)).all()


@given(MODELS, st.integers(0, 20000), st.sampled_from([8, 40, 132]))
@settings(max_examples=30)
def test_more_prefill_tokens_are_never_faster(name: str, context: int, num_sms: int) -> None:
    roofline = roofline_of(name)
    ms = roofline.step_ms(roofline.prefill_chunk_summary(np.arange(0, 3000, 7), context), num_sms)
    # Measured factors are made to rise where they stand, on all SMs; between, and on fewer, a
    # factor that falls while the formula's time rises can leave a dent.
    assert (np.diff(ms) >= -DENT * ms[1:]).all()


@given(MODELS, st.integers(1, 64), st.integers(0, 20000))
@settings(max_examples=30)
def test_another_decode_or_a_longer_context_is_never_faster(
    name: str, requests: int, context: int
) -> None:
    roofline = roofline_of(name)

    def ms(count: int, length: int) -> float:
        return roofline.predict(Batch([1] * count, [length] * count), SMS).ms

    assert ms(requests, context) <= ms(requests + 1, context) * (1 + 1e-9)
    assert ms(requests, context) <= ms(requests, context + 100) * (1 + 1e-9)


@given(MODELS, BATCHES, BATCHES)
@settings(max_examples=40)
def test_a_neighbour_never_helps(name: str, decode: Batch, prefill: Batch) -> None:
    roofline = roofline_of(name)
    first, second = roofline.summarize(decode), roofline.summarize(prefill)
    sms = np.arange(8, SMS, 8)
    beside = roofline.pair_ms(first, second, sms, SMS - sms)
    alone = roofline.step_ms(first, sms), roofline.step_ms(second, SMS - sms)
    for together, single in zip(beside, alone, strict=True):
        assert (together >= single * (1 - 1e-12)).all()  # type: ignore[union-attr]


def test_two_bandwidth_bound_lanes_halve_each_other() -> None:
    """On half the SMs each could have most of the bus, together no more than all."""
    roofline = roofline_of("llama3-8b")
    decode = Batch([1] * 128, [20000] * 128)
    pair = roofline.predict_pair(decode, decode, 66, 66)
    whole = roofline.predict(decode, SMS)
    assert pair.decode_ms == pytest.approx(pair.prefill_ms)
    assert pair.decode.ms < 1.2 * whole.ms
    assert pair.decode_ms == pytest.approx(2 * whole.ms, rel=0.1)


def test_contention_scales_what_two_lanes_take_from_each_other() -> None:
    roofline = roofline_of("llama3-8b")
    decode = roofline.summarize(Batch([1] * 128, [20000] * 128))

    def added_ms(contention: float) -> float:
        other = Roofline(roofline.shape, replace(roofline.profile, contention=contention))
        return other.pair_ms(decode, decode, 66, 66)[0] - other.step_ms(decode, 66)

    assert added_ms(0.0) == 0
    some, twice, thrice = (added_ms(c) for c in (1.0, 2.0, 3.0))
    assert 0 < added_ms(0.5) < some < twice
    # Beyond the first step the bus bounds every operator, and its time is linear.
    assert thrice - twice == pytest.approx(twice - some)


@given(BATCHES, BATCHES, st.integers(8, SMS - 8))
@settings(max_examples=40)
def test_at_contention_one_memory_time_grows_by_the_demand(
    decode: Batch, prefill: Batch, sms: int
) -> None:
    """To the last bit, by the rule without a factor: forecasts of profiles that have
    no contention stay what they were."""
    roofline = roofline_of("qwen3-8b")
    lanes = roofline.summarize(decode), roofline.summarize(prefill)
    found = roofline.pair_ms(*lanes, sms, SMS - sms)
    unoverlapped = roofline._tables[1][2]
    alone = []
    for summary, count in zip(lanes, (sms, SMS - sms), strict=True):
        features = np.array(roofline._features(summary))[:, None]
        alone.append(step_times(*roofline._tables, features, np.array([count])))
    for lane in (0, 1):
        compute, memory, bus, busy, total = alone[lane]
        other = alone[1 - lane]
        # Added up in the kernel's order, as np.sum's would round otherwise.
        drawn = np.minimum(other[2], other[3])[:, 0].tolist()
        beside = sum(drawn) / max(other[4][0], 1e-12)
        expected = total[0]
        for k, u in enumerate(unoverlapped):
            demand = min(bus[k, 0] / max(busy[k, 0], 1e-12), 1.0) + beside
            if demand > 1:
                first, second = compute[k, 0], memory[k, 0] * demand
                expected += max(first, second) + u * min(first, second) - busy[k, 0]
        assert found[lane] == expected


def test_a_compute_bound_neighbour_costs_little() -> None:
    pair = roofline_of("qwen3-8b").predict_pair(
        Batch([1] * 64, [1500] * 64), Batch([4096], [0]), 32, 100
    )
    assert pair.decode.ms <= pair.decode_ms < 1.2 * pair.decode.ms
    assert pair.prefill.ms <= pair.prefill_ms < 1.2 * pair.prefill.ms
    assert "decode alone" in pair.explain() and "prefill" in pair.explain()


def test_gpu_without_fp8_computes_in_sixteen_bits() -> None:
    shape = ModelShape.from_hf_config(QWEN3_8B, weight_dtype="fp8")
    # What is measured of products in 16 bits says nothing about these.
    profile = replace(GpuProfile.load("a100-sxm-80g"), factors={})
    roofline = Roofline(shape, profile)
    plain = Roofline(ModelShape.from_hf_config(QWEN3_8B), profile)
    batch = Batch([4096], [0])
    quantized_ms, plain_ms = (
        {op.name: op.compute_ms for op in r.predict(batch, 108).operators}["gate_up"]
        for r in (roofline, plain)
    )
    assert quantized_ms == plain_ms


@pytest.mark.parametrize("config", [LLAMA3_8B, GEMMA3_1B, QWEN3_30B_A3B, DEEPSEEK_V2_LITE])
@pytest.mark.parametrize("profile", GpuProfile.names())
def test_every_profile_serves_every_family(config: dict[str, object], profile: str) -> None:
    gpu = GpuProfile.load(profile)
    prediction = Roofline(ModelShape.from_hf_config(config), gpu).predict(
        Batch([500, 1], [0, 2000]), gpu.num_sms
    )
    assert 0 < prediction.ms < 1000


# Mistakes


@pytest.mark.parametrize(
    ("query", "context", "message"),
    [
        ([1, 2], [1], "equal length"),
        ([], [], "not empty"),
        ([0], [1], "every query length must be at least 1, not 0"),
        ([1], [-1], "every context length must be at least 0, not -1"),
        ([1.5], [1], "query_lens must hold integers"),
        ([1], ["a"], "context_lens must hold integers"),
    ],
)
def test_bad_batches(query: list[int], context: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(query, context)


def test_bad_sampled_count() -> None:
    with pytest.raises(ValueError, match="num_sampled must be at least 0"):
        Batch([1], [0], num_sampled=-1)


def test_batch_keeps_its_own_read_only_copy() -> None:
    given_lens = np.array([5, 6])
    batch = Batch(given_lens, [0, 0])
    given_lens[0] = 9
    assert list(batch.query_lens) == [5, 6]
    with pytest.raises(ValueError, match="read-only"):
        batch.query_lens[0] = 1  # type: ignore[index]


@pytest.mark.parametrize("num_sms", [0, -8, 133])
def test_sms_out_of_range(num_sms: int) -> None:
    roofline = roofline_of("qwen3-8b")
    summary = roofline.summarize(Batch([1], [0]))
    with pytest.raises(ValueError, match=rf"within 1\.\.132, not {num_sms}"):
        roofline.step_ms(summary, num_sms)
    with pytest.raises(ValueError, match=rf"within 1\.\.132, not {num_sms}"):
        roofline.pair_ms(summary, summary, np.array([8, num_sms]), 8)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="groups of 64 and 72 SMs do not fit h100-sxm's 132"):
        roofline_of("qwen3-8b").predict_pair(Batch([1], [0]), Batch([9], [0]), 64, 72)


@pytest.mark.parametrize(
    "config", [QWEN3_8B, GEMMA3_1B, LLAMA4_SCOUT], ids=["full", "windowed", "chunked"]
)
def test_quick_summaries_equal_summarize(config: dict[str, Any]) -> None:
    roofline = Roofline(ModelShape.from_hf_config(config), GpuProfile.load("h100-sxm"))
    contexts = [0, 5, 900, 4095, 20_000, 8191]
    queries = [2, 300, 700, 9, 4000, 30_000]
    pairs = [
        (roofline.decode_summary(contexts), Batch([1] * len(contexts), contexts)),
        (roofline.prefill_summary(queries, contexts), Batch(queries, contexts)),
    ]
    for ours, batch in pairs:
        theirs = roofline.summarize(batch)
        for field in fields(theirs):
            assert getattr(ours, field.name) == getattr(theirs, field.name)


@pytest.mark.parametrize("config", [QWEN3_8B, GEMMA3_1B], ids=["full", "windowed"])
def test_drafts_are_rows_that_read_the_kv_cache_once(config: dict[str, Any]) -> None:
    roofline = Roofline(ModelShape.from_hf_config(config), GpuProfile.load("h100-sxm"))
    contexts = [0, 900, 4095, 20_000] * 30
    one, four = (roofline.decode_summary(contexts, tokens) for tokens in (1, 4))
    assert four.decode_tokens == four.num_sampled == 4 * len(contexts)
    assert four.decode_kv_tokens == sum(context + 4 for context in contexts)
    assert four.decode_window_kv_tokens <= one.decode_window_kv_tokens + 3 * len(contexts)
    times = [float(roofline.step_ms(s, 132)) for s in (one, four)]
    apart = float(roofline.step_ms(roofline.decode_summary(contexts * 4), 132))
    assert times[0] < times[1] < apart


def test_compiled_code_knows_the_rows_of_the_features() -> None:
    """Its constants are its own, since Numba's cache would not notice if FEATURES changed."""
    rows = {
        name: row
        for name, row in vars(kernels).items()
        if name.startswith("_") and name[1:].isupper() and isinstance(row, int)
    }
    named = {"_" + name.removesuffix("_touched").upper(): i for i, name in enumerate(FEATURES)}
    assert len(rows) == 10 and rows == {name: named[name] for name in rows}


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_code_is_kept_for_the_next_start(tmp_path: Path, writable: bool) -> None:
    """In processes of their own, with an empty cache; or where Numba finds no folder for one."""
    nowhere = "" if writable else "caching.CacheImpl._locator_classes = []"
    code = f"""
from numba.core import caching
{nowhere}
from vllm_duet.roofline.kernels import combined
print(combined(1.0, 2.0, 0.5), sum(getattr(combined, "stats").cache_hits.values()))
"""
    shown = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in shown] == [
        ["2.5", "0"],
        ["2.5", "1" if writable else "0"],
    ], shown[0].stderr
