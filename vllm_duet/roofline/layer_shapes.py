# SPDX-License-Identifier: Apache-2.0
"""Sizes of the kinds of layers that a model may have beside plain attention and a dense MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The mixture-of-experts MLP of ``num_layers`` of the model's layers.

    Each token visits ``experts_per_token`` of ``num_experts`` experts of width
    ``intermediate_size``, and one shared expert of width
    ``shared_intermediate_size`` (0: none), whose output is multiplied by a gate of one column
    where ``shared_gate``. Routed experts read and write ``latent_size`` elements a token, by a
    projection before and one after, or the hidden state (0). ``weight_dtype`` is that of the routed
    experts where it is not the other layers'. ``load`` is how unevenly tokens fall on experts:
    "balanced", or "power_law_1.01" or "power_law_1.2" by the exponent of an expert's rank.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    latent_size: int = 0
    weight_dtype: str | None = None
    load: str = "power_law_1.01"


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache keeps
    ``kv_lora_rank + rope_head_dim`` elements a token for all heads together.

    ``q_lora_rank`` is 0 where queries are projected directly.
    """

    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int

    @property
    def cache_dim(self) -> int:
        """Cached elements of one token in one layer."""
        return self.kv_lora_rank + self.rope_head_dim


@dataclass(frozen=True, slots=True)
class IndexerShape:
    """The lightning indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556).

    In ``num_layers`` layers, ``num_heads`` heads of ``head_dim`` score every earlier token, in
    fp8, and attention reads the best ones. The other layers take the last choice before them.

    One key a token is cached for all heads together. Ranks have all of it.
    """

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of a token's cached key: fp8, and a 32-bit scale for each 128 elements."""
        return self.head_dim + 4 * (self.head_dim // 128)


@dataclass(frozen=True, slots=True)
class LinearAttentionShape:
    """Layers that keep a state of fixed size for each request, in place of a KV cache.

    Each of ``num_heads`` has a state of ``value_dim`` by ``key_dim``; keys and queries have
    ``num_key_heads``. Mamba2 (arXiv 2405.21060) calls these heads, head_dim, state size and groups,
    and its B and C are keys and queries. All three pass a causal convolution over ``conv_width``
    tokens. Prefill goes by chunks of ``chunk_tokens``.
    """

    kind: Literal["gated_delta", "mamba2"]
    num_layers: int
    num_heads: int
    num_key_heads: int
    value_dim: int
    key_dim: int
    conv_width: int
    chunk_tokens: int
    state_dtype: str


@dataclass(frozen=True, slots=True)
class HeadShape:
    """KV heads of an attention layer, and the dimension of its heads."""

    num_kv_heads: int
    head_dim: int
