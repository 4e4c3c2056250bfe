# SPDX-License-Identifier: Apache-2.0
"""The microbenchmark and `vllm-duet calibrate` from end to end, on a simulated GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from calibration.simulated import SimulatedDevice
from typer.testing import CliRunner

from vllm_duet.calibration import command, experiments, session
from vllm_duet.cli import app
from vllm_duet.roofline import GpuProfile

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "eval" / "gpu" / "microbench.py"
WIDE = {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def microbench() -> ModuleType:
    spec = util.spec_from_file_location("microbench", SCRIPT)
    assert spec and spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "FITTED_ROWS", (1, 64, 2048))
    monkeypatch.setattr(command, "ROWS", (1, 64, 2048, 32))


def use(monkeypatch: pytest.MonkeyPatch, device: SimulatedDevice) -> None:
    monkeypatch.setattr(command, "open_device", lambda index: device)


def run(module: ModuleType, *arguments: str) -> Any:
    return CliRunner().invoke(module.app, arguments, env=WIDE)


def test_all_groups_to_json_and_yaml(
    microbench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, SimulatedDevice(noise=0.01))
    out, profile = tmp_path / "gpu" / "m.json", tmp_path / "p.yaml"
    result = run(microbench, "--out", str(out), "--profile", str(profile), "--name", "mine")
    assert result.exit_code == 0, result.output
    results = json.loads(out.read_text())
    assert set(results["groups"]) == set(microbench.GROUPS)
    assert all(g["errors"] == 0 and g["records"] for g in results["groups"].values())
    head = results["provenance"]
    assert head["device"]["name"] == "NVIDIA H100 80GB HBM3"
    assert {"driver", "cuda", "torch", "triton"} <= set(head["device"])
    assert head["source_sha256"] == session.source_sha256()
    errors = results["fit"]["errors"]
    assert errors["operators held out"]["mean"] < 0.1
    assert errors["slowdown beside each other, duet"]["count"] == 2 * 15
    assert len(results["duet"]["splits"]) == 15
    loaded = GpuProfile.load(profile)
    assert loaded.measured == "calibrated" and loaded.name == "mine"
    assert loaded.contention == pytest.approx(1.6, abs=0.3)
    for shown in ("captured kernels stay", "weighted speedup", "operators held out"):
        assert shown in result.output


def test_an_interrupt_leaves_the_groups_that_are_done(
    microbench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = SimulatedDevice()
    use(monkeypatch, device)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "m.json"
    monkeypatch.setattr(experiments, "beside", interrupted)
    result = run(microbench, "--out", str(out))
    assert result.exit_code != 0
    assert set(json.loads(out.read_text())["groups"]) == {"bandwidth", "compute"}
    monkeypatch.undo()
    use(monkeypatch, SimulatedDevice())
    # The others can follow, and only they are run.
    before = json.loads(out.read_text())["groups"]["compute"]
    assert run(microbench, "--out", str(out), "--only", "duet").exit_code == 0
    groups = json.loads(out.read_text())["groups"]
    assert set(groups) == {"bandwidth", "compute", "duet"} and groups["compute"] == before
    # Another GPU's measurements are not mixed in.
    other = SimulatedDevice()
    other.info = replace(other.info, driver="999")
    use(monkeypatch, other)
    run(microbench, "--out", str(out), "--only", "facts")
    assert set(json.loads(out.read_text())["groups"]) == {"facts"}


def test_what_fails_is_kept_and_the_rest_goes_on(
    microbench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, SimulatedDevice(broken="paged_attention"))
    out = tmp_path / "m.json"
    result = run(microbench, "--out", str(out))
    assert result.exit_code == 0
    groups = json.loads(out.read_text())["groups"]
    assert groups["compute"]["errors"] == 0
    wrong = [r for r in groups["bandwidth"]["records"] if "error" in r]
    assert {r["work"]["kind"] for r in wrong} == {"attention"}
    assert len(wrong) == groups["bandwidth"]["errors"] == 3 * 32
    assert "CalibrationError" in wrong[0]["error"] and "Traceback" in wrong[0]["error"]
    # What remains is still a profile.
    assert "fit" in json.loads(out.read_text())


def test_the_budget_cuts_rounds_and_then_splits() -> None:
    device = SimulatedDevice()
    profile, _ = session.base_profile(device.info)
    steps = experiments.bandwidth(device.info, profile)
    steps += experiments.contention(device.info, profile)
    few = session.seconds(steps, session.ROUNDS[-1])
    assert session.rounds_within(steps, 1e9) == session.ROUNDS[0]
    assert session.rounds_within(steps, few) == session.ROUNDS[-1]
    groups: dict[str, Any] = {}
    session.run(device, steps, few / 20, groups.__setitem__)
    for group in groups.values():
        assert group["rounds"] == session.ROUNDS[-1]
        assert group["records"] and group["steps_left_out_for_time"]
    assert device.now_s() < few
    assert groups["bandwidth"]["records"][0]["lane"] == "whole"


@pytest.mark.parametrize("group", ["compute", "facts"])
def test_groups_can_be_listed_without_a_gpu(group: str) -> None:
    """In a process of its own: neither the script nor its listing needs torch or vLLM."""
    code = f"""
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "triton", "vllm", "scipy", "pynvml"])  # not importable
sys.argv = ["microbench.py", "--dry-run", "--only", "{group}"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert group in shown.stdout and "GFLOP" in shown.stdout
    assert "The plan is that of an NVIDIA H100" in shown.stdout.replace("\n", " ")


# vllm-duet calibrate


def calibrate(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *arguments], env=WIDE)


def test_calibrate_writes_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, SimulatedDevice())
    out = tmp_path / "mine.yaml"
    result = calibrate("--out", str(out))
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}" in result.output
    assert GpuProfile.load(out).measured == "calibrated"


def test_calibrate_stays_within_three_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    device = SimulatedDevice()
    profile, _ = session.base_profile(device.info)
    steps = command.steps(device.info, profile)
    assert session.seconds(steps, session.ROUNDS[-1]) < command.BUDGET_S < 180


def test_calibrate_writes_nothing_where_too_little_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, SimulatedDevice(broken="read"))
    out = tmp_path / "mine.yaml"
    result = calibrate("--out", str(out))
    assert result.exit_code == 2 and not out.exists()
    assert "too few reads were measured" in result.output
    assert "The first error:" in result.output


def test_calibrate_without_a_gpu_is_one_sentence() -> None:
    result = calibrate()
    assert result.exit_code == 2
    assert result.output.count("\n") == 1 and "Traceback" not in result.output


def test_calibrate_says_what_it_would_run() -> None:
    result = calibrate("--dry-run")
    assert result.exit_code == 0
    assert (
        "120 + 12 SMs" in result.output and "by the forecast of profile h100-sxm" in result.output
    )


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, vllm_duet.cli, vllm_duet.calibration.command, vllm_duet.calibration.session;"
        "assert not {'torch', 'triton', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
