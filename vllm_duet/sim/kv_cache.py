# SPDX-License-Identifier: Apache-2.0
"""The KV cache that vLLM plans for a model: its own rules, on sizes that a ModelShape knows.

No layer is built for it, so no GPU, no weights, and none of the libraries that a
model's images need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_duet.roofline import ModelShape

BLOCK_SIZE = 16

_TEXT_MODELS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "KimiK25ForConditionalGeneration": "DeepseekV3ForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM",
    # A class of their own needs torchvision even for text; a scheduler asks no more of them than
    # whether they have linear attention.
    "Qwen3_5ForCausalLM": "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM": "Qwen3NextForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3NextForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3NextForCausalLM",
}


def text_model(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model alone, as a scheduler's engine can be configured with.

    Text alone is served, as with vLLM's --language-model-only.
    """
    text = dict(hf_config.get("text_config") or hf_config)
    name = (hf_config.get("architectures") or [""])[0]
    text["architectures"] = [_TEXT_MODELS.get(name, name)]
    # The repository's code, and what a CPU's vLLM might not run: a scheduler needs neither.
    for key in ("auto_map", "quantization_config"):
        text.pop(key, None)
    # Positions of images, which vLLM takes out for a text model too.
    rope = dict(text.get("rope_parameters") or {})
    if rope.pop("mrope_section", None):
        rope.pop("mrope_interleaved", None)
        text["rope_parameters"] = rope
    return text


def kv_cache_config(config: VllmConfig, shape: ModelShape) -> KVCacheConfig:
    """Groups of layers, and as many blocks as there is room for.

    Room is that of ``config.cache_config.num_gpu_blocks`` blocks of BLOCK_SIZE tokens in all
    layers. Sets what depends on the groups in ``config``: the block size, and whether layers with
    windows have blocks of their own, which a CPU's vLLM denies and a GPU's for Llama 4 alone.

    Raises:
        ValueError: a request of the longest length does not fit.
    """
    config.scheduler_config.disable_hybrid_kv_cache_manager = shape.chunked_window
    cache = config.cache_config
    room = int(cache.num_gpu_blocks * BLOCK_SIZE * shape.kv_bytes_per_token)
    cache.block_size = _block_size(shape)
    cache.kv_cache_layout = "LBNHC"  # vLLM's preference where a backend has none
    groups = get_kv_cache_groups(config, layer_specs(config, shape))
    # Groups share the blocks, which are as wide as the widest group.
    cache.num_gpu_blocks = room // max(map(_block_bytes, groups))
    longest = sum(
        group.kv_cache_spec.max_memory_usage_bytes(config) // group.kv_cache_spec.page_size_bytes
        for group in groups
    )
    # vLLM keeps one block for itself. Without states the caller sees to it.
    if shape.linear_attention and longest >= cache.num_gpu_blocks:
        raise ValueError(
            f"the KV cache of {room / 1e9:.1f} GB does not hold {shape.architecture}'s states and"
            f" {config.model_config.max_model_len} tokens of one request: set a lower"
            " --max-model-len"
        )
    workers = KVCacheConfig(
        num_blocks=cache.num_gpu_blocks, kv_cache_tensors=[], kv_cache_groups=groups
    )
    return generate_scheduler_kv_cache_config([workers])


def layer_specs(config: VllmConfig, shape: ModelShape) -> dict[str, KVCacheSpec]:
    """What each layer caches, by the layer's name."""
    specs: dict[str, KVCacheSpec] = {}
    dtype = torch.bfloat16 if shape.kv_element_bytes == 2 else torch.uint8
    block_size = config.cache_config.block_size
    if shape.latent:
        # One head, and no values beside the latent.
        latent: dict[str, Any] = {"block_size": block_size, "num_kv_heads": 1}
        packed = int(shape.cached_bytes)
        for i in range(shape.num_attention_layers):
            specs[f"attention.{i}"] = MLAAttentionSpec(
                head_size=packed, dtype=torch.uint8, **latent
            )
        if indexer := shape.indexer:
            for i in range(indexer.num_layers):
                specs[f"indexer.{i}"] = MLAAttentionSpec(
                    head_size=indexer.cache_bytes, dtype=torch.uint8, **latent
                )
        return specs
    windows = shape.num_window_layers
    for layers, heads in shape.head_groups:
        sizes: dict[str, Any] = {
            "block_size": block_size,
            "num_kv_heads": shape.local_share(heads.num_kv_heads),
            "head_size": heads.head_dim,
            "dtype": dtype,
        }
        for _ in range(layers):
            name = f"attention.{len(specs)}"
            # Layers by chunks are cached whole: vLLM gives them no blocks of their own.
            if len(specs) < windows and not shape.chunked_window:
                specs[name] = SlidingWindowSpec(sliding_window=shape.sliding_window, **sizes)
            else:
                specs[name] = FullAttentionSpec(**sizes)
    if linear := shape.linear_attention:
        cache = config.cache_config
        if cache.mamba_cache_mode == "align":
            cache.mamba_block_size = block_size
        state = MambaSpec(
            shapes=((_state_bytes(shape),),),
            dtypes=(torch.uint8,),
            block_size=cache.mamba_block_size or config.model_config.max_model_len,
            page_size_padded=block_size * _attention_bytes(shape),
            mamba_cache_mode=cache.mamba_cache_mode,
        )
        specs |= {f"linear.{i}": state for i in range(linear.num_layers)}
    return specs


def _block_bytes(group: KVCacheGroupSpec) -> int:
    """One block in all of a group's layers."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return spec.page_size_bytes
    return spec.page_size_bytes * len(group.layer_names)


def _state_bytes(shape: ModelShape) -> int:
    return int(shape.state_bytes + shape.conv_state_bytes)


def _attention_bytes(shape: ModelShape) -> int:
    """KV cache of one token in one layer."""
    return int(2 * shape.local_kv_heads * shape.head_dim * shape.kv_element_bytes)


def _block_size(shape: ModelShape) -> int:
    """Tokens of a block: BLOCK_SIZE, or as many times that as make an attention layer's block at
    least as large as a linear-attention layer's state. Source: vLLM's ``Platform``."""
    if not shape.linear_attention:
        return BLOCK_SIZE
    return BLOCK_SIZE * math.ceil(_state_bytes(shape) / (BLOCK_SIZE * _attention_bytes(shape)))
