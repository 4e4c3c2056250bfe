# SPDX-License-Identifier: Apache-2.0
"""The work behind ``vllm-duet calibrate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_duet.calibration import experiments, session
from vllm_duet.calibration.device import CalibrationError, Device, DeviceInfo
from vllm_duet.calibration.experiments import Step
from vllm_duet.calibration.facts import facts
from vllm_duet.calibration.session import Results
from vllm_duet.roofline import GpuProfile

if TYPE_CHECKING:
    from vllm_duet.calibration.fit import Fit

BUDGET_S = 150.0
"""With start-up and compilation under three minutes."""

ROWS = (1, 64, 256, 512, 2048, 8192, *experiments.HELD_OUT_ROWS)
"""Fewer than the microbenchmark's: enough for every parameter."""

PLANNED_GPU = "h100-sxm"
"""Stands in for the GPU of a dry run where there is none."""


def steps(info: DeviceInfo, profile: GpuProfile) -> list[Step]:
    """What a profile needs."""
    launch = [s for s in facts(info, profile) if s.name == "replay_against_launch"]
    return [
        *experiments.bandwidth(info, profile),
        *launch,
        *experiments.compute(info, profile, ROWS),
        *experiments.contention(info, profile),
    ]


def open_device(index: int) -> Device:
    """GPU ``index``.

    Raises:
        CalibrationError: it cannot be calibrated here, in one sentence.
    """
    try:
        import scipy.optimize  # noqa: F401  # The fit's: found missing before measuring.

        from vllm_duet.calibration.cuda import CudaDevice
        from vllm_duet.lanes.green_context import GreenContextError
    except ImportError as error:
        raise CalibrationError(f"Calibration needs torch, Triton and SciPy: {error}.") from error
    try:
        return CudaDevice(index)
    except GreenContextError as error:
        raise CalibrationError(str(error)) from error


def planned_device() -> DeviceInfo:
    """What a dry run without a GPU plans for."""
    profile = GpuProfile.load(PLANNED_GPU)
    most = profile.num_sms - profile.min_sms
    return DeviceInfo(
        name=profile.device_names[0],
        num_sms=profile.num_sms,
        min_sms=profile.min_sms,
        sm_granularity=profile.sm_granularity,
        splits=tuple(range(profile.min_sms, most + 1, profile.sm_granularity)),
        memory_bytes=int(profile.memory_bytes),
        driver="none",
        cuda="none",
        torch="none",
        triton="none",
    )


def dry_run(
    index: int,
    make_steps: Callable[[DeviceInfo, GpuProfile], list[Step]],
    budget_s: float,
    console: Console,
) -> None:
    """Print what would run, with forecasts; of an H100 where there is no GPU."""
    try:
        info = open_device(index).info
    except CalibrationError as error:
        info = planned_device()
        console.print(f"{error} The plan is that of an {info.name}.")
    profile, _ = session.base_profile(info)
    planned = make_steps(info, profile)
    rounds = session.rounds_within(planned, budget_s)
    table = Table("group", "step", "GFLOP", "GB", "about s")
    for column in table.columns[2:]:
        column.justify = "right"
    for step in planned:
        table.add_row(
            step.group,
            step.name,
            f"{step.flops / 1e9:,.0f}",
            f"{step.bytes / 1e9:,.1f}",
            f"{step.seconds(rounds):.1f}",
        )
    console.print(table)
    console.print(
        f"{len(planned)} steps, {rounds} rounds of each, about"
        f" {session.seconds(planned, rounds):.0f} s by the forecast of profile {profile.name};"
        f" stops measuring after {budget_s:.0f} s. FLOPs and bytes are of one run."
    )


def measure(
    device: Device,
    planned: Sequence[Step],
    budget_s: float,
    save: Callable[[str, Results], None],
    console: Console,
) -> None:
    """Run the steps behind a progress bar; see session.run."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        total = session.seconds(planned, 1)
        task = progress.add_task("", total=total)
        done = [0.0]

        def show(step: Step) -> None:
            progress.update(task, completed=done[0], description=f"{step.group}: {step.name}")
            done[0] += step.seconds(1)

        session.run(device, planned, budget_s, save, show)
        progress.update(task, completed=total)


def fit_groups(info: DeviceInfo, groups: dict[str, Results], name: str | None = None) -> Fit:
    """The profile of what was measured.

    Raises:
        CalibrationError: too little was, or with too many errors.
    """
    from vllm_duet.calibration.fit import fit

    base, known = session.base_profile(info)
    return fit(base, info, session.records_of(groups), known=known, name=name)


def calibrate(device: Device, out: Path | None, name: str | None, console: Console) -> Path:
    """Measure the GPU and write its profile; returns the file.

    Raises:
        CalibrationError: too little could be measured. Nothing is written then.
    """
    from vllm_duet.calibration.fit import write_profile

    base, known = session.base_profile(device.info)
    if not known:
        console.print(
            f"No profile is shipped for {device.info.name}: what is not measured is taken over"
            f" from {base.name}, and says so."
        )
    groups: dict[str, Results] = {}
    measure(device, steps(device.info, base), BUDGET_S, groups.__setitem__, console)
    try:
        fitted = fit_groups(device.info, groups, name)
    except CalibrationError as error:
        raise CalibrationError(f"{error}{first_error(groups)}") from error
    path = out or Path(f"{fitted.profile.name}.yaml")
    write_profile(path, fitted)
    print_errors(fitted, console)
    failed = sum(group["errors"] for group in groups.values())
    if failed:
        console.print(f"{failed} measurements failed and were left out.{first_error(groups)}")
    return path


def first_error(groups: dict[str, Results]) -> str:
    """The last line of the first error, as a sentence to append."""
    for group in groups.values():
        for record in group["records"]:
            if "error" in record:
                return f" The first error: {record['error'].strip().splitlines()[-1]}"
    return ""


def print_errors(fitted: Fit, console: Console) -> None:
    """How far the new profile's forecasts are off."""
    table = Table("forecast of", "mean error", "largest", "times")
    for name, error in fitted.errors.items():
        table.add_row(name, f"{error['mean']:.1%}", f"{error['max']:.1%}", f"{error['count']:.0f}")
    console.print(table)


def summary(groups: dict[str, Results]) -> Table:
    """A line a group."""
    table = Table("group", "records", "errors", "left out", "rounds", "s")
    for name, group in groups.items():
        table.add_row(
            name,
            str(len(group["records"])),
            str(group["errors"]),
            str(len(group["steps_left_out_for_time"])),
            str(group["rounds"]),
            f"{group['seconds']:.0f}",
        )
    return table
