# SPDX-License-Identifier: Apache-2.0
"""The shape of a model that is loaded, whatever its architecture.

It has the FLOPs of a token right, and roughly what is read from memory. Measured steps scale
both, so no forecast should rest on it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.linear import LinearBase

from vllm_duet.roofline import ExpertShape, ModelShape


def loaded_shape(model: Any, vllm_config: Any) -> ModelShape:
    """The shape of ``model``, of the text model where it has others beside.

    Layers that keep a state in place of a KV cache count by their products.

    Raises:
        ValueError: the sizes do not divide over the ranks.
    """
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    config = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    hidden, num_layers = config.get_hidden_size(), config.get_total_num_hidden_layers()
    modules = list(model.modules())
    attention = [m for m in modules if isinstance(m, Attention | MLAAttention)]
    windows = [m.sliding_window for m in attention if getattr(m, "sliding_window", None)]
    heads = attention[0] if attention else None
    num_heads = heads.num_heads * ranks if heads else ranks
    num_kv_heads = heads.num_kv_heads * ranks if heads else ranks
    head_dim = heads.head_size if heads else 1
    products = sum(m.input_size * m.output_size for m in modules if isinstance(m, LinearBase))
    products -= len(attention) * hidden * head_dim * 2 * (num_heads + num_kv_heads)
    # The rest is said to be MLPs of three matrices.
    width = max(0, products) / (3 * hidden * num_layers)
    dtype = "float16" if config.dtype is torch.float16 else "bfloat16"
    kv_dtype = str(vllm_config.cache_config.cache_dtype)
    return ModelShape(
        architecture=type(model).__name__,
        hidden_size=hidden,
        num_layers=num_layers,
        vocab_size=config.get_vocab_size(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=max(1, round(width / ranks)) * ranks,
        tied_embeddings=False,
        activation_dtype=dtype,
        weight_dtype=dtype,
        kv_dtype="fp8" if kv_dtype.startswith("fp8") else dtype,
        tensor_parallel_size=ranks,
        sliding_window=min(windows, default=None),
        num_window_layers=len(windows),
        experts=_experts(modules),
        attention_layers=len(attention),
        dense_layers=num_layers,
    )


def _experts(modules: list[Any]) -> ExpertShape | None:
    layers = {id(m.moe_config): m.moe_config for m in modules if hasattr(m, "moe_config")}
    if not layers:
        return None
    first = next(iter(layers.values()))
    return ExpertShape(
        num_layers=len(layers),
        num_experts=first.num_logical_experts,
        experts_per_token=first.experts_per_token,
        intermediate_size=first.intermediate_size,
    )
