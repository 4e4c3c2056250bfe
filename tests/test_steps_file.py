# SPDX-License-Identifier: Apache-2.0
"""The file of measured steps, where there is no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_steps import steps_file

from vllm_duet.anchors import LaneAnchor, StepShape, mean_error
from vllm_duet.roofline import ExpertShape
from vllm_duet.steps_file import StepsFile, StepsFileError


@pytest.mark.parametrize("profile", ["l40s", None])
def test_what_is_read_is_what_was_written(tmp_path: Path, profile: str | None) -> None:
    found = steps_file(profile=profile)
    experts = ExpertShape(num_layers=2, num_experts=8, experts_per_token=2, intermediate_size=64)
    lane = LaneAnchor(48, StepShape(8, 1024, 2048), 7.0, 90.0, 101.5, 13.5)
    measured = replace(found.found, lanes=[lane], gains={48: 1.07}, obstacle="said so")
    found = replace(found, shape=replace(found.shape, experts=experts), found=measured)
    found.save(tmp_path / "some folder" / "steps.json")
    assert StepsFile.load(tmp_path / "some folder" / "steps.json") == found


def test_its_roofline_has_the_measured_times() -> None:
    found = steps_file()
    assert mean_error(found.unanchored(), found.found.anchors) == pytest.approx(1 - 1 / 1.4)
    assert mean_error(found.roofline(), found.found.anchors) < 0.02
    assert mean_error(found.roofline(), found.found.checks) < 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["found"]["anchors"][0].pop("ms"), "found.anchors.0.ms"),
        (lambda d: d["shape"].update(hidden_size="wide"), "shape.hidden_size"),
        (lambda d: d.pop("device"), "device"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change, said: str) -> None:
    path = tmp_path / "steps.json"
    steps_file().save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(StepsFileError) as raised:
        StepsFile.load(path)
    assert str(path) in str(raised.value) and said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"found": 3}'])
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "steps.json"
    path.write_text(text)
    with pytest.raises(StepsFileError, match="holds no measured steps"):
        StepsFile.load(path)


def test_reading_one_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_duet.steps_file; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
