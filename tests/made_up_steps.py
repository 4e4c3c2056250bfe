# SPDX-License-Identifier: Apache-2.0
"""A file of measured steps that nobody has measured."""

from __future__ import annotations

from pathlib import Path

from vllm_duet.anchors import Anchor, StepLimits, StepShape, shapes_to_measure
from vllm_duet.roofline import GpuProfile, ModelShape, Roofline
from vllm_duet.steps_file import Measured, StepsFile

MODEL = Path(__file__).parent.parent / "eval/models/qwen3-8b/config.json"
LIMITS = StepLimits(max_seqs=64, max_tokens=2048, max_context=8192, cache_tokens=100_000)


def steps_file(slower: float = 1.4, profile: str | None = "l40s") -> StepsFile:
    """Of an engine on an L40S that takes ``slower`` times as long as its profile says."""
    shape = ModelShape.from_hf_config(MODEL)
    truth = Roofline(shape, GpuProfile.load("l40s"))

    def measured(step: StepShape) -> Anchor:
        ms = truth.step_ms(truth.summarize(step.batch()), truth.profile.num_sms)
        return Anchor(step, slower * float(ms))

    return StepsFile(
        device="NVIDIA L40S" if profile else "cpu",
        device_type="cuda" if profile else "cpu",
        profile=profile,
        versions={"vllm": "0.32.0"},
        date="2026-01-01",
        model="Qwen/Qwen3-8B",
        shape=shape,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=8192,
        kv_cache_tokens=120_000,
        graph_sizes=(1, 2, 4, 8, 16, 32, 64) if profile else (),
        found=Measured(
            list(map(measured, shapes_to_measure(LIMITS))),
            checks=[measured(StepShape(8, 200, 700))],
        ),
    )
