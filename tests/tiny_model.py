# SPDX-License-Identifier: Apache-2.0
"""The tests' model: a Qwen3 of two layers. Importing this imports neither torch nor vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def make_tiny_model(folder: Path, **overrides: Any) -> Path:
    """A model's folder, with random weights large enough that tokens depend on context."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    model = Qwen3ForCausalLM(Qwen3Config(**(SHAPE | {"initializer_range": 0.4} | overrides)))
    model.float().save_pretrained(folder)
    return folder


def make_tiny_config(folder: Path, **overrides: Any) -> Path:
    """A model's folder without weights, for ``--load-format dummy``."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | SHAPE | overrides))
    return folder
