# SPDX-License-Identifier: Apache-2.0
"""The fields of a ModelShape, read from a Hugging Face config.

An architecture, quantization or missing key that this file does not know is an
error, never a guess: a wrong shape gives a forecast that looks fine and is not. A key
may be absent where transformers' own default is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vllm_duet.roofline.layer_shapes import (
    ExpertShape,
    HeadShape,
    IndexerShape,
    LatentShape,
    LinearAttentionShape,
)


class UnsupportedArchitectureError(ValueError):
    """The config names an architecture or quantization whose cost is not modelled."""


def shape_fields(
    config: Mapping[str, Any] | str | Path, *, weight_dtype: str | None, kv_dtype: str | None
) -> dict[str, Any]:
    """All fields of a ModelShape but ``tensor_parallel_size``.

    Arguments and errors are those of :meth:`ModelShape.from_hf_config`.
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
    if text := raw.get("text_config"):
        if family.text_types and text.get("model_type") not in family.text_types:
            raise UnsupportedArchitectureError(
                f"{name} around a text model of type {text.get('model_type')!r} is not"
                f" supported by the roofline; supported are {', '.join(family.text_types)}"
            )
        raw = {**raw, **{key: value for key, value in text.items() if value is not None}}
    read = _Reader(name, raw)

    activation_dtype = _activation_dtype(read)
    blocks = _BLOCKS[family.blocks](read)
    heads = read.integer("num_attention_heads")
    latent = _latent(read) if family.latent else None
    if latent:
        head_dim = latent.nope_head_dim + latent.rope_head_dim
    elif family.explicit_head_dim or raw.get("head_dim"):
        head_dim = read.integer("head_dim", family.default_head_dim)
    else:
        head_dim = read.integer("hidden_size") // heads
    experts = None
    if family.experts:
        experts = _EXPERTS[family.experts](read, blocks.num_layers)
    weights = weight_dtype or _weight_dtype(read) or activation_dtype
    if experts and weight_dtype is None and _experts_alone(read, experts, blocks.num_layers):
        experts, weights = replace(experts, weight_dtype=weights), activation_dtype
    windows, window = _windows(read, family, blocks)
    no_dense = experts is not None and experts.num_layers == blocks.num_layers
    return dict(
        architecture=name,
        hidden_size=read.integer("hidden_size"),
        num_layers=blocks.num_layers,
        vocab_size=read.integer("vocab_size"),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        intermediate_size=read.integer(
            family.dense_width, 0 if no_dense and not blocks.dense_layers else None
        ),
        tied_embeddings=bool(raw.get("tie_word_embeddings", family.tied_by_default)),
        activation_dtype=activation_dtype,
        weight_dtype=weights,
        kv_dtype=activation_dtype if kv_dtype in (None, "auto") else str(kv_dtype),
        norms_per_layer=blocks.norms_per_layer or family.norms_per_layer,
        qk_norm=bool(raw.get("use_qk_norm", family.qk_norm)),
        joint_qk_norm=family.joint_qk_norm,
        sliding_window=window if windows else None,
        num_window_layers=windows,
        experts=experts,
        latent=latent,
        indexer=_indexer(read, blocks.num_layers) if family.windows == "indexer" else None,
        linear_attention=blocks.linear_attention,
        attention_layers=blocks.attention_layers,
        dense_layers=blocks.dense_layers,
        rope_layers=_rope_layers(blocks, family, windows),
        full_heads=blocks.full_heads,
        chunked_window=family.windows == "chunked",
        output_gate=family.output_gate and bool(raw.get("attn_output_gate", True)),
        gated_mlp=family.gated_mlp,
    )


class _Reader:
    """A config whose missing keys are reported with the architecture's name."""

    def __init__(self, architecture: str, raw: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self.raw = raw

    def integer(self, key: str, default: int | None = None) -> int:
        """The key's value; ``default`` is for a key that transformers fills in by itself."""
        value = self.raw.get(key, default)
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


def _experts_alone(read: _Reader, experts: ExpertShape, num_layers: int) -> bool:
    """Whether quantization is the routed experts' alone: mxfp4 always, else where all attention
    and the shared experts are left out of it."""
    quantization = read.raw.get("quantization_config") or {}
    if quantization.get("quant_method") in _MXFP4:
        return True
    left_out = [str(name) for name in quantization.get("ignore") or ()]
    attention = [name for name in left_out if "self_attn" in name]
    if not attention:
        return False
    everywhere = any(name.startswith("re:") for name in attention) or len(attention) >= num_layers
    shared = any("shared_experts" in name for name in left_out)
    if not everywhere or (experts.shared_intermediate_size and not shared):
        raise UnsupportedArchitectureError(
            f"{read.architecture} with part of its layers quantized is not supported by the"
            " roofline, unless it is the routed experts"
        )
    return True


def _weight_dtype(read: _Reader) -> str | None:
    quantization = read.raw.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method in _MXFP4 and read.architecture == "GptOssForCausalLM":
        return "mxfp4"
    if method == "modelopt" and quantization.get("quant_algo") in _MODELOPT:
        return _MODELOPT[quantization["quant_algo"]]
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
            return "int4_group32" if weights.get("group_size") == 32 else "int4"
    raise UnsupportedArchitectureError(
        f"quantization {method!r} of {read.architecture} is not supported in this form; supported"
        " are fp8, 4-bit awq and gptq, gpt-oss's mxfp4, modelopt's FP8 and NVFP4, and"
        " compressed-tensors with fp8, int8 or int4 weights"
    )


_MODELOPT = {"FP8": "fp8", "NVFP4": "nvfp4"}


_MXFP4 = ("mxfp4", "gpt_oss_mxfp4")
"""In config.json, and as vLLM renames it."""


def _latent(read: _Reader) -> LatentShape:
    return LatentShape(
        q_lora_rank=int(read.raw.get("q_lora_rank") or 0),
        kv_lora_rank=read.integer("kv_lora_rank"),
        nope_head_dim=read.integer("qk_nope_head_dim"),
        rope_head_dim=read.integer("qk_rope_head_dim"),
        v_head_dim=read.integer("v_head_dim"),
    )


def _indexer(read: _Reader, num_layers: int) -> IndexerShape:
    """Some layers take an earlier one's choice: by pattern, or all but each index_topk_freq-th.

    Source: vLLM's DeepseekV32Attention, which has the same defaults.
    """
    pattern, every = read.raw.get("index_topk_pattern"), read.raw.get("index_topk_freq", 1)
    offset = read.raw.get("index_skip_topk_offset", 2)
    if pattern is not None:
        own = num_layers - sum(kind == "S" for kind in pattern[:num_layers])
    else:
        own = sum(max(i - offset + 1, 0) % every == 0 for i in range(num_layers))
    return IndexerShape(own, read.integer("index_n_heads"), read.integer("index_head_dim"))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """What the residual blocks of a model consist of; None as in ModelShape."""

    num_layers: int
    attention_layers: int | None = None
    dense_layers: int | None = None
    linear_attention: LinearAttentionShape | None = None
    full_heads: HeadShape | None = None
    norms_per_layer: int | None = None


def _plain_blocks(read: _Reader) -> _Blocks:
    return _Blocks(read.integer("num_hidden_layers"))


def _gated_delta_blocks(read: _Reader) -> _Blocks:
    """Qwen3-Next and Qwen3.5. Defaults: transformers' Qwen3NextConfig and Qwen3_5TextConfig."""
    num_layers = read.integer("num_hidden_layers")
    interval = read.raw.get("full_attention_interval", 4)
    kinds = read.raw.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)
    ]
    if set(kinds) - {"linear_attention", "full_attention"}:
        raise UnsupportedArchitectureError(
            f"{read.architecture} with layer_types {', '.join(sorted(set(kinds)))} is not supported"
        )
    linear = LinearAttentionShape(
        kind="gated_delta",
        num_layers=kinds.count("linear_attention"),
        num_heads=read.integer("linear_num_value_heads"),
        num_key_heads=read.integer("linear_num_key_heads"),
        value_dim=read.integer("linear_value_head_dim"),
        key_dim=read.integer("linear_key_head_dim"),
        conv_width=read.integer("linear_conv_kernel_dim"),
        chunk_tokens=64,  # that of vLLM's kernels
        # vLLM's mamba_ssm_cache_dtype "auto": the config's, or the activations'.
        state_dtype=str(read.raw.get("mamba_ssm_dtype") or _activation_dtype(read)),
    )
    return _Blocks(num_layers, linear_attention=linear if linear.num_layers else None)


_NEMOTRON_BLOCKS = {
    "M": "linear_attention",
    "mamba": "linear_attention",
    "*": "full_attention",
    "attention": "full_attention",
    "-": "mlp",
    "E": "moe",
}
"""Names that hybrid_override_pattern and layers_block_type have had for one kind of block."""


def _nemotron_kinds(read: _Reader) -> list[str]:
    raw = read.raw
    given = raw.get("layers_block_type") or raw.get("hybrid_override_pattern")
    if not given:
        raise ValueError(f"{read.architecture} needs 'hybrid_override_pattern', which is missing")
    kinds = [_NEMOTRON_BLOCKS.get(kind, kind) for kind in given]
    if unknown := sorted(set(kinds) - set(_NEMOTRON_BLOCKS.values())):
        raise UnsupportedArchitectureError(
            f"{read.architecture} with blocks {', '.join(unknown)} is not supported"
        )
    return kinds


def _nemotron_blocks(read: _Reader) -> _Blocks:
    """Each block is one of Mamba2, attention, an MLP or experts. Defaults: NemotronHConfig's."""
    kinds = _nemotron_kinds(read)
    mamba = LinearAttentionShape(
        kind="mamba2",
        num_layers=kinds.count("linear_attention"),
        num_heads=read.integer("mamba_num_heads"),
        num_key_heads=read.integer("n_groups"),
        value_dim=read.integer("mamba_head_dim"),
        key_dim=read.integer("ssm_state_size"),
        conv_width=read.integer("conv_kernel"),
        chunk_tokens=read.integer("chunk_size", 128),
        state_dtype=str(read.raw.get("mamba_ssm_cache_dtype", "float32")),
    )
    return _Blocks(
        num_layers=len(kinds),
        attention_layers=kinds.count("full_attention"),
        dense_layers=kinds.count("mlp"),
        linear_attention=mamba if mamba.num_layers else None,
    )


def _gemma4_blocks(read: _Reader) -> _Blocks:
    """Layers that see everything have other heads, and experts stand beside a dense MLP.

    Defaults: transformers' Gemma4TextConfig, whose to_dict() has ``per_layer_config`` in place of
    ``global_head_dim`` and ``num_global_key_value_heads``.
    """
    raw = read.raw
    for key, default in (("hidden_size_per_layer_input", 256), ("num_kv_shared_layers", 0)):
        if raw.get(key, default):
            raise UnsupportedArchitectureError(
                f"{read.architecture} with {key} {raw.get(key, default)} is not supported by the"
                " roofline"
            )
    num_layers = read.integer("num_hidden_layers")
    changed = raw.get("per_layer_config")
    if changed is None:
        full = {"head_dim": raw.get("global_head_dim", 512)}
        if raw.get("attention_k_eq_v") and raw.get("num_global_key_value_heads"):
            full["num_key_value_heads"] = raw["num_global_key_value_heads"]
    else:
        ways = {tuple(sorted(each.items())) for each in changed.values()}
        layers = {int(layer) for layer in changed}
        kinds = raw.get("layer_types") or []
        if len(ways) > 1 or layers != {i for i, k in enumerate(kinds) if k == "full_attention"}:
            raise UnsupportedArchitectureError(
                f"{read.architecture} with this per_layer_config is not supported by the roofline"
            )
        full = dict(next(iter(ways), ()))
    return _Blocks(
        num_layers,
        dense_layers=num_layers,
        # Four more where there are experts: before and after them, after the MLP, the router's.
        norms_per_layer=8 if raw.get("num_experts") else 4,
        full_heads=HeadShape(
            full.get("num_key_value_heads", read.integer("num_key_value_heads")),
            full.get("head_dim", read.integer("head_dim")),
        ),
    )


_BLOCKS = {
    "plain": _plain_blocks,
    "gated_delta": _gated_delta_blocks,
    "nemotron": _nemotron_blocks,
    "gemma4": _gemma4_blocks,
}


def _windows(read: _Reader, family: _Family, blocks: _Blocks) -> tuple[int, int]:
    """How many layers attend to a window only, and how many tokens that has."""
    raw, num_layers = read.raw, blocks.num_layers
    if family.windows == "indexer":
        return num_layers, read.integer("index_topk")
    if family.windows == "chunked":
        return _chunked_layers(read, num_layers), read.integer("attention_chunk_size", 8192)
    if not raw.get("sliding_window") or family.windows == "none":
        return 0, 0
    window = read.integer("sliding_window")
    if family.windows == "upper" and not raw.get("use_sliding_window"):
        return 0, 0
    if layer_types := raw.get("layer_types"):
        return sum(kind == "sliding_attention" for kind in layer_types), window
    if family.windows == "upper":
        return max(0, num_layers - read.integer("max_window_layers")), window
    if family.windows == "alternate":
        return (num_layers + 1) // 2, window
    if family.windows == "pattern":
        every = read.integer("sliding_window_pattern", family.default_window_pattern)
        return num_layers - num_layers // every, window
    attention = blocks.attention_layers
    return num_layers if attention is None else attention, window


def _chunked_layers(read: _Reader, num_layers: int) -> int:
    """Llama 4's layers with rotary embedding attend by chunks, the others to everything.

    ``no_rope_layers`` is 1 for a layer that *has* it. Defaults: transformers' Llama4TextConfig.
    """
    interval = read.raw.get("no_rope_layer_interval", 4)
    given = read.raw.get("no_rope_layers")
    return sum(given or ((i + 1) % interval != 0 for i in range(num_layers)))


def _rope_layers(blocks: _Blocks, family: _Family, windows: int) -> int | None:
    if family.windows == "chunked":
        return windows
    return 0 if family.blocks == "nemotron" else None


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
    shared = int(read.raw.get("shared_expert_intermediate_size") or 0)
    return ExpertShape(
        num_layers=len(sparse),
        num_experts=read.integer("num_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        intermediate_size=read.integer("moe_intermediate_size"),
        shared_intermediate_size=shared,
        shared_gate=shared > 0,
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


def _llama4_experts(read: _Reader, num_layers: int) -> ExpertShape | None:
    """Each ``interleave_moe_layer_step``-th layer, with a shared expert as wide as a routed one."""
    step, width = read.integer("interleave_moe_layer_step", 1), read.integer("intermediate_size")
    if not step:
        return None
    return ExpertShape(
        num_layers=num_layers // step,
        num_experts=read.integer("num_local_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=width,
    )


def _nemotron_experts(read: _Reader, num_layers: int) -> ExpertShape | None:
    count = _nemotron_kinds(read).count("moe")
    if not count:
        return None
    shared = read.integer("n_shared_experts", 1)
    return ExpertShape(
        num_layers=count,
        num_experts=read.integer("n_routed_experts"),
        experts_per_token=read.integer("num_experts_per_tok"),
        intermediate_size=read.integer("moe_intermediate_size"),
        shared_intermediate_size=shared
        and shared * read.integer("moe_shared_expert_intermediate_size"),
        latent_size=int(read.raw.get("moe_latent_size") or 0),
    )


def _gemma4_experts(read: _Reader, num_layers: int) -> ExpertShape | None:
    if not read.raw.get("num_experts"):
        return None
    return ExpertShape(
        num_layers=num_layers,
        num_experts=read.integer("num_experts"),
        experts_per_token=read.integer("top_k_experts"),
        intermediate_size=read.integer("moe_intermediate_size"),
    )


_EXPERTS: Mapping[str, Callable[[_Reader, int], ExpertShape | None]] = {
    "mixtral": _mixtral_experts,
    "qwen": _qwen_experts,
    "deepseek": _deepseek_experts,
    "llama4": _llama4_experts,
    "nemotron": _nemotron_experts,
    "gemma4": _gemma4_experts,
}


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies beyond the keys of its config.

    ``windows`` says which layers have a sliding window where the config has no ``layer_types``:
    all; the upper ones from max_window_layers; every other one; all but each
    sliding_window_pattern-th; those of Llama 4 that attend by chunks; all, to what an indexer
    chooses. ``dense_width`` names the key of a dense MLP's width. ``text_types`` are the types of
    nested text models that are known, where an architecture is used around several.
    """

    windows: Literal["none", "all", "upper", "alternate", "pattern", "chunked", "indexer"] = "none"
    norms_per_layer: int = 2
    qk_norm: bool = False
    joint_qk_norm: bool = False
    explicit_head_dim: bool = False
    default_head_dim: int | None = None
    default_window_pattern: int | None = None
    tied_by_default: bool = False
    experts: str | None = None
    latent: bool = False
    blocks: str = "plain"
    output_gate: bool = False
    gated_mlp: bool = True
    dense_width: str = "intermediate_size"
    text_types: tuple[str, ...] = ()


_GEMMA3 = _Family("pattern", 4, qk_norm=True, explicit_head_dim=True, tied_by_default=True)
_GEMMA4 = _Family(
    "pattern",
    4,
    qk_norm=True,
    explicit_head_dim=True,
    default_window_pattern=6,
    tied_by_default=True,
    experts="gemma4",
    blocks="gemma4",
)
_LLAMA4 = _Family(
    "chunked",
    qk_norm=True,
    explicit_head_dim=True,
    default_head_dim=128,
    experts="llama4",
    dense_width="intermediate_size_mlp",
)
_QWEN3_5 = _Family(qk_norm=True, explicit_head_dim=True, blocks="gated_delta", output_gate=True)
_QWEN3_NEXT = replace(_QWEN3_5, experts="qwen")
_SPARSE = _Family("indexer", experts="deepseek", latent=True)
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family("all"),
    "Ministral3ForCausalLM": _Family("all", explicit_head_dim=True, default_head_dim=128),
    "Mistral3ForConditionalGeneration": _Family("all", text_types=("mistral", "ministral3")),
    "Phi3ForCausalLM": _Family("all"),
    "Qwen2ForCausalLM": _Family("upper"),
    "Qwen3ForCausalLM": _Family("upper", qk_norm=True, explicit_head_dim=True),
    "GemmaForCausalLM": _Family(explicit_head_dim=True, tied_by_default=True),
    "Gemma2ForCausalLM": _Family("alternate", 4, explicit_head_dim=True, tied_by_default=True),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "MixtralForCausalLM": _Family("all", experts="mixtral"),
    "GptOssForCausalLM": _Family("alternate", explicit_head_dim=True, experts="mixtral"),
    "MiniMaxM2ForCausalLM": _Family(
        qk_norm=True, joint_qk_norm=True, explicit_head_dim=True, experts="mixtral"
    ),
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": _LLAMA4,
    "Qwen2MoeForCausalLM": _Family("upper", experts="qwen"),
    "Qwen3MoeForCausalLM": _Family("upper", qk_norm=True, explicit_head_dim=True, experts="qwen"),
    "Qwen3NextForCausalLM": _QWEN3_NEXT,
    "Qwen3_5ForCausalLM": _QWEN3_5,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForCausalLM": _QWEN3_NEXT,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_NEXT,
    "Glm4MoeForCausalLM": _Family(explicit_head_dim=True, experts="deepseek"),
    "Glm4MoeLiteForCausalLM": _Family(experts="deepseek", latent=True),
    "GlmMoeDsaForCausalLM": _SPARSE,
    "DeepseekV2ForCausalLM": _Family(experts="deepseek", latent=True),
    "DeepseekV3ForCausalLM": _Family(experts="deepseek", latent=True),
    "DeepseekV32ForCausalLM": _SPARSE,
    "KimiK25ForConditionalGeneration": _Family(
        experts="deepseek", latent=True, text_types=("kimi_k2",)
    ),
    "NemotronHForCausalLM": _Family(
        "all",
        norms_per_layer=1,
        explicit_head_dim=True,
        default_head_dim=128,
        experts="nemotron",
        blocks="nemotron",
        gated_mlp=False,
    ),
}
