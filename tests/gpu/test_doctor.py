# SPDX-License-Identifier: Apache-2.0
"""``vllm-duet doctor`` beside vLLM's CUDA build and a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from gpu.process import environment


def doctor(**gpu: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_duet", "doctor"],
        env=environment(**gpu) | {"VLLM_DUET_CUDA_LANES": "true", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_split_is_possible_on_a_gpu_that_is_known():
    said = doctor()
    assert said.returncode == 0, said.stdout + said.stderr
    assert "NVIDIA H100 80GB HBM3" in said.stdout
    assert "│ SPLIT      │ yes" in said.stdout


@pytest.mark.parametrize(
    ("gpu", "why"),
    [({"sms": 114}, "is of 132 SMs; this GPU has 114"), ({"driver": 12040}, "too old")],
    ids=["SMs", "driver"],
)
def test_it_says_why_split_is_not(gpu, why):
    said = doctor(**gpu)
    assert said.returncode == 1 and why in said.stdout, said.stdout + said.stderr
