# SPDX-License-Identifier: Apache-2.0
"""What the roofline knows of a model: its sizes, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_duet.roofline.hf_config import shape_fields
from vllm_duet.roofline.layer_shapes import (
    ExpertShape,
    HeadShape,
    IndexerShape,
    LatentShape,
    LinearAttentionShape,
)

WEIGHT_BYTES: Mapping[str, float] = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    # A 32-bit scale for each block of 128 by 128.
    "fp8_block": 1.0 + 4.0 / 128**2,
    # Four bits, and an 8-bit scale for each group of 16.
    "nvfp4": 0.5 + 1.0 / 16,
    # Four bits, and a 16-bit scale for each group of 128.
    "int4": 0.5 + 2.0 / 128,
    "int4_group32": 0.5 + 2.0 / 32,
    # Four bits, and an 8-bit scale for each block of 32. Source: OCP Microscaling Formats 1.0.
    "mxfp4": 0.5 + 1.0 / 32,
}
"""Bytes of one weight in memory, its share of the scales included."""

KV_BYTES: Mapping[str, float] = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
}
"""Bytes of one element of the KV cache."""

STATE_BYTES: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
"""Bytes of one element of a linear-attention state."""

PACKED_LATENT_BYTES = 656
"""Bytes of a cached token of sparse latent attention in fp8: 512 elements, four 32-bit scales,
and 64 elements of rotary embedding in 16 bits. Source: vLLM's cache dtype fp8_ds_mla."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the roofline needs to know of a decoder: sizes, dtypes, sharding.

    Sizes are the whole model's; the ``local_*`` properties, ``weight_bytes`` and
    ``kv_bytes_per_token`` are those of one tensor-parallel rank.

    ``num_layers`` counts residual blocks. ``attention_layers``, ``dense_layers`` (dense MLPs) and
    ``rope_layers`` are for models whose blocks are not all of one attention and one MLP; None is
    what that gives: attention in each layer but the linear-attention ones, a dense MLP in each
    without experts, and rotary embedding wherever there is attention.

    Attention splits into ``num_window_layers``, which see at most ``sliding_window`` tokens, and
    layers that see everything. Those tokens are the last ones, with ``chunked_window`` those
    since the last multiple of the window (Llama 4), and with an ``indexer`` those that it chose.
    ``full_heads`` are the heads of the layers that see everything, where they differ (Gemma 4).
    With ``joint_qk_norm`` Q and K are normed over all their heads together, whose squares ranks
    have to sum (MiniMax-M2).
    With ``output_gate`` attention's output is multiplied by a projection as wide (Qwen3-Next).
    """

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied_embeddings: bool
    activation_dtype: str
    weight_dtype: str
    kv_dtype: str
    tensor_parallel_size: int = 1
    norms_per_layer: int = 2
    qk_norm: bool = False
    joint_qk_norm: bool = False
    sliding_window: int | None = None
    num_window_layers: int = 0
    experts: ExpertShape | None = None
    latent: LatentShape | None = None
    indexer: IndexerShape | None = None
    linear_attention: LinearAttentionShape | None = None
    attention_layers: int | None = None
    dense_layers: int | None = None
    rope_layers: int | None = None
    full_heads: HeadShape | None = None
    chunked_window: bool = False
    output_gate: bool = False
    gated_mlp: bool = True

    def __post_init__(self) -> None:
        for name, value, table in (
            ("activation_dtype", self.activation_dtype, ("bfloat16", "float16")),
            ("weight_dtype", self.weight_dtype, WEIGHT_BYTES),
            ("kv_dtype", self.kv_dtype, KV_BYTES),
            ("state_dtype", self._state_dtype, STATE_BYTES),
        ):
            if value not in table:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(table)}")
        tp = self.tensor_parallel_size
        if tp < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, not {tp}")
        if self.num_heads % tp:
            raise ValueError(f"{self.num_heads} attention heads do not divide over {tp} ranks")
        for _, heads in self.head_groups:
            if heads.num_kv_heads % tp and tp % heads.num_kv_heads:
                raise ValueError(f"{heads.num_kv_heads} KV heads do not divide over {tp} ranks")
        linear = self.linear_attention
        if linear and (linear.num_heads % tp or linear.num_key_heads % tp):
            raise ValueError(
                f"linear attention with {linear.num_heads} heads and {linear.num_key_heads} key"
                f" heads does not divide over {tp} ranks"
            )
        widths = [self.intermediate_size] if self.num_dense_layers else []
        if self.experts:
            widths += [self.experts.intermediate_size, self.experts.shared_intermediate_size]
        for width in widths:
            if width % tp:
                raise ValueError(f"an MLP of width {width} does not divide over {tp} ranks")

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any] | str | Path,
        *,
        weight_dtype: str | None = None,
        kv_dtype: str | None = None,
        tensor_parallel_size: int = 1,
    ) -> ModelShape:
        """Read a Hugging Face config: a dict, a config.json, or the folder of one.

        Of a multimodal model it is the text model alone; drafting (MTP) layers do not count.
        ``weight_dtype`` (a key of WEIGHT_BYTES) overrides the config's own dtype
        or quantization; ``kv_dtype`` (a key of KV_BYTES, or "auto") defaults to
        the activations' dtype, as in vLLM.

        Raises:
            UnsupportedArchitectureError: unknown architecture or quantization.
            ValueError: a needed key is missing, a dtype is unknown, or the sizes
                do not divide over the ranks.
            OSError: the path cannot be read.
        """
        fields = shape_fields(config, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
        return cls(**fields, tensor_parallel_size=tensor_parallel_size)

    @property
    def num_attention_layers(self) -> int:
        """Layers with attention over a KV cache."""
        if self.attention_layers is not None:
            return self.attention_layers
        linear = self.linear_attention
        return self.num_layers - (linear.num_layers if linear else 0)

    @property
    def num_rope_layers(self) -> int:
        """Attention layers with rotary embedding."""
        return self.num_attention_layers if self.rope_layers is None else self.rope_layers

    @property
    def num_full_layers(self) -> int:
        """Layers whose attention sees the whole context."""
        return self.num_attention_layers - self.num_window_layers

    @property
    def num_dense_layers(self) -> int:
        """Layers with one dense MLP."""
        if self.dense_layers is not None:
            return self.dense_layers
        return self.num_layers - (self.experts.num_layers if self.experts else 0)

    @property
    def head_groups(self) -> tuple[tuple[int, HeadShape], ...]:
        """Attention layers by the heads they have: how many, and which heads.

        One group, or with ``full_heads`` two: those with a sliding window, then the others.
        """
        heads = HeadShape(self.num_kv_heads, self.head_dim)
        if self.full_heads is None:
            return ((self.num_attention_layers, heads),)
        return ((self.num_window_layers, heads), (self.num_full_layers, self.full_heads))

    @property
    def local_heads(self) -> int:
        """Query heads of one rank."""
        return self.num_heads // self.tensor_parallel_size

    @property
    def local_kv_heads(self) -> int:
        """KV heads of one rank; replicated where there are fewer heads than ranks."""
        return self.local_share(self.num_kv_heads)

    def local_share(self, num_heads: int) -> int:
        """One rank's share of ``num_heads``, which are replicated where ranks are more."""
        return max(1, num_heads // self.tensor_parallel_size)

    @property
    def local_vocab_size(self) -> int:
        """Rows of the embedding and columns of the lm_head on one rank."""
        return -(-self.vocab_size // self.tensor_parallel_size)

    def local_width(self, intermediate_size: int) -> int:
        """One rank's share of an MLP of width ``intermediate_size``."""
        return intermediate_size // self.tensor_parallel_size

    @property
    def activation_bytes(self) -> float:
        """Bytes of one element of the hidden state."""
        return WEIGHT_BYTES[self.activation_dtype]

    @property
    def weight_element_bytes(self) -> float:
        """Bytes of one weight of the (possibly quantized) linear layers."""
        return WEIGHT_BYTES[self.weight_dtype]

    @property
    def kv_element_bytes(self) -> float:
        """Bytes of one element of the KV cache."""
        return KV_BYTES[self.kv_dtype]

    @property
    def kernel_kv_dtype(self) -> str:
        """What attention's times go by: "fp8", or "bfloat16" for either dtype of 16 bits."""
        return "fp8" if self.kv_element_bytes == 1 else "bfloat16"

    @property
    def compute_dtype(self) -> str:
        """What the linear layers multiply in."""
        return self.multiplied_in(self.weight_dtype)

    def multiplied_in(self, weight_dtype: str) -> str:
        """What weights multiply in: int4 and mxfp4 are expanded first."""
        narrow = {"fp8": "fp8", "fp8_block": "fp8", "int8": "int8", "nvfp4": "nvfp4"}
        return narrow.get(weight_dtype, self.activation_dtype)

    @property
    def expert_dtype(self) -> str:
        """The routed experts' weight dtype."""
        return (self.experts and self.experts.weight_dtype) or self.weight_dtype

    @property
    def cached_bytes(self) -> float:
        """KV cache bytes of one token in one layer of latent attention, on each rank."""
        if self.latent is None:
            raise ValueError(f"{self.architecture} has no latent attention")
        if self.indexer and self.kv_element_bytes == 1:
            return PACKED_LATENT_BYTES
        return self.latent.cache_dim * self.kv_element_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache bytes of one token over all layers, on one rank.

        Sliding-window layers count in full: they too hold a token until it
        leaves the window. Latent attention, and an indexer, cache the same on every rank.
        Linear-attention layers have ``state_bytes_per_request`` instead.
        """
        if self.latent:
            indexer = self.indexer
            index = indexer.num_layers * indexer.cache_bytes if indexer else 0
            return self.num_attention_layers * self.cached_bytes + index
        return self.kv_element_bytes * sum(
            layers * 2 * self.local_share(heads.num_kv_heads) * heads.head_dim
            for layers, heads in self.head_groups
        )

    @property
    def state_bytes_per_request(self) -> float:
        """Bytes that the linear-attention layers keep of one request, on one rank."""
        linear = self.linear_attention
        if linear is None:
            return 0.0
        return linear.num_layers * (self.state_bytes + self.conv_state_bytes)

    @property
    def state_bytes(self) -> float:
        """The recurrent state of one request in one linear-attention layer, on one rank."""
        linear = self.linear_attention
        if linear is None:
            return 0.0
        elements = self.local_share(linear.num_heads) * linear.value_dim * linear.key_dim
        return elements * STATE_BYTES[linear.state_dtype]

    @property
    def conv_state_bytes(self) -> float:
        """The last ``conv_width - 1`` tokens that a convolution keeps, in one layer."""
        linear = self.linear_attention
        if linear is None:
            return 0.0
        return (linear.conv_width - 1) * self.local_conv_dim * self.activation_bytes

    @property
    def local_conv_dim(self) -> int:
        """Columns of keys, queries and values of a linear-attention layer, on one rank."""
        linear = self.linear_attention
        if linear is None:
            return 0
        keys = self.local_share(linear.num_key_heads) * linear.key_dim
        return 2 * keys + self.local_share(linear.num_heads) * linear.value_dim

    @property
    def _state_dtype(self) -> str:
        return self.linear_attention.state_dtype if self.linear_attention else "float32"

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weight matrices on one rank.

        Norms and biases, below 0.1 % together, are left out. Embedding, lm_head, routers and the
        indexer's keys stay in the activations' dtype under quantization.
        """
        plain = self._plain_weights + self.local_vocab_size * self.hidden_size * (
            1 if self.tied_embeddings else 2
        )
        return (
            self._linear_weights * self.weight_element_bytes
            + self._expert_weights * WEIGHT_BYTES[self.expert_dtype]
            + plain * self.activation_bytes
        )

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, norms and biases left out."""
        whole = replace(self, tensor_parallel_size=1)
        return (
            whole._linear_weights
            + whole._expert_weights
            + whole._plain_weights
            + self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        )

    @property
    def num_active_parameters(self) -> int:
        """Weights that a token is multiplied with: k of E experts; not the embedding, which is
        looked up, though many publishers count it."""
        whole = replace(self, tensor_parallel_size=1)
        active = whole._linear_weights + whole._plain_weights + self.vocab_size * self.hidden_size
        if self.experts:
            share = self.experts.experts_per_token / self.experts.num_experts
            active += round(whole._expert_weights * share)
        return active

    def mlp_weights(self, intermediate_size: int, hidden_size: int | None = None) -> int:
        """Elements of one MLP on one rank: gate, up and down, or up and down."""
        matrices = 3 if self.gated_mlp else 2
        return matrices * (hidden_size or self.hidden_size) * self.local_width(intermediate_size)

    @property
    def _linear_weights(self) -> int:
        """Elements in ``weight_dtype``, all but the routed experts."""
        found = self.num_dense_layers * self.mlp_weights(self.intermediate_size)
        found += self._attention_weights + self._linear_attention_weights
        if experts := self.experts:
            shared = self.mlp_weights(experts.shared_intermediate_size)
            latent = 2 * self.hidden_size * experts.latent_size
            found += experts.num_layers * (shared + latent)
        return found

    @property
    def _expert_weights(self) -> int:
        """Elements of the routed experts."""
        if not (experts := self.experts):
            return 0
        each = self.mlp_weights(experts.intermediate_size, experts.latent_size)
        return experts.num_layers * experts.num_experts * each

    @property
    def _plain_weights(self) -> int:
        """Elements that stay in the activations' dtype, but embedding and lm_head."""
        found = 0
        if experts := self.experts:
            columns = experts.num_experts + experts.shared_gate
            found += experts.num_layers * self.hidden_size * columns
        if indexer := self.indexer:
            columns = indexer.head_dim + indexer.num_heads
            found += indexer.num_layers * self.hidden_size * columns
        if linear := self.linear_attention:
            found += linear.num_layers * linear.conv_width * self.local_conv_dim
            if linear.kind == "gated_delta":
                gates = 2 * self.local_share(linear.num_heads)
                found += linear.num_layers * self.hidden_size * gates
        return found

    @property
    def _linear_attention_weights(self) -> int:
        if not (linear := self.linear_attention):
            return 0
        value = self.local_share(linear.num_heads) * linear.value_dim
        return linear.num_layers * self.hidden_size * (self.linear_attention_columns + value)

    @property
    def linear_attention_columns(self) -> int:
        """What a linear-attention layer projects the hidden state to in one product: keys, queries,
        values and as many elements of a gate; in Mamba2 also a step size for each head."""
        if not (linear := self.linear_attention):
            return 0
        heads = self.local_share(linear.num_heads)
        steps = heads if linear.kind == "mamba2" else 0
        return self.local_conv_dim + heads * linear.value_dim + steps

    @property
    def _attention_weights(self) -> int:
        hidden, heads = self.hidden_size, self.local_heads
        if not self.latent:
            queries = (3 if self.output_gate else 2) * heads
            return sum(
                layers * hidden * g.head_dim * (queries + 2 * self.local_share(g.num_kv_heads))
                for layers, g in self.head_groups
            )
        m = self.latent
        query_in = m.q_lora_rank or hidden
        each = (
            hidden * (m.q_lora_rank + m.cache_dim)
            + query_in * heads * self.head_dim
            + m.kv_lora_rank * heads * (m.nope_head_dim + m.v_head_dim)
            + heads * m.v_head_dim * hidden
        )
        found = self.num_attention_layers * each
        if indexer := self.indexer:
            found += indexer.num_layers * query_in * indexer.num_heads * indexer.head_dim
        return found
