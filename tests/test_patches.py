# SPDX-License-Identifier: Apache-2.0
"""The upstreamable diffs apply to the vLLM they are written against, and do what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_duet.version import installed_vllm

FOLDER = Path(__file__).parent.parent / "patches"
PATCHES = sorted(FOLDER.glob("*/*.patch"))
APPLIES_TO = {"0.32.0": {"0.32.0", "0.33.0"}}

OVERLAY = """
import sys
from importlib.util import spec_from_file_location
from pathlib import Path

class PatchedModules:
    def find_spec(name, path=None, target=None):
        file = Path(__file__).parent.joinpath(*name.split(".")).with_suffix(".py")
        return spec_from_file_location(name, file) if file.is_file() else None

sys.meta_path.insert(0, PatchedModules)
"""
"""A conftest.py that imports the modules beside it in place of the installed ones."""


def patched(patch: Path, folder: Path) -> Path:
    """Apply ``patch`` to copies of the files it changes, out of the installed vLLM."""
    found, spec = installed_vllm(), find_spec("vllm")
    assert found is not None
    assert spec is not None
    assert spec.origin is not None
    release = found[1].partition("+")[0]
    if release not in APPLIES_TO.get(patch.parent.name, {patch.parent.name}):
        pytest.skip(f"vLLM {found[1]} is installed")
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    site_packages = Path(spec.origin).parent.parent
    for name in re.findall(r"^--- a/(.+)$", patch.read_text(), re.MULTILINE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site_packages / name, folder / name)
    # Inside a repository, git would look for the files at the repository's root.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", patch], cwd=folder, env=env, check=True)
    return folder


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_applies_to_the_installed_source(patch: Path, tmp_path: Path):
    for changed in patched(patch, tmp_path).rglob("*.py"):
        compile(changed.read_text(), changed, "exec")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_own_tests_pass(patch: Path, tmp_path: Path):
    folder = patched(patch, tmp_path)
    (folder / "conftest.py").write_text(OVERLAY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    # Without the plugin, which would find a worker by itself.
    env = os.environ | {"VLLM_PLUGINS": ""}
    tested = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_there_is_something_to_apply():
    assert PATCHES


def test_an_installed_vllm_without_a_folder_is_skipped(tmp_path: Path):
    with pytest.raises(pytest.skip.Exception, match="is installed"):
        patched(FOLDER / "0.0.0" / "other.patch", tmp_path)
