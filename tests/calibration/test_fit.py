# SPDX-License-Identifier: Apache-2.0
"""A known GPU, measured in virtual time, has to come out of the fit as it went in."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from calibration.simulated import TRUTH, SimulatedDevice

from vllm_duet.calibration import command, experiments, session
from vllm_duet.calibration.device import CalibrationError
from vllm_duet.calibration.experiments import Record, Step
from vllm_duet.calibration.fit import Fit, curve, fit, write_profile
from vllm_duet.calibration.session import Results
from vllm_duet.calibration.work import (
    SHAPE,
)
from vllm_duet.roofline import Batch, GpuProfile, Roofline

INFO = SimulatedDevice().info
BASE, _ = session.base_profile(INFO)


def run(device: SimulatedDevice, steps: list[Step]) -> list[Record]:
    groups: dict[str, Results] = {}
    session.run(device, steps, 1e9, groups.__setitem__)
    assert not any(group["errors"] for group in groups.values())
    return session.records_of(groups)


@cache
def measured(noise: float = 0.0) -> tuple[Record, ...]:
    return tuple(run(SimulatedDevice(noise=noise), command.steps(INFO, BASE)))


@cache
def fitted(noise: float = 0.0) -> Fit:
    return fit(BASE, INFO, measured(noise))


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.01), (0.02, 0.06)])
def test_recovers_the_gpu(noise: float, tolerance: float) -> None:
    found = fitted(noise).profile
    assert found.gemm_fraction == pytest.approx(TRUTH.gemm_fraction, rel=tolerance)
    assert found.hbm_fraction == pytest.approx(TRUTH.hbm_fraction, rel=tolerance)
    assert found.attention_hbm_fraction == pytest.approx(0.7, rel=tolerance)
    assert found.contention == pytest.approx(TRUTH.contention, rel=3 * tolerance)
    assert found.gemm_overhead_us == pytest.approx(5.0, abs=0.2 + 20 * noise)
    assert found.rowwise_overhead_us == pytest.approx(1.6, abs=0.1)
    measured_sms = [sms for sms, _ in found.compute_curve]
    assert measured_sms == sorted({*range(8, 125, 8), *range(12, 125, 8), 132})
    for name in ("compute_fractions", "bandwidth_fractions"):
        expected, curve_found = getattr(TRUTH, name)(), getattr(found, name)()
        assert curve_found[8:] == pytest.approx(expected[8:], rel=tolerance)


@pytest.mark.parametrize("contention", [0.0, 3.0])
def test_recovers_contention_whatever_it_is(contention: float) -> None:
    device = SimulatedDevice(replace(TRUTH, contention=contention))
    pairs = run(device, experiments.contention(INFO, BASE)[:5])
    records = [r for r in measured() if r["group"] != "contention"]
    assert fit(BASE, INFO, records + pairs).profile.contention == pytest.approx(
        contention, abs=0.03
    )


def test_forecasts_of_held_out_operators_are_judged() -> None:
    exact, noisy = fitted().errors, fitted(0.02).errors
    assert exact["operators held out"]["count"] == noisy["operators held out"]["count"] > 300
    assert exact["operators held out"]["mean"] < 0.01
    assert exact["operators held out"]["mean"] < noisy["operators held out"]["mean"] < 0.03
    # A GPU that the roofline's form does not fit shows as an error, not as a good profile.
    bent = [r | {"ms": 2 * r["ms"]} if r.get("held_out") else r for r in measured()]
    assert fit(BASE, INFO, bent).errors["operators held out"]["mean"] == pytest.approx(
        0.5, abs=0.01
    )


def test_the_file_loads_and_forecasts_as_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_profile(path, fitted())
    loaded = GpuProfile.load(path)
    assert loaded.measured == "calibrated" and loaded.device_names == ("NVIDIA H100 80GB HBM3",)
    assert loaded.compute_curve[-1] == loaded.bandwidth_curve[-1] == (132, 1.0)
    batch = Batch([2048, *[1] * 40], [0, *[1500] * 40])
    for sms in (24, 64, 132):
        ms = Roofline(SHAPE, loaded).predict(batch, sms).ms
        assert ms == pytest.approx(Roofline(SHAPE, TRUTH).predict(batch, sms).ms, rel=0.02)
    assert "operators held out" in path.read_text().splitlines()[1]


def test_sources_say_what_was_measured_and_what_was_not() -> None:
    sources, shipped = fitted().profile.sources, GpuProfile.load("h100-sxm").sources
    for key in ("gemm_fraction", "compute_curve", "bandwidth_curve", "contention", "hbm_fraction"):
        assert sources[key].startswith("measured on one NVIDIA H100 80GB HBM3, driver none, CUDA")
    for key in ("attention_fraction", "row_bytes_per_s", "launch_gap_us", "step_overhead_us"):
        assert sources[key] == shipped[key]


def test_an_unknown_gpu_says_whose_numbers_it_has() -> None:
    """Faster than any GPU known: its rates rise above the peaks it was given."""
    info = replace(INFO, name="NVIDIA X1")
    base, known = session.base_profile(info)
    assert not known
    records = [
        r | {"ms": r["ms"] / 2} if r["group"] in ("compute", "bandwidth") else r for r in measured()
    ]
    found = fit(base, info, records, known=known).profile
    assert found.name == "nvidia-x1" and found.device_names == ("NVIDIA X1",)
    taken_over = f"assumption: taken over from {base.name}, the nearest"
    assert found.sources["row_bytes_per_s"].startswith(taken_over)
    assert found.peak_flops["bfloat16"] > base.peak_flops["bfloat16"]
    assert found.hbm_bytes_per_s > base.hbm_bytes_per_s and found.hbm_fraction == 1.0


def test_without_pairs_contention_is_not_claimed() -> None:
    records = [r for r in measured() if r["group"] != "contention"]
    profile = fit(BASE, INFO, records).profile
    assert profile.contention == 1.0 and "contention" not in profile.sources


def test_too_little_is_refused() -> None:
    records = [r for r in measured() if r["group"] != "compute"]
    with pytest.raises(CalibrationError, match="too few products"):
        fit(BASE, INFO, records)
    with pytest.raises(CalibrationError, match="too few reads"):
        fit(BASE, INFO, [])


def test_curves_rise_and_end_at_the_whole_gpu() -> None:
    noisy = {8: 0.1, 16: 0.3, 24: 0.2, 32: 0.25, 40: 0.9, 48: 1.02}
    found = curve(noisy, 132)
    assert found == (
        *((8, 0.1), (16, 0.25), (24, 0.25), (32, 0.25)),
        *((40, 0.9), (48, 1.0), (132, 1.0)),
    )
