# SPDX-License-Identifier: Apache-2.0
"""The roofline against operators measured on an H100.

The error is |predicted / measured - 1|, averaged over every row of the CSV (all
numbers of tokens, all tensor parallelism) and over the operators of a group. A
measured time is one kernel's, so the gap between kernels is taken as 0. vLLM fuses
the residual addition into the norm; the CSV has them apart, and so has this test.
h100-sxm's row-wise kernels were fitted to these rows. Its products were not: they are fitted to
a newer vLLM's on the same GPU (tests/measured), and some 10 % of the difference is the software's.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hf_configs import LLAMA2_7B

from vllm_duet.roofline import Batch, GpuProfile, ModelShape, Operator, Roofline, predictor
from vllm_duet.roofline.operators import Kind, operators, rowwise

DATA = Path(__file__).parents[1] / "data" / "h100-llama2-7b-operators.csv"
GEMMS = {
    "attn_pre_proj_ms": "qkv_proj",
    "attn_post_proj_ms": "o_proj",
    "mlp_up_proj_ms": "gate_up",
    "mlp_down_proj_ms": "down",
}
ELEMENTWISE = {
    "attn_rope_ms": "rope",
    "mlp_act_ms": "act",
    "input_layernorm_ms": "norm",
    "post_attention_layernorm_ms": "norm",
    "add_ms": "add",
}


def _measured_operators(shape: ModelShape, expert_tile_rows: int) -> tuple[Operator, ...]:
    hidden, size = shape.hidden_size, shape.activation_bytes
    return (
        *operators(shape, expert_tile_rows),
        rowwise("norm", shape, 2 * hidden, 1, reductions=1),
        Operator("add", Kind.STREAM, 1, bytes={"tokens": 3 * hidden * size}),
    )


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    monkeypatch.setattr(predictor, "operators", _measured_operators)
    profile = replace(GpuProfile.load("h100-sxm"), launch_gap_us=0.0)
    rooflines = {
        tp: Roofline(ModelShape.from_hf_config(LLAMA2_7B, tensor_parallel_size=tp), profile)
        for tp in (1, 2, 4, 8)
    }
    found: dict[str, list[float]] = {column: [] for column in (GEMMS | ELEMENTWISE)}
    lines = (line for line in DATA.read_text().splitlines() if not line.startswith("#"))
    for row in csv.DictReader(lines):
        roofline = rooflines[int(row["tensor_parallel"])]
        prediction = roofline.predict(Batch([int(row["num_tokens"])], [0]), 132)
        repeats = {op.name: op.repeats for op in roofline.operators}
        ms = {op.name: op.ms / repeats[op.name] for op in prediction.operators}
        for column, name in (GEMMS | ELEMENTWISE).items():
            found[column].append(abs(ms[name] / float(row[column]) - 1))
    return found


def test_mean_absolute_error(errors: dict[str, list[float]]) -> None:
    for column, each in errors.items():
        print(f"{column:<30}{np.mean(each):7.1%}{np.max(each):8.1%}")
    assert {len(each) for each in errors.values()} == {92}
    assert np.mean([errors[column] for column in GEMMS]) < 0.14
    assert np.mean([errors[column] for column in ELEMENTWISE]) < 0.15
    # No operator is carried by the others.
    assert max(np.mean(errors[column]) for column in GEMMS) < 0.15
    assert max(np.mean(each) for each in errors.values()) < 0.30


def test_large_product() -> None:
    """An 8192 x 8192 x 8192 bf16 product ran at 713 TFLOP/s on an H100 80GB HBM3, as NVIDIA
    measured it; at 798 elsewhere."""
    square = {
        **LLAMA2_7B,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_hidden_layers": 1,
    }
    roofline = Roofline(ModelShape.from_hf_config(square), GpuProfile.load("h100-sxm"))
    prediction = roofline.predict(Batch([8192], [0]), 132)
    o_proj = next(op for op in prediction.operators if op.name == "o_proj")
    assert o_proj.flops == 2 * 8192**3
    assert o_proj.flops / o_proj.ms * 1e3 == pytest.approx(713e12, rel=0.03)
