# SPDX-License-Identifier: Apache-2.0
"""Shapes against hand arithmetic and the published parameter counts."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hf_configs import (
    ALL,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V3_2,
    GEMMA2_9B,
    GEMMA3_1B,
    GEMMA4_26B_A4B,
    GEMMA4_31B,
    GLM_4_5,
    GLM_5,
    GPT_OSS_20B,
    GPT_OSS_120B,
    LLAMA2_7B,
    LLAMA3_8B,
    LLAMA4_MAVERICK,
    LLAMA4_SCOUT,
    MINISTRAL_3_8B,
    MINISTRAL_8B_2410,
    MISTRAL_7B,
    MISTRAL_SMALL_3_2,
    MIXTRAL_8X7B,
    NEMOTRON_3_NANO,
    NEMOTRON_3_SUPER,
    NEMOTRON_H_56B,
    PHI3_MINI,
    QWEN2_57B_A14B,
    QWEN3_5_27B,
    QWEN3_5_35B_A3B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN3_NEXT_80B_A3B,
    Config,
    config,
)

from vllm_duet.roofline import ModelShape, UnsupportedArchitectureError
from vllm_duet.roofline.operators import operators


def test_qwen3_8b_by_hand() -> None:
    shape = ModelShape.from_hf_config(QWEN3_8B)
    layer = 4096 * (32 + 8 + 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288
    assert shape.weight_bytes == 2 * (36 * layer + 2 * 151936 * 4096)
    assert shape.weight_bytes == pytest.approx(16.4e9, rel=0.01)
    assert shape.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2 == 147456
    assert shape.qk_norm and shape.sliding_window is None


@pytest.mark.parametrize(
    ("hf_config", "parameters"),
    [
        (LLAMA2_7B, 6.74e9),
        (LLAMA3_8B, 8.03e9),
        (MISTRAL_7B, 7.24e9),
        (PHI3_MINI, 3.82e9),
        (GEMMA2_9B, 9.24e9),
        (GEMMA3_1B, 1.0e9),
        (MIXTRAL_8X7B, 46.7e9),
        (QWEN3_30B_A3B, 30.5e9),
        (QWEN2_57B_A14B, 57.4e9),
        (DEEPSEEK_V2_LITE, 15.7e9),
    ],
)
def test_published_parameter_counts(hf_config: Config, parameters: float) -> None:
    shape = ModelShape.from_hf_config(hf_config)
    assert shape.weight_bytes / 2 == pytest.approx(parameters, rel=0.01)


PUBLISHED = {
    "gpt-oss-120b": ("116.8B", "5.13B", "lm_head"),
    "gpt-oss-20b": ("20.9B", "3.61B", "lm_head"),
    "glm-4.5": ("355B", "32B", "neither"),
    "glm-4.5-air": ("106B", "12B", "neither"),
    "glm-4.7-flash": ("30B", "3B", "neither"),
    "glm-5": ("744B", "40B", "neither"),
    "deepseek-v3": ("671B", "37B", "lm_head"),
    "deepseek-v3.2": ("671B", "37B", "lm_head"),
    "llama4-scout": ("109B", "17B", "both"),
    "llama4-maverick": ("400B", "17B", "both"),
    "qwen3-30b-a3b": ("30.5B", "3.3B", "both"),
    "qwen3-next-80b-a3b": ("80B", "3B", "neither"),
    "qwen3.5-27b": ("27B", "27B", "both"),
    "qwen3.5-35b-a3b": ("35B", "3B", "both"),
    "gemma4-31b": ("30.7B", "30.7B", "both"),
    "gemma4-26b-a4b": ("25.2B", "3.8B", "both"),
    "mistral-small-3.2": ("24B", "24B", "both"),
    "ministral-3-8b": ("8.4B", "8.4B", "both"),
    "ministral-8b-2410": ("8.02B", "8.02B", "both"),
    "nemotron-h-56b": ("56B", "56B", "both"),
    "nemotron-3-nano": ("31.6B", "3.2B", "lm_head"),
    "nemotron-3-super": ("120.6B", "12.7B", "both"),
}
"""Parameters, those that are active for a token, and whether embedding and lm_head are active, as
the publishers count: the model cards on Hugging Face, of gpt-oss OpenAI's model card, of Nemotron 3
and GLM-4.5 the technical reports. Text alone: Llama 4's and Gemma 4's total is within the tolerance
with or without the images' part, Ministral 3's is the language model's."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_total_and_active_parameters(name: str) -> None:
    total, active, ends = PUBLISHED[name]
    shape = ModelShape.from_hf_config(ALL[name])
    end = shape.vocab_size * shape.hidden_size
    found = shape.num_active_parameters
    if ends == "both" and not shape.tied_embeddings:
        found += end
    elif ends == "neither":
        found -= end
    assert _is_published(shape.num_parameters, total)
    assert _is_published(found, active)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Qwen--Qwen3.5-122B-A10B", "122B", "10B"),
        ("Qwen--Qwen3.5-397B-A17B", "397B", "17B"),
        ("nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", "550B", "55B"),
        ("moonshotai--Kimi-K2-Instruct", "1T", "32B"),
        ("moonshotai--Kimi-K2.5", "1T", "32B"),
        ("MiniMaxAI--MiniMax-M2.5", "230B", "10B"),
    ],
)
def test_published_parameters_of_whole_config_files(name: str, total: str, active: str) -> None:
    """As Hugging Face has them, in aiconfigurator-core."""
    shape = ModelShape.from_hf_config(_config_file(name))
    if total.endswith("T"):
        assert round(shape.num_parameters / 1e12) == 1
    else:
        assert _is_published(shape.num_parameters, total)
    embedding = shape.vocab_size * shape.hidden_size
    assert _is_published(shape.num_active_parameters + embedding, active) or _is_published(
        shape.num_active_parameters, active
    )


def _config_file(name: str) -> Path:
    package = importlib.util.find_spec("aiconfigurator_core")
    if package is None or package.origin is None:
        pytest.skip("aiconfigurator-core is not installed")
    return Path(package.origin).parent / "model_configs" / f"{name}_config.json"


@pytest.mark.parametrize(
    ("name", "weights", "experts"),
    [
        ("MiniMaxAI--MiniMax-M2.5", "fp8_block", "fp8_block"),
        ("nvidia--MiniMax-M2.5-NVFP4", "bfloat16", "nvfp4"),
        ("moonshotai--Kimi-K2.5", "bfloat16", "int4_group32"),
        ("openai--gpt-oss-120b", "bfloat16", "mxfp4"),
    ],
)
def test_what_is_quantized_in_published_configs(name: str, weights: str, experts: str) -> None:
    shape = ModelShape.from_hf_config(_config_file(name))
    assert (shape.weight_dtype, shape.expert_dtype) == (weights, experts)
    given = ModelShape.from_hf_config(_config_file(name), weight_dtype="fp8")
    assert (given.weight_dtype, given.expert_dtype) == ("fp8", "fp8")


def test_minimax_ranks_sum_the_squares_of_q_and_k() -> None:
    one, four = (
        {op.name: op for op in operators(ModelShape.from_hf_config(file, tensor_parallel_size=n))}
        for file in (_config_file("MiniMaxAI--MiniMax-M2.5"),)
        for n in (1, 4)
    )
    assert "qk_norm_sum" not in one
    assert four["qk_norm_sum"].repeats == 62
    assert four["qk_norm_sum"].bytes["tokens"] == 2 * 3 / 4 * 2 * 4


def test_shared_experts_that_are_quantized_beside_plain_attention_are_not_guessed() -> None:
    file = json.loads(_config_file("moonshotai--Kimi-K2.5").read_text())
    ignored = file["text_config"]["quantization_config"]["ignore"]
    ignored[:] = [name for name in ignored if "shared_experts" not in name]
    with pytest.raises(UnsupportedArchitectureError, match="part of its layers quantized"):
        ModelShape.from_hf_config(file)
    ignored[:] = ["lm_head"]
    assert ModelShape.from_hf_config(file).weight_dtype == "int4_group32"


def test_kimi_has_a_scale_for_each_32_weights_of_its_experts() -> None:
    shape = ModelShape.from_hf_config(_config_file("moonshotai--Kimi-K2.5"))
    wider = replace(shape, experts=replace(shape.experts, weight_dtype="int4"))
    weights = 60 * 384 * 3 * 7168 * 2048
    more = 2 / 32 - 2 / 128
    assert shape.weight_bytes - wider.weight_bytes == pytest.approx(more * weights)


def _is_published(found: int, published: str) -> bool:
    """Within 2 %, or the same when it is rounded to the published digits."""
    figure = published.removesuffix("B")
    decimals = len(figure.partition(".")[2])
    close = found / 1e9 == pytest.approx(float(figure), rel=0.02)
    return close or round(found / 1e9, decimals) == float(figure)


def test_gpt_oss_in_mxfp4_is_as_large_as_its_checkpoint() -> None:
    """60.8 and 12.8 GiB by OpenAI's model card: four bits in the experts, 16 in all else."""
    for hf_config, gib in ((GPT_OSS_120B, 60.8), (GPT_OSS_20B, 12.8)):
        shape = ModelShape.from_hf_config(hf_config)
        assert (shape.weight_dtype, shape.expert_dtype) == ("bfloat16", "mxfp4")
        assert shape.compute_dtype == shape.multiplied_in(shape.expert_dtype) == "bfloat16"
        assert shape.weight_bytes / 2**30 == pytest.approx(gib, rel=0.005)
    renamed = {**GPT_OSS_20B, "quantization_config": {"quant_method": "gpt_oss_mxfp4"}}
    assert ModelShape.from_hf_config(renamed) == shape
    plain = ModelShape.from_hf_config({**GPT_OSS_20B, "quantization_config": None})
    assert plain.weight_bytes == 2 * plain.num_parameters
    with pytest.raises(UnsupportedArchitectureError, match="'mxfp4' of Qwen3MoeForCausalLM"):
        ModelShape.from_hf_config(
            {**QWEN3_30B_A3B, "quantization_config": {"quant_method": "mxfp4"}}
        )


@pytest.mark.parametrize(
    ("hf_config", "kv_bytes", "state_bytes"),
    [
        (GPT_OSS_120B, 36 * 2 * 8 * 64 * 2, 0),
        (LLAMA4_SCOUT, 48 * 2 * 8 * 128 * 2, 0),
        # 50 layers of 16 heads of 256, ten of 4 heads of 512.
        (GEMMA4_31B, (50 * 2 * 16 * 256 + 10 * 2 * 4 * 512) * 2, 0),
        # The latent, and a key in fp8 with its scale in the layers that have an indexer.
        (DEEPSEEK_V3_2, 61 * (576 * 2 + 132), 0),
        # A state of 128 x 128 a head and three tokens of keys, queries and values.
        (QWEN3_NEXT_80B_A3B, 12 * 2 * 2 * 256 * 2, 36 * (32 * 128 * 128 * 2 + 3 * 8192 * 2)),
        (QWEN3_5_27B, 16 * 2 * 4 * 256 * 2, 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)),
        (NEMOTRON_3_NANO, 6 * 2 * 2 * 128 * 2, 23 * (64 * 64 * 128 * 4 + 3 * 6144 * 2)),
    ],
)
def test_what_a_token_and_a_request_cache(
    hf_config: Config, kv_bytes: int, state_bytes: int
) -> None:
    shape = ModelShape.from_hf_config(hf_config)
    assert shape.kv_bytes_per_token == kv_bytes
    assert shape.state_bytes_per_request == state_bytes


def test_sparse_attention_caches_packed_latents_in_fp8() -> None:
    shape = ModelShape.from_hf_config(DEEPSEEK_V3_2, kv_dtype="fp8")
    assert shape.kv_bytes_per_token == 61 * (656 + 132)
    dense = ModelShape.from_hf_config(DEEPSEEK_V3, kv_dtype="fp8")
    assert dense.kv_bytes_per_token == 61 * 576


@pytest.mark.parametrize(
    ("hf_config", "attention", "window", "linear", "dense", "experts"),
    [
        (GPT_OSS_120B, 36, 18, 0, 0, 36),
        (GLM_4_5, 92, 0, 0, 3, 89),
        (LLAMA4_SCOUT, 48, 36, 0, 0, 48),
        (LLAMA4_MAVERICK, 48, 36, 0, 24, 24),
        (GEMMA4_26B_A4B, 30, 25, 0, 30, 30),
        (DEEPSEEK_V3_2, 61, 61, 0, 3, 58),
        (QWEN3_NEXT_80B_A3B, 12, 0, 36, 0, 48),
        (QWEN3_5_27B, 16, 0, 48, 64, 0),
        (QWEN3_5_35B_A3B, 10, 0, 30, 0, 40),
        (NEMOTRON_H_56B, 10, 0, 54, 54, 0),
        (NEMOTRON_3_NANO, 6, 0, 23, 0, 23),
        (MINISTRAL_8B_2410, 36, 36, 0, 36, 0),
        (MISTRAL_SMALL_3_2, 40, 0, 0, 40, 0),
    ],
)
def test_layers_by_kind(
    hf_config: Config, attention: int, window: int, linear: int, dense: int, experts: int
) -> None:
    shape = ModelShape.from_hf_config(hf_config)
    assert shape.num_attention_layers == attention
    assert shape.num_window_layers == window
    assert (shape.linear_attention.num_layers if shape.linear_attention else 0) == linear
    assert shape.num_dense_layers == dense
    assert (shape.experts.num_layers if shape.experts else 0) == experts


def test_llama4_has_no_rotary_embedding_where_it_sees_everything() -> None:
    shape = ModelShape.from_hf_config(LLAMA4_SCOUT)
    assert (shape.num_rope_layers, shape.num_full_layers, shape.chunked_window) == (36, 12, True)
    text = {**LLAMA4_SCOUT["text_config"], "no_rope_layers": [1, 0] * 24}
    assert ModelShape.from_hf_config({**LLAMA4_SCOUT, "text_config": text}).num_rope_layers == 24


def test_indexers_that_layers_share() -> None:
    """GLM-5.2 has one in layers 0, 1, 2 and each fourth after that."""
    shared = {**GLM_5, "index_topk_freq": 4, "index_skip_topk_offset": 3}
    for hf_config, layers in (
        (GLM_5, 78),
        (shared, 21),
        ({**GLM_5, "index_topk_pattern": "F" * 10 + "S" * 68}, 10),
    ):
        shape = ModelShape.from_hf_config(hf_config)
        assert shape.indexer is not None and shape.indexer.num_layers == layers


def test_gemma4_as_transformers_writes_it_again() -> None:
    """Its to_dict() has the heads of full layers by layer, with text for the numbers."""
    text = {
        key: value
        for key, value in GEMMA4_31B["text_config"].items()
        if key not in ("global_head_dim", "num_global_key_value_heads")
    }
    full = {f"{i:02}": {"head_dim": 512, "num_key_value_heads": 4} for i in range(5, 60, 6)}
    again = {**GEMMA4_31B, "text_config": {**text, "per_layer_config": full}}
    assert ModelShape.from_hf_config(again) == ModelShape.from_hf_config(GEMMA4_31B)
    full["05"] = {"head_dim": 256}
    with pytest.raises(UnsupportedArchitectureError, match="per_layer_config"):
        ModelShape.from_hf_config(again)


def test_nemotron_h_as_transformers_writes_it_again() -> None:
    """Blocks by name, old or new, in place of letters, and no num_hidden_layers."""
    letters = NEMOTRON_3_NANO["hybrid_override_pattern"]
    rest = {
        key: value
        for key, value in NEMOTRON_3_NANO.items()
        if key not in ("hybrid_override_pattern", "num_hidden_layers")
    }
    expected = ModelShape.from_hf_config(NEMOTRON_3_NANO)
    for names in (
        {"M": "mamba", "*": "attention", "E": "moe"},
        {"M": "linear_attention", "*": "full_attention", "E": "moe"},
    ):
        again = {**rest, "layers_block_type": [names[letter] for letter in letters]}
        assert ModelShape.from_hf_config(again) == expected
    with pytest.raises(UnsupportedArchitectureError, match="blocks conv"):
        ModelShape.from_hf_config({**rest, "layers_block_type": ["conv"]})
    with pytest.raises(ValueError, match="'hybrid_override_pattern', which is missing"):
        ModelShape.from_hf_config(rest)


@pytest.mark.parametrize(
    ("hf_config", "changes", "message"),
    [
        (GEMMA4_31B, {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input 256"),
        (GEMMA4_31B, {"num_kv_shared_layers": 20}, "num_kv_shared_layers 20"),
        (MINISTRAL_3_8B, {"model_type": "mistral4"}, "a text model of type 'mistral4'"),
        (QWEN3_5_27B, {"layer_types": ["conv"] * 64}, "layer_types conv"),
    ],
)
def test_what_a_known_name_does_not_cover(hf_config: Config, changes: Config, message: str) -> None:
    text = {**hf_config["text_config"], **changes}
    with pytest.raises(UnsupportedArchitectureError, match=message):
        ModelShape.from_hf_config({**hf_config, "text_config": text})


def test_an_absent_key_of_gemma4_is_what_transformers_takes() -> None:
    """Per-layer inputs of 256, which are not modelled: never a shape without them."""
    text = {
        k: v for k, v in GEMMA4_31B["text_config"].items() if k != "hidden_size_per_layer_input"
    }
    with pytest.raises(UnsupportedArchitectureError, match="hidden_size_per_layer_input 256"):
        ModelShape.from_hf_config({**GEMMA4_31B, "text_config": text})


def test_linear_attention_shards_by_head() -> None:
    whole = ModelShape.from_hf_config(NEMOTRON_3_SUPER)
    half = ModelShape.from_hf_config(NEMOTRON_3_SUPER, tensor_parallel_size=2)
    assert half.state_bytes_per_request == whole.state_bytes_per_request / 2
    with pytest.raises(ValueError, match=r"128 heads and 8 key heads.* over 16 ranks"):
        ModelShape.from_hf_config(NEMOTRON_3_SUPER, tensor_parallel_size=16)


def test_deepseek_v3_is_fp8_with_a_latent_cache() -> None:
    shape = ModelShape.from_hf_config(DEEPSEEK_V3)
    # 671e9 parameters, a byte each, and the second byte of embedding, lm_head, routers.
    plain = 2 * 129280 * 7168 + 58 * 7168 * 256
    assert shape.weight_bytes == pytest.approx(671e9 + plain, rel=0.01)
    assert shape.kv_bytes_per_token == 61 * (512 + 64) * 2
    assert shape.num_dense_layers == 3
    assert shape.experts is not None and shape.experts.num_layers == 58


def test_latent_attention_without_query_compression_by_hand() -> None:
    shape = ModelShape.from_hf_config(DEEPSEEK_V2_LITE)
    attention = 2048 * (512 + 64) + 2048 * 16 * 192 + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    expert_layer = 3 * 2048 * 1408 * (64 + 2) + 2048 * 64
    total = 27 * attention + 26 * expert_layer + 3 * 2048 * 10944 + 2 * 102400 * 2048
    assert shape.weight_bytes == 2 * total


@pytest.mark.parametrize(
    ("hf_config", "window_layers"),
    [
        (MISTRAL_7B, 32),
        (PHI3_MINI, 32),
        (GEMMA2_9B, 21),
        (GEMMA3_1B, 22),
        (MIXTRAL_8X7B, 0),
        ({**MISTRAL_7B, "sliding_window": None}, 0),
        ({**QWEN3_8B, "sliding_window": 4096, "use_sliding_window": False}, 0),
        (
            {
                **QWEN3_8B,
                "sliding_window": 4096,
                "use_sliding_window": True,
                "max_window_layers": 28,
            },
            8,
        ),
        (
            {**GEMMA3_1B, "layer_types": ["sliding_attention"] * 20 + ["full_attention"] * 6},
            20,
        ),
    ],
)
def test_sliding_window_layers(hf_config: Config, window_layers: int) -> None:
    shape = ModelShape.from_hf_config(hf_config)
    assert shape.num_window_layers == window_layers
    assert (shape.sliding_window is not None) == bool(window_layers)


def test_sparse_and_dense_layers_of_qwen_moe() -> None:
    shape = ModelShape.from_hf_config(
        {**QWEN3_30B_A3B, "decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}
    )
    # Layers 1, 3, ..., 47 but for 1.
    assert shape.experts is not None and shape.experts.num_layers == 23
    assert shape.num_dense_layers == 25


@pytest.mark.parametrize(
    ("quantization", "dtype", "compute"),
    [
        ({"quant_method": "fp8"}, "fp8", "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4", "bfloat16"),
        ({"quant_method": "gptq", "bits": 4}, "int4", "bfloat16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"type": "int", "num_bits": 8},
                        "input_activations": {"type": "int", "num_bits": 8},
                    }
                },
            },
            "int8",
            "int8",
        ),
    ],
)
def test_quantization(quantization: Config, dtype: str, compute: str) -> None:
    shape = ModelShape.from_hf_config({**QWEN3_8B, "quantization_config": quantization})
    assert (shape.weight_dtype, shape.compute_dtype) == (dtype, compute)
    assert shape.kv_dtype == "bfloat16"


def test_int4_keeps_the_embeddings_in_sixteen_bits() -> None:
    shape = ModelShape.from_hf_config(QWEN3_8B, weight_dtype="int4")
    embeddings = 2 * 151936 * 4096 * 2
    linear = ModelShape.from_hf_config(QWEN3_8B).weight_bytes - embeddings
    assert shape.weight_bytes == pytest.approx(embeddings + linear / 2 * (0.5 + 2 / 128))


def test_fp8_cache_halves_the_cache_and_nothing_else() -> None:
    full, half = (ModelShape.from_hf_config(QWEN3_8B, kv_dtype=k) for k in ("auto", "fp8"))
    assert half.kv_bytes_per_token == full.kv_bytes_per_token / 2
    assert half.weight_bytes == full.weight_bytes


def test_tensor_parallel_shards_weights_and_replicates_scarce_kv_heads() -> None:
    whole = ModelShape.from_hf_config(QWEN3_8B)
    quarter = ModelShape.from_hf_config(QWEN3_8B, tensor_parallel_size=4)
    assert quarter.weight_bytes == whole.weight_bytes / 4
    assert quarter.kv_bytes_per_token == whole.kv_bytes_per_token / 4
    sixteenth = ModelShape.from_hf_config(QWEN3_8B, tensor_parallel_size=16)
    assert sixteenth.local_kv_heads == 1
    assert sixteenth.kv_bytes_per_token == whole.kv_bytes_per_token / 8


def test_float32_checkpoints_run_in_sixteen_bits() -> None:
    shape = ModelShape.from_hf_config({**QWEN3_8B, "torch_dtype": "torch.float32"})
    assert shape.activation_dtype == "bfloat16"


def test_nested_text_config() -> None:
    nested = {k: v for k, v in GEMMA3_1B.items() if k != "architectures"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": nested}
    text = ModelShape.from_hf_config(GEMMA3_1B)
    assert ModelShape.from_hf_config(outer).weight_bytes == text.weight_bytes


def test_reads_a_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    expected = ModelShape.from_hf_config(QWEN3_8B)
    assert ModelShape.from_hf_config(tmp_path) == expected
    assert ModelShape.from_hf_config(str(tmp_path / "config.json")) == expected


@pytest.mark.parametrize("name", ALL)
def test_every_family_is_hashable_and_frozen(name: str) -> None:
    shape = ModelShape.from_hf_config(ALL[name])
    assert hash(shape) == hash(ModelShape.from_hf_config(ALL[name]))


def test_unknown_architecture_names_itself_and_the_supported() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"MambaForCausalLM.*Qwen3ForCausalLM"):
        ModelShape.from_hf_config(config("MambaForCausalLM"))
    with pytest.raises(UnsupportedArchitectureError, match="none given"):
        ModelShape.from_hf_config({})


def test_unknown_quantization_is_an_error() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'exl2' of Qwen3ForCausalLM"):
        ModelShape.from_hf_config({**QWEN3_8B, "quantization_config": {"quant_method": "exl2"}})


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "num_hidden_layers"])
def test_missing_key_is_named(key: str) -> None:
    without = {k: v for k, v in QWEN3_8B.items() if k != key}
    with pytest.raises(ValueError, match=f"Qwen3ForCausalLM needs an integer '{key}'"):
        ModelShape.from_hf_config(without)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 3}, "32 attention heads do not divide over 3 ranks"),
        ({"tensor_parallel_size": 0}, "at least 1, not 0"),
        ({"weight_dtype": "nf4"}, "weight_dtype 'nf4' is not one of"),
        ({"kv_dtype": "int3"}, "kv_dtype 'int3' is not one of"),
    ],
)
def test_wrong_arguments(arguments: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.from_hf_config(QWEN3_8B, **arguments)
