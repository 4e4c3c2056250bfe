# SPDX-License-Identifier: Apache-2.0
"""Runs steps within a budget of time, and keeps what they found as it goes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_duet.calibration.device import Device, DeviceInfo
from vllm_duet.calibration.experiments import Record, Step
from vllm_duet.roofline import GpuProfile
from vllm_duet.version import __version__

ROUNDS = (9, 7, 5, 3)
"""How often a launch is timed: what the budget allows, never below the last."""

Results = dict[str, Any]
"""As the JSON holds it: provenance, groups by name, each with its records."""


def rounds_within(steps: Sequence[Step], budget_s: float) -> int:
    """The most rounds whose forecast stays within the budget; the fewest, if none does."""
    for rounds in ROUNDS:
        if seconds(steps, rounds) <= budget_s:
            return rounds
    return ROUNDS[-1]


def seconds(steps: Iterable[Step], rounds: int) -> float:
    """How long the steps take, by the forecast."""
    return sum(step.seconds(rounds) for step in steps)


def run(
    device: Device,
    steps: Sequence[Step],
    budget_s: float,
    save: Callable[[str, Results], None],
    progress: Callable[[Step], None] = lambda step: None,
) -> None:
    """Run the steps, group by group; ``save`` each group when it ends.

    A group whose share of the budget is used up leaves its other steps out, and says
    so; the first always runs. A step that fails is kept as its error. ``progress`` hears
    of each step before it runs.
    """
    rounds = rounds_within(steps, budget_s)
    expected_s = max(seconds(steps, rounds), 1e-9)
    begin_s, planned_s = device.now_s(), 0.0
    for name, members in groupby(steps, key=lambda step: step.group):
        group = list(members)
        planned_s += seconds(group, rounds)
        deadline_s = begin_s + budget_s * planned_s / expected_s
        started_s = device.now_s()
        records: list[Record] = []
        left_out: list[str] = []
        for step in group:
            progress(step)
            if step is not group[0] and device.now_s() >= deadline_s:
                left_out.append(step.name)
                continue
            try:
                records += step.run(device, rounds)
            except Exception:
                records.append(
                    {"group": name, "step": step.name, "error": traceback.format_exc(limit=8)}
                )
        result = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "rounds": rounds,
            "seconds": device.now_s() - started_s,
            "steps_left_out_for_time": left_out,
            "errors": sum(map(_has_error, records)),
            "records": records,
        }
        save(name, result)


def _has_error(record: Any) -> bool:
    """Whether a record, or one inside it, is an error."""
    if isinstance(record, Mapping):
        return "error" in record or any(map(_has_error, record.values()))
    return isinstance(record, list) and any(map(_has_error, record))


def provenance(info: DeviceInfo, command: Sequence[str]) -> Results:
    """Where and how a file of measurements came to be."""
    return {
        "label": "measured",
        "command": shlex.join(command),
        "date": time.strftime("%Y-%m-%d"),
        "device": asdict(info),
        "versions": {
            "python": platform.python_version(),
            "vllm-duet": __version__,
            "cuda-bindings": _version("cuda-bindings"),
        },
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "CUBLAS_"))},
        "git_commit": git_commit(),
        "source_sha256": source_sha256(),
    }


def source_sha256() -> str:
    """Of the package's Python files: names the code where it runs outside a checkout."""
    digest, folder = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, results: Results) -> None:
    """A record a line; in one move, so that an interrupt leaves the file before or after."""
    groups = {name: group | {"records": f"@{name}"} for name, group in results["groups"].items()}
    text = json.dumps(results | {"groups": groups}, indent=1)
    for name, group in results["groups"].items():
        lines = ",\n".join(json.dumps(_short(record)) for record in group["records"])
        text = text.replace(f'"@{name}"', f"[\n{lines}\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def _short(value: Any) -> Any:
    """With numbers of six digits; a GPU is not measured to more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value


def records_of(groups: Mapping[str, Results]) -> list[Record]:
    """All records that are not errors."""
    return [r for group in groups.values() for r in group["records"] if "error" not in r]


def base_profile(info: DeviceInfo) -> tuple[GpuProfile, bool]:
    """The shipped profile of the GPU; or, and False, the one of the nearest SM count."""
    known = GpuProfile.detect(info.name)
    if known is not None and known.num_sms == info.num_sms:
        return known, True
    shipped = (GpuProfile.load(name) for name in GpuProfile.names())
    return min(shipped, key=lambda p: abs(p.num_sms - info.num_sms)), False


def this_command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout, with "-dirty" where tracked files differ; None outside."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
