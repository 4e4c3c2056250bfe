# SPDX-License-Identifier: Apache-2.0
"""Layer sizes of a model, read from its Hugging Face config.

An architecture, quantization or missing key that this file does not know is an
error, never a guess: a wrong shape gives a forecast that looks fine and is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WEIGHT_BYTES: Mapping[str, float] = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    # A 32-bit scale for each block of 128 by 128.
    "fp8_block": 1.0 + 4.0 / 128**2,
    # Four bits, and an 8-bit scale for each group of 16.
    "nvfp4": 0.5 + 1.0 / 16,
    # Four bits, and an 8-bit scale for each group of 32.
    "mxfp4": 0.5 + 1.0 / 32,
    # Four bits, and a 16-bit scale for each group of 128.
    "int4": 0.5 + 2.0 / 128,
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


class UnsupportedArchitectureError(ValueError):
    """The config names an architecture or quantization whose cost is not modelled."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The mixture-of-experts MLP of ``num_layers`` of the model's layers.

    Each token visits ``experts_per_token`` of ``num_experts`` experts of width
    ``intermediate_size``, and one shared expert of width
    ``shared_intermediate_size`` (0: none). ``load`` is how unevenly: "balanced", or
    "power_law_1.01" or "power_law_1.2", the rank's exponent.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
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
class ModelShape:
    """What the roofline needs to know of a decoder: sizes, dtypes, sharding.

    Sizes are the whole model's; the ``local_*`` properties, ``weight_bytes`` and
    ``kv_bytes_per_token`` are those of one tensor-parallel rank. ``num_layers``
    splits into ``num_window_layers``, whose attention sees the last
    ``sliding_window`` tokens, and layers that see everything. MLP layers are
    dense, but for ``experts.num_layers`` of them.
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
    sliding_window: int | None = None
    num_window_layers: int = 0
    experts: ExpertShape | None = None
    latent: LatentShape | None = None

    def __post_init__(self) -> None:
        for name, value, table in (
            ("activation_dtype", self.activation_dtype, ("bfloat16", "float16")),
            ("weight_dtype", self.weight_dtype, WEIGHT_BYTES),
            ("kv_dtype", self.kv_dtype, KV_BYTES),
        ):
            if value not in table:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(table)}")
        tp = self.tensor_parallel_size
        if tp < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, not {tp}")
        if self.num_heads % tp:
            raise ValueError(f"{self.num_heads} attention heads do not divide over {tp} ranks")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads do not divide over {tp} ranks")
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

        ``weight_dtype`` (a key of WEIGHT_BYTES) overrides the config's own dtype
        or quantization; ``kv_dtype`` (a key of KV_BYTES, or "auto") defaults to
        the activations' dtype, as in vLLM.

        Raises:
            UnsupportedArchitectureError: unknown architecture or quantization.
            ValueError: a needed key is missing, a dtype is unknown, or the sizes
                do not divide over the ranks.
            OSError: the path cannot be read.
        """
        raw = _load(config)
        names = raw.get("architectures") or []
        name = str(names[0]) if names else "(none given)"
        family = _FAMILIES.get(name)
        if family is None:
            raise UnsupportedArchitectureError(
                f"architecture {name} is not supported by the roofline;"
                f" supported are {', '.join(sorted(_FAMILIES))}"
            )
        if raw.get("text_config"):
            raw = {**raw, **raw["text_config"]}
        read = _Reader(name, raw)

        activation_dtype = _activation_dtype(read)
        heads = read.integer("num_attention_heads")
        num_layers = read.integer("num_hidden_layers")
        latent = _latent(read) if family.latent else None
        if latent:
            head_dim = latent.nope_head_dim + latent.rope_head_dim
        elif family.explicit_head_dim or raw.get("head_dim"):
            head_dim = read.integer("head_dim")
        else:
            head_dim = read.integer("hidden_size") // heads
        windows = _window_layers(read, family, num_layers)
        return cls(
            architecture=name,
            hidden_size=read.integer("hidden_size"),
            num_layers=num_layers,
            vocab_size=read.integer("vocab_size"),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            intermediate_size=read.integer("intermediate_size"),
            tied_embeddings=bool(raw.get("tie_word_embeddings", family.tied_by_default)),
            activation_dtype=activation_dtype,
            weight_dtype=weight_dtype or _weight_dtype(read) or activation_dtype,
            kv_dtype=activation_dtype if kv_dtype in (None, "auto") else str(kv_dtype),
            tensor_parallel_size=tensor_parallel_size,
            norms_per_layer=family.norms_per_layer,
            qk_norm=family.qk_norm,
            sliding_window=read.integer("sliding_window") if windows else None,
            num_window_layers=windows,
            experts=_EXPERTS[family.experts](read, num_layers) if family.experts else None,
            latent=latent,
        )

    @property
    def num_full_layers(self) -> int:
        """Layers whose attention sees the whole context."""
        return self.num_layers - self.num_window_layers

    @property
    def num_dense_layers(self) -> int:
        """Layers with one dense MLP."""
        return self.num_layers - (self.experts.num_layers if self.experts else 0)

    @property
    def local_heads(self) -> int:
        """Query heads of one rank."""
        return self.num_heads // self.tensor_parallel_size

    @property
    def local_kv_heads(self) -> int:
        """KV heads of one rank; replicated where there are fewer heads than ranks."""
        return max(1, self.num_kv_heads // self.tensor_parallel_size)

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
    def compute_dtype(self) -> str:
        """What the linear layers multiply in: int4 weights are expanded first."""
        narrow = {"fp8": "fp8", "fp8_block": "fp8", "int8": "int8", "nvfp4": "nvfp4"}
        return narrow.get(self.weight_dtype, self.activation_dtype)

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache bytes of one token over all layers, on one rank.

        Sliding-window layers count in full: they too hold a token until it
        leaves the window. Latent attention caches the same on every rank.
        """
        elements = self.latent.cache_dim if self.latent else 2 * self.local_kv_heads * self.head_dim
        return elements * self.num_layers * self.kv_element_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weight matrices on one rank.

        Norms and biases, below 0.1 % together, are left out. Embedding, lm_head
        and routers stay in the activations' dtype under quantization.
        """
        linear = self.num_layers * self._attention_weights
        linear += self.num_dense_layers * self._mlp_weights(self.intermediate_size)
        plain = self.local_vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        if self.experts:
            experts = self.experts
            each = experts.num_experts * self._mlp_weights(experts.intermediate_size)
            each += self._mlp_weights(experts.shared_intermediate_size)
            linear += experts.num_layers * each
            plain += experts.num_layers * self.hidden_size * experts.num_experts
        return linear * self.weight_element_bytes + plain * self.activation_bytes

    def _mlp_weights(self, intermediate_size: int) -> int:
        return 3 * self.hidden_size * self.local_width(intermediate_size)

    @property
    def _attention_weights(self) -> int:
        hidden, heads = self.hidden_size, self.local_heads
        if not self.latent:
            return hidden * self.head_dim * (2 * heads + 2 * self.local_kv_heads)
        m = self.latent
        query_in = m.q_lora_rank or hidden
        return (
            hidden * (m.q_lora_rank + m.cache_dim)
            + query_in * heads * self.head_dim
            + m.kv_lora_rank * heads * (m.nope_head_dim + m.v_head_dim)
            + heads * m.v_head_dim * hidden
        )


class _Reader:
    """A config whose missing keys are reported with the architecture's name."""

    def __init__(self, architecture: str, raw: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self.raw = raw

    def integer(self, key: str) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            found = "is missing" if value is None else f"is {value!r}"
            raise ValueError(f"{self.architecture} needs an integer {key!r}, which {found}")
        return value


def _load(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    loaded = json.loads(path.read_text())
    return loaded if isinstance(loaded, dict) else {}


def _activation_dtype(read: _Reader) -> str:
    given = str(read.raw.get("dtype") or read.raw.get("torch_dtype") or "float32")
    given = given.removeprefix("torch.")
    # vLLM runs a float32 checkpoint in 16 bits too.
    return "bfloat16" if given == "float32" else given


def _weight_dtype(read: _Reader) -> str | None:
    quantization = read.raw.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method in ("awq", "gptq") and quantization.get("bits") == 4:
        return "int4"
    if method == "compressed-tensors":
        groups: dict[str, Any] = quantization.get("config_groups") or {}
        group: dict[str, Any] = next(iter(groups.values()), {})
        weights = group.get("weights") or {}
        kind = (weights.get("type"), weights.get("num_bits"))
        if kind == ("float", 8):
            return "fp8"
        if kind == ("int", 8) and group.get("input_activations"):
            return "int8"
        if kind == ("int", 4):
            return "int4"
    raise UnsupportedArchitectureError(
        f"quantization {method!r} of {read.architecture} is not supported in this form; supported"
        " are fp8, 4-bit awq and gptq, and compressed-tensors with fp8, int8 or int4 weights"
    )


def _latent(read: _Reader) -> LatentShape:
    return LatentShape(
        q_lora_rank=int(read.raw.get("q_lora_rank") or 0),
        kv_lora_rank=read.integer("kv_lora_rank"),
        nope_head_dim=read.integer("qk_nope_head_dim"),
        rope_head_dim=read.integer("qk_rope_head_dim"),
        v_head_dim=read.integer("v_head_dim"),
    )


def _window_layers(read: _Reader, family: _Family, num_layers: int) -> int:
    """How many layers attend to a sliding window only."""
    raw = read.raw
    if not raw.get("sliding_window") or family.windows == "none":
        return 0
    if family.windows == "upper" and not raw.get("use_sliding_window"):
        return 0
    if layer_types := raw.get("layer_types"):
        return sum(kind == "sliding_attention" for kind in layer_types)
    if family.windows == "upper":
        return max(0, num_layers - read.integer("max_window_layers"))
    if family.windows == "alternate":
        return (num_layers + 1) // 2
    if family.windows == "pattern":
        return num_layers - num_layers // read.integer("sliding_window_pattern")
    return num_layers


def _mixtral_experts(read: _Reader, num_layers: int) -> ExpertShape:
    return ExpertShape(
        num_layers=num_layers,
        num_experts=read.integer("num_local_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        intermediate_size=read.integer("intermediate_size"),
    )


def _qwen_experts(read: _Reader, num_layers: int) -> ExpertShape:
    step = read.raw.get("decoder_sparse_step", 1)
    dense = set(read.raw.get("mlp_only_layers") or ())
    sparse = [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]
    return ExpertShape(
        num_layers=len(sparse),
        num_experts=read.integer("num_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        intermediate_size=read.integer("moe_intermediate_size"),
        shared_intermediate_size=int(read.raw.get("shared_expert_intermediate_size") or 0),
    )


def _deepseek_experts(read: _Reader, num_layers: int) -> ExpertShape:
    first, every = read.integer("first_k_dense_replace"), read.raw.get("moe_layer_freq", 1)
    width = read.integer("moe_intermediate_size")
    return ExpertShape(
        num_layers=sum(i >= first and i % every == 0 for i in range(num_layers)),
        num_experts=read.integer("n_routed_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=width * int(read.raw.get("n_shared_experts") or 0),
    )


_EXPERTS = {"mixtral": _mixtral_experts, "qwen": _qwen_experts, "deepseek": _deepseek_experts}


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies beyond the keys of its config.

    ``windows`` says which layers have a sliding window where the config has no
    ``layer_types``: all; the upper ones from max_window_layers; every other one;
    all but each sliding_window_pattern-th.
    """

    windows: Literal["none", "all", "upper", "alternate", "pattern"] = "none"
    norms_per_layer: int = 2
    qk_norm: bool = False
    explicit_head_dim: bool = False
    tied_by_default: bool = False
    experts: str | None = None
    latent: bool = False


_GEMMA3 = _Family("pattern", 4, qk_norm=True, explicit_head_dim=True, tied_by_default=True)
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family("all"),
    "Phi3ForCausalLM": _Family("all"),
    "Qwen2ForCausalLM": _Family("upper"),
    "Qwen3ForCausalLM": _Family("upper", qk_norm=True, explicit_head_dim=True),
    "GemmaForCausalLM": _Family(explicit_head_dim=True, tied_by_default=True),
    "Gemma2ForCausalLM": _Family("alternate", 4, explicit_head_dim=True, tied_by_default=True),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "MixtralForCausalLM": _Family("all", experts="mixtral"),
    "Qwen2MoeForCausalLM": _Family("upper", experts="qwen"),
    "Qwen3MoeForCausalLM": _Family("upper", qk_norm=True, explicit_head_dim=True, experts="qwen"),
    "DeepseekV2ForCausalLM": _Family(experts="deepseek", latent=True),
    "DeepseekV3ForCausalLM": _Family(experts="deepseek", latent=True),
}
