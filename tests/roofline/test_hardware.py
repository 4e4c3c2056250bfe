# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vllm_duet.roofline import GpuProfile, ProfileError
from vllm_duet.roofline.hardware import FOLDER, MEASURED

NAMES = ["a100-sxm-80g", "b200", "b300", "h100-pcie", "h100-sxm", "h200", "l40s", "rtx-pro-6000"]


def test_names() -> None:
    assert GpuProfile.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profiles(name: str) -> None:
    profile = GpuProfile.load(name)
    assert profile.name == name and profile.measured in MEASURED
    assert profile.num_sms >= profile.min_sms >= profile.sm_granularity
    for curve in (profile.compute_fractions(), profile.bandwidth_fractions()):
        assert curve.shape == (profile.num_sms + 1,)
        assert curve[0] == 0 and curve[-1] == pytest.approx(1)
        assert (np.diff(curve) > 0).all()


NVIDIA_SMI_MIB = {
    "a100-sxm-80g": 81920,
    "h100-sxm": 81559,
    "h100-pcie": 81559,
    "h200": 143771,
    "b200": 183359,
    "b300": 275040,
    "l40s": 46068,
    "rtx-pro-6000": 97887,
}
"""Total memory, of which CUDA says a little less."""


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_cuda_reports(name: str) -> None:
    memory, total = GpuProfile.load(name).memory_bytes, NVIDIA_SMI_MIB[name] * 2**20
    assert 0.965 * total < memory < total


def test_bandwidth_saturates_long_before_compute() -> None:
    profile = GpuProfile.load("h100-sxm")
    half = profile.num_sms // 2
    assert profile.compute_fractions()[half] == 0.5
    assert profile.bandwidth_fractions()[half] > 0.8
    # Far from saturation an SM draws what one SM can.
    reached = profile.hbm_bytes_per_s * profile.hbm_fraction
    assert profile.bandwidth_fractions()[8] * reached / 8 == pytest.approx(50e9, rel=0.02)


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80g"),
        ("NVIDIA L40S", "l40s"),
        ("nvidia b200", "b200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_detect(device_name: str, name: str | None) -> None:
    found = GpuProfile.detect(device_name)
    assert (found and found.name) == name


def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "h100-sxm.yaml").read_text())
    return loaded


def _load(tmp_path: Path, data: Any) -> GpuProfile:
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump(data))
    return GpuProfile.load(path)


def test_measured_curves_are_interpolated(tmp_path: Path) -> None:
    data = _data()
    data["compute_curve"] = [{"sms": 66, "fraction": 0.6}, {"sms": 132, "fraction": 1.0}]
    data["bandwidth_curve"] = [{"sms": 33, "fraction": 0.8}, {"sms": 132, "fraction": 1}]
    data["sources"] |= {"compute_curve": "measured", "bandwidth_curve": "measured"}
    profile = _load(tmp_path, data)
    assert profile.compute_fractions()[[0, 33, 66, 99, 132]] == pytest.approx([0, 0.3, 0.6, 0.8, 1])
    assert profile.bandwidth_fractions()[[33, 66]] == pytest.approx([0.8, 0.8 + 0.2 / 3])


@pytest.mark.parametrize("contention", [0, 0.4, 2.5])
def test_contention_is_read_with_its_source(tmp_path: Path, contention: float) -> None:
    assert _load(tmp_path, _data()).contention == 1.0
    data = _data() | {"contention": contention}
    with pytest.raises(ProfileError, match="'sources' does not say where 'contention' comes from"):
        _load(tmp_path, data)
    data["sources"]["contention"] = "measured"
    assert _load(tmp_path, data).contention == contention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_smms": 1}, "unknown key 'num_smms'"),
        ({"num_sms": None}, "'num_sms' must be a whole number of at least 1, not None"),
        ({"num_sms": 0}, "'num_sms' must be a whole number of at least 1, not 0"),
        ({"hbm_bytes_per_s": "fast"}, "'hbm_bytes_per_s' must be a number of at least 0"),
        ({"hbm_bytes_per_s": 0}, "'hbm_bytes_per_s' must be above 0"),
        ({"gemm_fraction": 1.2}, "'gemm_fraction' must be at most 1, not 1.2"),
        (
            {"measured": "yes"},
            "'measured' must be one of published, nothing, not 'yes'",
        ),
        ({"contention": -1}, "'contention' must be a number of at least 0, not -1"),
        ({"peak_flops": 9}, "'peak_flops' must be a mapping of names to numbers, not 9"),
        ({"sources": {}}, "'sources' does not say where 'num_sms' comes from"),
        (
            {"compute_curve": [{"sms": 8}]},
            "'compute_curve' must be a list of {sms, fraction}",
        ),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as error:
        _load(tmp_path, {**_data(), **change})
    assert message in str(error.value) and "gpu.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(66, 0.5), (66, 1.0)], "must rise"),
        ([(66, 0.9), (132, 0.8)], "must rise"),
        ([(66, 1.0)], "must end with fraction 1 at all 132 SMs"),
    ],
)
def test_impossible_curves(tmp_path: Path, points: list[tuple[int, float]], message: str) -> None:
    data = _data()
    data["compute_curve"] = [{"sms": s, "fraction": f} for s, f in points]
    data["sources"]["compute_curve"] = "measured"
    with pytest.raises(ProfileError, match=message):
        _load(tmp_path, data)


def test_missing_key_and_missing_profile(tmp_path: Path) -> None:
    data = _data()
    del data["num_sms"]
    with pytest.raises(ProfileError, match="missing key 'num_sms'"):
        _load(tmp_path, data)
    with pytest.raises(ProfileError, match=r"no GPU profile 'h300'.*h100-sxm"):
        GpuProfile.load("h300")
    with pytest.raises(ProfileError, match="must be a mapping"):
        _load(tmp_path, [1])
