# SPDX-License-Identifier: Apache-2.0
"""A small model without weights, for ``--load-format dummy``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1024,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    hidden_act="silu",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    attention_bias=False,
    bos_token_id=1,
    eos_token_id=2,
)


def make_model(folder: Path, **overrides: Any) -> Path:
    """A model's folder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL | overrides))
    return folder
