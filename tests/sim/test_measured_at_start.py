# SPDX-License-Identifier: Apache-2.0
"""Policies that measure steps on the simulated GPU first, as an engine does at its start."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_steps import steps_file
from sim.harness import MODEL, NO_COSTS, QUIET, simulation

from vllm_duet.anchors import Anchor, StepShape, mean_error
from vllm_duet.roofline import Roofline
from vllm_duet.sim.simulation import Options, Simulation
from vllm_duet.sim.systems import NoContention
from vllm_duet.sim.traces import synthetic

WRONG = 0.3
MIXED = [
    StepShape(decodes, context, prefill)
    for decodes, context in ((4, 300), (40, 1500), (200, 600))
    for prefill in (64, 500, 1800)
]


def forecast(sim: Simulation) -> Roofline:
    """The policy's."""
    return sim.engine().scheduler._policy._roofline


def errors(sim: Simulation) -> float:
    """How far the policy's forecasts of mixed steps, which are no anchors, are off."""
    truth = sim.engine().gpu.truth
    took = [
        Anchor(s, truth.step_ms([s.decode_context] * s.decodes, [s.prefill], [0])) for s in MIXED
    ]
    return mean_error(forecast(sim), took)


@pytest.mark.parametrize("truth", ["roofline", "measured"])
@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_profile_forecasts_right_by_measured_steps(truth: str, seed: int) -> None:
    options = dict(model_error=WRONG, seed=seed, truth=truth, max_num_batched_tokens=2048)
    without, with_them = (
        simulation("duet", measure_at_start=measured, **options) for measured in (False, True)
    )
    assert errors(with_them) < 0.06 < errors(without)


@pytest.mark.parametrize("seed", range(4))
def test_the_lanes_that_are_measured_are_those_that_steps_are_split_by(seed: int) -> None:
    sim = simulation("duet", measure_at_start=True, model_error=WRONG, seed=seed)
    policy = sim.engine().scheduler._policy
    assert {lane.decode_sms for lane in policy._roofline.anchors.lanes} == set(policy.decode_sms)


def test_measuring_has_the_noise_of_the_steps() -> None:
    noisy = replace(QUIET, noise=0.03)
    found = [
        forecast(simulation("duet", measure_at_start=True, disturbances=d, seed=seed)).anchors
        for d, seed in ((QUIET, 0), (QUIET, 1), (noisy, 0), (noisy, 0), (noisy, 1))
    ]
    assert found[0] == found[1] and found[2] == found[3]
    assert found[0] != found[2] != found[4]


def test_what_a_policy_does_not_know_of_stays_so() -> None:
    blind = forecast(simulation("duet-no-contention", measure_at_start=True))
    assert isinstance(blind, NoContention) and blind.anchors.steps != ((1, 1.0),)


def test_without_it_nothing_is_measured() -> None:
    assert forecast(simulation("duet")).anchors.steps == ((1, 1.0),)


def test_a_file_has_the_times_of_the_truth_and_of_the_policy(tmp_path) -> None:
    path = tmp_path / "steps.json"
    found = steps_file()
    found.save(path)
    sim = Simulation(
        Options(MODEL, str(path), disturbances=QUIET, costs=NO_COSTS, model_error=WRONG)
    )
    # Also where its profile is wrong, and with what launching cost when they were measured.
    assert errors(sim) < 0.06
    truth = sim.engine().gpu.truth
    (check,) = found.found.checks
    step = check.shape
    ms = truth.step_ms([step.decode_context] * step.decodes, [step.prefill], [0])
    assert ms == pytest.approx(check.ms, rel=0.02)
    # Padded to that engine's graphs.
    assert truth.decode([16] * 33).summary.decode_tokens == 64
    records = sim.run(synthetic(6, 2.0, 900, 12, seed=0)).records
    assert len(records) == 6
