# SPDX-License-Identifier: Apache-2.0
"""The tests' models of other families than tiny_model.py's Qwen3, with random weights.

Each function makes a model's folder and returns it. Importing this imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path

from tiny_model import SHAPE

RANDOM = {"initializer_range": 0.4, "pad_token_id": 0}
"""Weights so large that tokens depend on the context."""

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503
"""Token ids of the multimodal model."""


def qwen3_next(folder: Path) -> Path:
    """Gated delta nets, an attention layer, and experts."""
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(7)
    # vLLM's CPU kernels of gated delta nets know no smaller heads.
    heads = dict(linear_key_head_dim=128, linear_value_head_dim=128)
    heads |= dict(linear_num_key_heads=2, linear_num_value_heads=4)
    shape = SHAPE | dict(num_hidden_layers=4, shared_expert_intermediate_size=32)
    config = Qwen3NextConfig(**(shape | EXPERTS | heads | RANDOM))
    Qwen3NextForCausalLM(config).float().save_pretrained(folder)
    return folder


def glm4_moe(folder: Path) -> Path:
    """A dense layer, one of experts, and a third that drafts tokens (MTP)."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(7)
    experts = EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1)
    config = Glm4MoeConfig(**(SHAPE | experts | RANDOM), num_nextn_predict_layers=1)
    Glm4MoeForCausalLM(config).float().save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    size, last = SHAPE["hidden_size"], SHAPE["num_hidden_layers"] - 1
    drafter = f"model.layers.{last + 1}."
    weights |= {
        name.replace(f"model.layers.{last}.", drafter): weight.clone()
        for name, weight in weights.items()
        if name.startswith(f"model.layers.{last}.")
    }
    weights[f"{drafter}eh_proj.weight"] = torch.randn(size, 2 * size) * 0.3
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights[f"{drafter}{norm}.weight"] = torch.ones(size)
    for ours, theirs in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        weights[f"{drafter}{ours}.weight"] = weights[f"{theirs}.weight"].clone()
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def eagle3_drafter(folder: Path) -> Path:
    """An EAGLE-3 drafter for a Qwen3 of four layers."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(8)
    size, inner, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    queries = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    shapes = {
        "fc": (size, 3 * size),
        "lm_head": (vocabulary, size),
        "midlayer.self_attn.q_proj": (queries, 2 * size),
        "midlayer.self_attn.k_proj": (keys, 2 * size),
        "midlayer.self_attn.v_proj": (keys, 2 * size),
        "midlayer.self_attn.o_proj": (size, queries),
        "midlayer.mlp.gate_proj": (inner, size),
        "midlayer.mlp.up_proj": (inner, size),
        "midlayer.mlp.down_proj": (size, inner),
    }
    weights = {f"{name}.weight": torch.randn(*shape) * 0.3 for name, shape in shapes.items()}
    norms = "input_layernorm", "hidden_norm", "post_attention_layernorm"
    for name in ("norm", *(f"midlayer.{norm}" for norm in norms)):
        weights[f"{name}.weight"] = torch.ones(size)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "dtype": "float32",
        "draft_vocab_size": vocabulary,
        "hidden_act": "silu",
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | config | {"num_hidden_layers": 1}))
    save_file(weights, folder / "model.safetensors")
    return folder


def qwen25_vl(folder: Path) -> Path:
    """A vision encoder of one layer before a Qwen2.5 whose positions have three axes (mRoPE)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(7)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4)
    specials = dict(image_token_id=IMAGE, video_token_id=VIDEO)
    specials |= dict(vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    config = Qwen2_5_VLConfig(
        text_config=SHAPE | RANDOM | {"rope_parameters": rope},
        vision_config=vision | {"out_hidden_size": SHAPE["hidden_size"]},
        **specials,
    )
    Qwen2_5_VLForConditionalGeneration(config).float().save_pretrained(folder)
    names = {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        VISION_START: "<|vision_start|>",
        VISION_END: "<|vision_end|>",
    }
    vocabulary = {names.get(i, f"t{i}"): i for i in range(SHAPE["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="t1",
        eos_token="t2",
        pad_token="t0",
        extra_special_tokens=list(names.values()),
    )
    patches = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    return folder
