# SPDX-License-Identifier: Apache-2.0
"""C(S) and B(S) of the A100's profile against times measured on groups of its SMs.

Qwen2.5-7B on one A100 under SGLang's pdmux, which runs decode and prefill in green contexts,
with prefill held at 16 SMs; tests/data/ has the figures and their source. The context lengths
are not given; at batch 4 a thousand tokens more are 1 % of the time. Nothing was fitted to these
figures: 40 GB/s an SM is an assumption that they support. Contention, and an H100's B(S), stay
assumptions, since nobody has published their like.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_duet.roofline import Batch, GpuProfile, ModelShape, Roofline

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "a100-decode-by-sms.json").read_text())
ITL_MS = {int(sms): ms for sms, ms in PUBLISHED["itl_ms_by_sms"].items()}
ITL_MS_UNSPLIT, PREFILL_SMS = PUBLISHED["itl_ms_unsplit"], PUBLISHED["prefill_sms"]
PRODUCT_SMS = (14, 28, 42, 54, 68)
PRODUCT_SPREAD = 131 / 118
"""Of a GEMM's time times its SMs, most over least."""


@pytest.fixture(scope="module")
def roofline() -> Roofline:
    return Roofline(ModelShape.from_hf_config(PUBLISHED["config"]), GpuProfile.load("a100-sxm-80g"))


def test_time_between_tokens(roofline: Roofline) -> None:
    decode, prefill = Batch([1] * 4, [1000] * 4), Batch([2048], [0])
    errors = [
        roofline.predict_pair(decode, prefill, sms, PREFILL_SMS).decode_ms / ms - 1
        for sms, ms in ITL_MS.items()
    ]
    unsplit = roofline.predict(decode, roofline.profile.num_sms).ms / ITL_MS_UNSPLIT - 1
    print([f"{error:+.1%}" for error in (*errors, unsplit)])
    assert np.abs(errors).max() < 0.07 and np.abs(errors).mean() < 0.05
    assert abs(unsplit) < 0.10


def test_decode_saturates_where_it_was_seen_to(roofline: Roofline) -> None:
    """From 16 to 24 SMs 1.43 times as fast, from 44 to 92 SMs only 1.07 times."""
    decode = Batch([1] * 4, [1000] * 4)
    ms = {sms: roofline.predict(decode, sms).ms for sms in ITL_MS}
    assert ms[16] / ms[24] == pytest.approx(ITL_MS[16] / ITL_MS[24], rel=0.05)
    assert ms[44] / ms[92] == pytest.approx(ITL_MS[44] / ITL_MS[92], rel=0.07)


def test_products_are_linear_in_sms(roofline: Roofline) -> None:
    names = {"qkv_proj", "o_proj", "gate_up", "down"}
    times = [
        sms
        * sum(
            op.ms for op in roofline.predict(Batch([2048], [0]), sms).operators if op.name in names
        )
        for sms in PRODUCT_SMS
    ]
    assert 1 <= max(times) / min(times) < PRODUCT_SPREAD
