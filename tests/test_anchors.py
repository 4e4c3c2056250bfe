# SPDX-License-Identifier: Apache-2.0
"""Forecasts by measured steps. The steps here were "measured" of another roofline: that of a GPU
or of a made-up CPU whose rates stand in no other ratio to each other than those assumed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_duet.anchors import (
    Anchor,
    LaneAnchor,
    StepLimits,
    StepShape,
    fit,
    lane_gains,
    lane_shapes,
    mean_error,
    shapes_to_measure,
    within,
)
from vllm_duet.forecast import unknown_device
from vllm_duet.policy import ForecastPolicy, PolicyLimits, decode_lanes
from vllm_duet.roofline import GpuProfile, LaneFactor, ModelShape, Roofline

MODEL = Path(__file__).parent.parent / "eval/models/qwen3-8b/config.json"
LIMITS = StepLimits(max_seqs=256, max_tokens=8192, max_context=16384, cache_tokens=400_000)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return ModelShape.from_hf_config(MODEL)


def slow_cpu() -> GpuProfile:
    return replace(
        unknown_device("cpu"),
        peak_flops=dict.fromkeys(unknown_device("cpu").peak_flops, 2e11),
        hbm_bytes_per_s=1.5e10,
        row_bytes_per_s=4e9,
        attention_fraction=0.3,
        attention_hbm_fraction=0.3,
        unoverlapped=0.6,
        step_overhead_us=4000.0,
    )


def measured(truth: Roofline, shapes: list[StepShape]) -> list[Anchor]:
    sms = truth.profile.num_sms
    return [Anchor(s, float(truth.step_ms(truth.summarize(s.batch()), sms))) for s in shapes]


def drawn(kind: str) -> list[StepShape]:
    rng, found = random.Random(kind), []
    for _ in range(100):
        decodes = int(2 ** rng.uniform(0, 8)) if kind != "prefill" else 0
        prefill = int(2 ** rng.uniform(5, 13)) if kind != "decode" else 0
        found.append(
            StepShape(
                decodes,
                rng.randint(10, 6000) if decodes else 0,
                prefill,
                rng.choice([0, rng.randint(0, 4000)]) if prefill else 0,
            )
        )
    return found


@pytest.mark.parametrize(
    ("truth", "base"),
    [
        ("h100-sxm", "a100-sxm-80g"),
        ("b200", "l40s"),
        ("h100-sxm", unknown_device("cuda")),
        ("l40s", unknown_device("cuda")),
        (slow_cpu(), unknown_device("cpu")),
    ],
    ids=lambda profile: profile if isinstance(profile, str) else profile.name,
)
@pytest.mark.parametrize("kind", ["decode", "mixed", "prefill"])
def test_steps_that_were_not_measured(shape, truth, base, kind) -> None:
    true, assumed = (
        Roofline(shape, GpuProfile.load(p) if isinstance(p, str) else p) for p in (truth, base)
    )
    factors = fit(assumed, measured(true, shapes_to_measure(LIMITS)))
    others = measured(true, drawn(kind))
    assert mean_error(assumed.anchored(factors), others) < 0.1
    assert mean_error(assumed, others) > 0.15  # without, it is another device's


def test_an_anchor_is_met(shape) -> None:
    true, assumed = Roofline(shape, slow_cpu()), Roofline(shape, unknown_device("cpu"))
    anchors = measured(true, shapes_to_measure(LIMITS))
    alone = [a for a in anchors if a.shape.decodes and a.shape.decode_context == 16]
    assert mean_error(assumed.anchored(fit(assumed, anchors)), alone) < 1e-3


def test_lanes_beside_each_other(shape) -> None:
    """Each is forecast at its measured time, and gains what a cycle's work would take whole."""
    roofline = Roofline(shape, GpuProfile.load("h100-sxm"))
    decodes, prefill = lane_shapes(LIMITS, 64)
    assert prefill is not None
    whole = {a.shape: a.ms for a in measured(roofline, [*decodes, prefill])}
    pairs = [decode._replace(prefill=prefill.prefill) for decode in decodes]
    lanes = []
    for sms, slower in ((16, 1.2), (32, 3.0)):
        for pair in pairs:
            parts = (roofline.summarize(part.batch()) for part in pair.parts())
            decode_ms, prefill_ms = roofline.pair_ms(*parts, sms, 132 - sms)
            step_ms = slower * float(decode_ms)
            steps = float(prefill_ms) / step_ms
            lanes.append(LaneAnchor(sms, pair, step_ms, float(prefill_ms), prefill_ms, steps))
    found = fit(roofline, measured(roofline, shapes_to_measure(LIMITS)), lanes)
    assert found.lanes == (
        LaneFactor(16, pytest.approx(1.2, rel=0.02), pytest.approx(1.0, rel=0.02)),
        LaneFactor(32, pytest.approx(3.0, rel=0.02), pytest.approx(1.0, rel=0.02)),
    )
    gains = lane_gains(whole, lanes)
    assert gains.keys() == {16, 32} and gains[16] > 1.05 > gains[32]


def test_a_prefill_that_runs_without_a_graph_costs_more(shape) -> None:
    roofline = Roofline(shape, GpuProfile.load("h100-sxm"))
    anchors = [
        anchor._replace(ms=anchor.ms + (5.0 if anchor.shape.prefill else 0.0))
        for anchor in measured(roofline, shapes_to_measure(LIMITS))
    ]
    forecast = roofline.anchored(fit(roofline, anchors))
    alone, mixed = measured(forecast, [StepShape(8, 16), StepShape(8, 16, 64)])
    stock = measured(roofline, [StepShape(8, 16), StepShape(8, 16, 64)])
    assert alone.ms == pytest.approx(stock[0].ms, rel=0.01)
    assert mixed.ms == pytest.approx(stock[1].ms + 5, rel=0.1)


def test_operators_of_an_anchored_step_add_up(shape) -> None:
    true, assumed = Roofline(shape, slow_cpu()), Roofline(shape, unknown_device("cpu"))
    roofline = assumed.anchored(fit(assumed, measured(true, shapes_to_measure(LIMITS))))
    step = StepShape(12, 300, 700, 40)
    prediction = roofline.predict(step.batch(), 1)
    assert prediction.ms == pytest.approx(measured(roofline, [step])[0].ms)
    assert sum(op.ms for op in prediction.operators) == pytest.approx(prediction.ms)


def test_an_unknown_device_is_capped_and_never_split(shape) -> None:
    device = unknown_device("cpu")
    assert decode_lanes(device, None) == ()
    true, assumed = Roofline(shape, slow_cpu()), Roofline(shape, device)
    roofline = assumed.anchored(fit(assumed, measured(true, shapes_to_measure(LIMITS))))
    one, both = measured(roofline, [StepShape(4, 300), StepShape(4, 300, 2000)])
    policy = ForecastPolicy(roofline, PolicyLimits(tbt_slo_ms=(one.ms + both.ms) / 2))
    plan = policy.decide([300] * 4, [2000], [0], can_split=False)
    assert plan.mode == "capped" and 0 < plan.max_prefill_tokens < 2000


def test_nothing_is_measured_that_the_engine_cannot_run() -> None:
    for limits in (LIMITS, StepLimits(4, 64, 100, 200), StepLimits(1, 16, 64, 64)):
        shapes = shapes_to_measure(limits)
        assert shapes and all(map(limits.allow, shapes))
        assert any(shape.decodes == 1 for shape in shapes)
        assert [s.num_tokens for s in shapes] == sorted(s.num_tokens for s in shapes)


def test_a_budget_is_kept(shape) -> None:
    """On a device of which each step takes as long as the roofline says, in seconds for ms."""
    roofline, now = Roofline(shape, GpuProfile.load("l40s")), 0.0

    def measure(step: StepShape) -> Anchor:
        nonlocal now
        anchor = measured(roofline, [step])[0]
        now += anchor.ms
        return anchor

    shapes = shapes_to_measure(LIMITS)
    budget = sum(anchor.ms for anchor in measured(roofline, shapes)) / 2
    found = list(within(shapes, roofline, budget, measure, lambda: now))
    assert len(found) < len(shapes) and budget / 4 < now <= budget
    assert fit(roofline, found).steps


def test_without_a_decode_step_there_is_no_forecast(shape) -> None:
    roofline = Roofline(shape, GpuProfile.load("l40s"))
    with pytest.raises(ValueError, match="no decode step"):
        fit(roofline, measured(roofline, [StepShape(prefill=64)]))
