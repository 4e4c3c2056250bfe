# SPDX-License-Identifier: Apache-2.0
"""Tests on a GPU that is not there (tests/fake_gpu). Run by the Python of a CUDA build of vLLM:

VENV/bin/python -m pytest tests/gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpu import environment
from fake_gpu.build import build

VENV = Path(sys.prefix)


@pytest.fixture(scope="session")
def fake_gpu_library() -> Path:
    """The folder of the fake GPU's libraries: FAKE_GPU's, or built into this environment."""
    if given := os.environ.get("FAKE_GPU"):
        return Path(given)
    library = VENV / "fake_gpu"
    build(VENV, library)
    return library


@pytest.fixture
def on_fake_gpu(fake_gpu_library: Path, request: pytest.FixtureRequest):
    """Calls a function of the test's module in a process of its own on the fake GPU.

    It must be importable by name. Keyword arguments are ``environment``'s.
    """

    def call(function, *arguments, **options) -> str:
        module = Path(request.path)
        code = f"import {module.stem} as m; m.{function.__name__}(*{arguments!r})"
        variables = environment(VENV, fake_gpu_library, **options)
        folders = [str(module.parent), str(module.parent.parent)]
        variables["PYTHONPATH"] = os.pathsep.join([*folders, variables.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{options}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return call
