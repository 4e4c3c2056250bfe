# SPDX-License-Identifier: Apache-2.0
"""Shapes against hand arithmetic and the published parameter counts."""

import json
from pathlib import Path

import pytest
from hf_configs import (
    ALL,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GEMMA2_9B,
    GEMMA3_1B,
    LLAMA2_7B,
    LLAMA3_8B,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    PHI3_MINI,
    QWEN2_57B_A14B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    Config,
    config,
)

from vllm_duet.roofline import ModelShape, UnsupportedArchitectureError


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
