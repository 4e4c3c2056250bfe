# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder share: where they run, and on what."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "examples"), str(ROOT / "eval")]

from cpu_server import CPU_OPTIONS, ENVIRONMENT, provide_plugin  # noqa: E402

from vllm_duet.doctor import Machine  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "gpu"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""A model is a folder here, and a GPU machine may reach nothing else."""
ON_GPU = bool(Machine.inspect().gpus)


@contextmanager
def environment(**extra: str) -> Iterator[dict[str, str]]:
    """Variables for processes that run vLLM here.

    Without a GPU, those that bring Model Runner V2 to the CPU. In a checkout that is not
    installed, vLLM would not find vllm-duet's entry point: a folder on PYTHONPATH has it.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT)]
        if not any(e.name == "duet" for e in entry_points(group="vllm.general_plugins")):
            provide_plugin(Path(folder), "duet", "vllm_duet.plugin:register")
            paths.append(folder)
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        cpu = {} if ON_GPU else ENVIRONMENT
        yield {"PYTHONPATH": os.pathsep.join(paths), **OFFLINE, **cpu, **extra}


def duet_section(more: str) -> dict[str, Any]:
    """Options of vllm-duet, of which ``more`` is JSON: with the lanes of a GPU switched on.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    options = json.loads(more)
    if not isinstance(options, dict):
        raise ValueError(f"--duet-config takes a JSON object, not {more}")
    return {"cuda_lanes": True, **options}


def engine_options() -> tuple[str, ...]:
    """What a vLLM server has to be told on this machine."""
    return () if ON_GPU else CPU_OPTIONS


def provenance() -> dict[str, Any]:
    """Where and how a file of measurements came to be."""
    machine = Machine.inspect()
    return {
        "label": "measured",
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "cpu_cores": os.cpu_count(),
        "versions": machine.versions,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the checkout, with "-dirty" where tracked files differ; None outside."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
