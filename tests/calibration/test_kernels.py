# SPDX-License-Identifier: Apache-2.0
"""The kernels' results under Triton's interpreter, against references in torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from vllm_duet.calibration import triton_kernels as kernels
from vllm_duet.calibration.references import (
    attention_error,
    gemm_error,
    relative_error,
    tile_sums,
)


@pytest.fixture(autouse=True)
def _fresh_random_data() -> None:
    torch.manual_seed(7)


def _integers(count: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)


@pytest.mark.parametrize("count", [1, 8192, 20_001])
def test_copy(count: int) -> None:
    source, target = _integers(count), torch.full((count,), -1, dtype=torch.int32)
    kernels.copy(source, target)
    assert torch.equal(source, target)


@pytest.mark.parametrize("count", [5, 8192, 20_001])
def test_read_sums_every_element(count: int) -> None:
    source = _integers(count)
    sums = torch.full((-(-count // kernels.TILE_ELEMENTS),), -1, dtype=torch.int32)
    kernels.read(source, sums)
    assert torch.equal(sums, tile_sums(source, kernels.TILE_ELEMENTS))
    source[-1] += 1
    assert not torch.equal(sums, tile_sums(source, kernels.TILE_ELEMENTS))


@pytest.mark.parametrize(("batch", "context_len"), [(2, 300), (1, 64), (3, 17), (1, 1), (2, 1025)])
def test_paged_attention(batch: int, context_len: int) -> None:
    heads, kv_heads, dim, block = 8, 2, 32, 16
    width = -(-context_len // block)
    blocks = batch * width + 3
    keys, values = (torch.randn(blocks, block, kv_heads, dim) for _ in range(2))
    table = torch.randperm(blocks, dtype=torch.int32)[: batch * width].view(batch, width)
    query, output = torch.randn(batch, heads, dim), torch.full((batch, heads, dim), torch.nan)
    attention = kernels.DecodeAttention(keys, values, table, query, output, context_len)
    attention.run()
    assert attention_error(query, keys, values, table, context_len, output) < 1e-5
    # Another request's blocks are another result: the table is read.
    other = (table + 1) % blocks
    assert attention_error(query, keys, values, other, context_len, output) > 1e-2


@pytest.mark.parametrize("num_programs", [1, 3])
@pytest.mark.parametrize(("rows", "fan_out", "fan_in"), [(128, 128, 64), (130, 140, 96)])
def test_persistent_gemm(num_programs: int, rows: int, fan_out: int, fan_in: int) -> None:
    x, w = torch.randn(rows, fan_in), torch.randn(fan_out, fan_in)
    y = torch.full((rows, fan_out), torch.nan)
    kernels.persistent_gemm(x, w, y, num_programs)
    assert gemm_error(x, w, y) < 1e-5


def test_a_wrong_product_is_noticed() -> None:
    x, w = torch.randn(70, 32), torch.randn(48, 32)
    y = x @ w.T
    assert gemm_error(x, w, y) < 1e-5
    assert gemm_error(x, w, -y) == pytest.approx(2, rel=1e-3)
    y[69, 47] = torch.nan
    assert gemm_error(x, w, y) == float("inf")


def test_relative_error_of_nothing_is_not_zero() -> None:
    reference = torch.randn(10)
    assert relative_error(torch.zeros(10), reference) == pytest.approx(1)
    assert relative_error(torch.full((10,), torch.nan), reference) == float("inf")


@triton.jit
def _stand_in():  # type: ignore[no-untyped-def]
    return tl.program_id(0) % 4


def test_sm_ids_are_written_by_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has no SMs: the instruction that asks for one is stood in for."""
    monkeypatch.setattr(kernels, "_this_sm", _stand_in)
    found, sums = torch.full((6,), -1, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)
    kernels.sm_ids(torch.ones(1024, dtype=torch.int32), sums, found)
    assert found.tolist() == [0, 1, 2, 3, 0, 1]
    assert sums.tolist() == [64 * 1024] * 6


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code, by Triton's own ptxas, for compute capability 9.0."""
    script = Path(__file__).parent / "compile_for_gpu.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, str(script), "90"], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    defined = {n for n, f in vars(kernels).items() if hasattr(f, "fn") and n != "_this_sm"}
    assert set(found) == defined
    assert all(kernel["cubin_bytes"] for kernel in found.values())
    # What an L40S, with less than an H100, gives a thread block.
    assert max(kernel["shared_bytes"] for kernel in found.values()) <= 99 * 1024
    assert "%smid" in found["_sm_ids"]["ptx"]
    # Sixteen bytes at a time, or the bandwidth measured is not the GPU's.
    assert "ld.global.v4.b32" in found["_read"]["ptx"]
    assert "st.global.v4.b32" in found["_copy"]["ptx"]
    assert "cp.async.cg.shared.global" in found["_decode_attention"]["ptx"]
    assert "wgmma.mma_async" in found["_persistent_gemm"]["ptx"]
