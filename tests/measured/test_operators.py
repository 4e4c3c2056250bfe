# SPDX-License-Identifier: Apache-2.0
"""How well operators are forecast that NVIDIA measured: those of shapes that were held out.

The profiles are fitted anew here, and have to come out as they are shipped.
"""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("aiconfigurator_core")

from vllm_duet.measured import fit as fitting
from vllm_duet.measured import tables
from vllm_duet.measured.fit import Fit, errors, fit
from vllm_duet.roofline import GpuProfile

GOALS = {
    "gemm": {"all": 0.07, "rows": 0.10},
    "prefill": {"from 1000 tokens": 0.10},
    "decode": {"from 10000 tokens": 0.12, "below 10000 tokens": 0.20},
    **{kind: {"all": 0.15} for kind in ("experts", "mla_prefill", "mla_decode", "all_reduce")},
}

SHORTFALLS = {
    # Times go up and down from one number of rows to the next: even between those of the same
    # product with a few rows more and fewer, a time is 9 % (L40S), 14 % (B200) and 15 % (H200)
    # off; operators.json has it of each. On the L40S the clock does that; the kernels in fp8 for
    # the H200 have tiles of so many rows that whole waves of them leave much of the GPU idle;
    # on the B200 one time in six is twice its neighbours', and one row takes twice what two do.
    ("l40s", "gemm bfloat16", "all"): 0.08,
    ("h200", "gemm fp8", "257-1024 rows"): 0.13,
    ("b200", "gemm fp8", "all"): 0.09,
    ("b200", "gemm fp8", "1-16 rows"): 0.13,
    ("l40s", "experts bfloat16 balanced", "all"): 0.18,
    ("l40s", "experts bfloat16 power_law_1.01", "all"): 0.17,
    ("l40s", "experts bfloat16 power_law_1.2", "all"): 0.16,
    # A window of 1024 was timed with five combinations of heads, one of 8192 with four; on the
    # L40S the kernel does not split a long window over SMs, as it does without one.
    ("h100-sxm", "prefill attention window fp8", "from 1000 tokens"): 0.11,
    ("l40s", "decode attention window bfloat16", "from 10000 tokens"): 0.18,
    # One of ten shapes is held out: gpt-oss-20b on one GPU, the largest experts of its kind.
    ("l40s", "experts mxfp4 balanced", "all"): 0.20,
    # Held out are the two sizes below 512 KiB, from which on vLLM's kernel works in two steps: what
    # takes 9 us is read off a line from 8 us at 64 KiB to the 18 us of 512 KiB.
    ("b200", "all_reduce 4", "all"): 0.18,
    ("b300", "all_reduce 4", "all"): 0.18,
    # Timed with a single head only, which is held out.
    ("rtx-pro-6000", "mla_decode fp8", "all"): 0.42,
}
"""Where a goal is missed: what is reached, and why."""


@cache
def fitted(gpu: str) -> Fit:
    return fit(gpu)


@pytest.mark.parametrize("gpu", tables.SYSTEMS)
def test_errors_on_held_out_shapes(gpu: str) -> None:
    missed = []
    for table, by_size in errors(fitted(gpu)).items():
        goals = GOALS[table.split()[0]]
        for size, found in by_size.items():
            goal = goals.get("rows" if size.endswith("rows") else size)
            limit = SHORTFALLS.get((gpu, table, size), goal)
            if limit is not None and found["mean"] > limit:
                missed.append((table, size, found, limit))
            if (gpu, table, size) in SHORTFALLS and goal is not None and found["mean"] <= goal:
                missed.append((table, size, "is no shortfall any more"))
    assert not missed


@pytest.mark.parametrize("gpu", tables.SYSTEMS)
def test_the_shipped_profile_is_this_fit(gpu: str) -> None:
    shipped, made = GpuProfile.load(gpu), fitted(gpu).profile
    assert shipped.sources == made.sources and shipped.measured == "published"
    for key in (*fitting.GEMM_BOUNDS, *fitting.DECODE_BOUNDS, *fitting.PREFILL_BOUNDS):
        assert getattr(shipped, key) == pytest.approx(getattr(made, key), rel=0.02, abs=0.01)
    assert shipped.factors.keys() == made.factors.keys()
    for name, table in made.factors.items():
        assert table.axes == shipped.factors[name].axes
        close = np.abs(np.log(shipped.factors[name].permille / table.permille)) < 0.1
        assert close.mean() > 0.99


def test_whole_shapes_are_held_out() -> None:
    series = fitted("h100-sxm").series
    for kind in sorted({s.kind for s in series}):
        held_out = {s.shape for s in series if s.kind == kind and s.held_out}
        used = {s.shape for s in series if s.kind == kind and not s.held_out}
        assert held_out and not held_out & used
        assert 0.1 < len(held_out) / len(held_out | used) < 0.4
