# SPDX-License-Identifier: Apache-2.0
"""The KV cache that a simulated engine plans, by vLLM's own rules and formulas."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import NO_COSTS, QUIET, simulation
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_duet.roofline import ModelShape
from vllm_duet.sim.kv_cache import BLOCK_SIZE, kv_cache_config, layer_specs, text_model
from vllm_duet.sim.simulation import Options, Simulation
from vllm_duet.sim.traces import TraceRequest

sys.path.append(str(Path(__file__).parents[1] / "roofline"))
from hf_configs import ALL, Config


@cache
def _config() -> VllmConfig:
    return simulation("stock")._vllm_config(8192)


def config(shape: ModelShape, blocks: int = 100_000) -> VllmConfig:
    """Of an engine that has room for ``blocks``, and a prefix cache with states in it."""
    found = deepcopy(_config())
    found.cache_config.num_gpu_blocks = blocks
    if shape.linear_attention:
        found.cache_config.mamba_cache_mode = "align"
    return found


def groups(name: str) -> list[tuple[str, int, int]]:
    """Kind, block size and number of layers of each group."""
    shape = ModelShape.from_hf_config(ALL[name])
    return sorted(
        (type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size, len(group.layer_names))
        for group in kv_cache_config(config(shape), shape).kv_cache_groups
    )


@pytest.mark.parametrize("name", ALL)
def test_a_block_is_as_large_as_the_shape_says(name: str) -> None:
    shape = ModelShape.from_hf_config(ALL[name])
    engine = config(shape)
    engine.cache_config.block_size = BLOCK_SIZE
    if shape.linear_attention:
        engine.cache_config.block_size = 4096
    specs = layer_specs(engine, shape).values()
    tokens = engine.cache_config.block_size
    attention = [spec for spec in specs if not isinstance(spec, MambaSpec)]
    states = [spec for spec in specs if isinstance(spec, MambaSpec)]
    assert sum(spec.page_size_bytes for spec in attention) == tokens * shape.kv_bytes_per_token
    assert sum(spec.real_page_size_bytes for spec in states) == shape.state_bytes_per_request


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "calculate", "keys", "state_dtype"),
    [
        (
            "qwen3.5-27b",
            MambaStateShapeCalculator.gated_delta_net_state_shape,
            {
                "num_k_heads": "linear_num_key_heads",
                "num_v_heads": "linear_num_value_heads",
                "head_k_dim": "linear_key_head_dim",
                "head_v_dim": "linear_value_head_dim",
                "conv_kernel_size": "linear_conv_kernel_dim",
            },
            torch.float32,
        ),
        (
            "nemotron-3-super",
            MambaStateShapeCalculator.mamba2_state_shape,
            {
                "n_groups": "n_groups",
                "num_heads": "mamba_num_heads",
                "head_dim": "mamba_head_dim",
                "state_size": "ssm_state_size",
                "conv_kernel": "conv_kernel",
            },
            torch.float32,
        ),
    ],
)
def test_a_state_is_as_large_as_vllm_calculates(
    name: str, calculate: Any, keys: Config, state_dtype: torch.dtype, tensor_parallel_size: int
) -> None:
    text = ALL[name].get("text_config", ALL[name])
    sizes = {argument: text[key] for argument, key in keys.items()}
    if "head_dim" in sizes:
        sizes["intermediate_size"] = sizes["num_heads"] * sizes["head_dim"]
    conv, state = calculate(tp_world_size=tensor_parallel_size, **sizes)
    shape = ModelShape.from_hf_config(ALL[name], tensor_parallel_size=tensor_parallel_size)
    assert shape.conv_state_bytes == torch.Size(conv).numel() * 2
    assert shape.state_bytes == torch.Size(state).numel() * state_dtype.itemsize


def test_groups() -> None:
    """A group has one kind of layer, and all groups' blocks are equally large."""
    assert groups("qwen3-8b") == [("FullAttentionSpec", 16, 36)]
    assert groups("gpt-oss-20b") == [("FullAttentionSpec", 16, 12), ("SlidingWindowSpec", 16, 12)]
    # Twice the tokens for half the bytes.
    gemma = groups("gemma4-31b")
    assert {row[:2] for row in gemma} == {("FullAttentionSpec", 32), ("SlidingWindowSpec", 16)}
    # A GPU's vLLM gives layers by chunks no blocks of their own.
    assert groups("llama4-scout") == [("FullAttentionSpec", 16, 48)]
    # Latents and the indexers' keys: pages of two sizes in one group.
    assert groups("deepseek-v3.2") == [("MLAAttentionSpec", 16, 122)]
    # A state of 2.1 MB is as large as 1056 tokens of 2048 bytes.
    qwen = groups("qwen3.5-35b-a3b")
    assert {row[:2] for row in qwen} == {("FullAttentionSpec", 1056), ("MambaSpec", 1056)}
    assert sum(row[2] for row in qwen) == 40


def test_states_and_a_longest_request_have_to_fit() -> None:
    shape = ModelShape.from_hf_config(ALL["qwen3.5-35b-a3b"])
    with pytest.raises(ValueError, match="does not hold Qwen3_5MoeForConditionalGeneration's"):
        kv_cache_config(config(shape, blocks=100), shape)


def test_a_pool_is_as_large_as_the_memory() -> None:
    """Blocks times a block's bytes in the widest group; never more than there is room for."""
    for name in ("qwen3-8b", "gemma3-1b", "gemma4-31b", "deepseek-v3.2", "qwen3.5-27b"):
        shape = ModelShape.from_hf_config(ALL[name])
        engine = config(shape)
        room = 100_000 * BLOCK_SIZE * shape.kv_bytes_per_token
        found = kv_cache_config(engine, shape)
        specs = layer_specs(engine, shape)
        widest = max(
            sum(specs[layer].page_size_bytes for layer in group.layer_names)
            for group in found.kv_cache_groups
        )
        if name == "gemma4-31b":  # its full layers' blocks have twice the tokens
            widest = 10 * 2 * 16 * 16 * 256 * 2
        assert found.num_blocks == engine.cache_config.num_gpu_blocks == room // widest


def test_only_the_text_model_is_served() -> None:
    text = text_model(ALL["gemma4-31b"] | {"vision_config": {}})
    assert text["architectures"] == ["Gemma4ForCausalLM"]
    assert "vision_config" not in text and text["hidden_size"] == 5376
    rope = {"rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    nested = ALL["qwen3.5-27b"]["text_config"] | {"rope_parameters": rope}
    text = text_model(ALL["qwen3.5-27b"] | {"text_config": nested})
    assert text["rope_parameters"] == {"rope_theta": 1e7} and len(rope) == 3
    assert "quantization_config" not in text_model(ALL["gpt-oss-20b"])
    assert text_model(ALL["qwen3-8b"]) == ALL["qwen3-8b"]


@pytest.mark.parametrize(
    ("name", "blockers"),
    [
        ("qwen3.5-35b-a3b", ["state-space layers"]),
        ("gpt-oss-20b", []),
        ("glm-4.7-flash", []),
    ],
)
def test_engines_serve_it(tmp_path: Path, name: str, blockers: list[str]) -> None:
    """Every token comes, by stock's and by our scheduler; with states no step is split."""
    model = json.loads(json.dumps(ALL[name]))
    text = model.get("text_config", model)
    text |= {"max_position_embeddings": 8192}
    types = {"gpt-oss-20b": "gpt_oss", "glm-4.7-flash": "glm4_moe_lite"}
    model["model_type"] = types.get(name)
    (tmp_path / "config.json").write_text(json.dumps(model))
    trace = [TraceRequest(10.0 * i, 3000, 5) for i in range(4)]
    for scheduler in ("stock", "duet"):
        simulated = Simulation(
            Options(tmp_path, gpu="h200", scheduler=scheduler, disturbances=QUIET, costs=NO_COSTS)
        )
        ran = simulated.run(trace)
        assert [len(record.token_ms) for record in ran.records] == [5] * 4
    scheduler = simulated.engine().scheduler
    assert scheduler._blockers == blockers
    assert scheduler.scheduler_config.enable_chunked_prefill
    assert scheduler.max_num_scheduled_tokens == 8192
    if blockers:
        assert not ran.steps_by_mode["split"]
