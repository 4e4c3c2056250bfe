# SPDX-License-Identifier: Apache-2.0
"""What a GPU really does when its SMs are divided: rates, contention, facts, a duet.

    python eval/gpu/microbench.py --dry-run
    python eval/gpu/microbench.py --profile vllm_duet/profiles/h100-sxm.yaml
    python eval/gpu/microbench.py --only facts --only duet

Needs torch, Triton and cuda-bindings, not vLLM: from a checkout, PYTHONPATH=. is enough.
The file is written after each group; another run on the same GPU and driver replaces
the groups it runs, and keeps the others.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_duet.calibration import command, experiments, session
from vllm_duet.calibration.device import CalibrationError, DeviceInfo
from vllm_duet.calibration.experiments import Step
from vllm_duet.calibration.facts import facts
from vllm_duet.roofline import GpuProfile

RESULTS = Path(__file__).parent.parent / "results" / "gpu" / "microbench.json"
GROUPS = {
    "bandwidth": experiments.bandwidth,
    "compute": experiments.compute,
    "contention": experiments.contention,
    "duet": experiments.duet,
    # Last: what it tries is the likeliest to leave a GPU that no later call can use.
    "facts": facts,
}
Group = StrEnum("Group", list(GROUPS))  # type: ignore[misc]
app = typer.Typer(add_completion=False)


def steps(only: list[str]) -> Any:
    """A function that lists the steps of the groups, in the order of GROUPS."""
    order = [name for name in GROUPS if not only or name in only]

    def listed(info: DeviceInfo, profile: GpuProfile) -> list[Step]:
        return [step for name in order for step in GROUPS[name](info, profile)]

    return listed


def earlier(out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The groups of a file of the same GPU, driver and torch."""
    if not out.exists():
        return {}
    results = json.loads(out.read_text())
    same = results["provenance"]["device"] == json.loads(json.dumps(head["device"]))
    return results["groups"] if same else {}


def print_facts(groups: dict[str, Any], console: Console) -> None:
    table = Table("fact", "verdict")
    for record in groups.get("facts", {}).get("records", []):
        said = record.get("verdict") or record["error"].strip().splitlines()[-1]
        table.add_row(record.get("fact") or record["step"], said)
    if table.row_count:
        console.print(table)


def print_duet(summary: dict[str, Any], console: Console) -> None:
    table = Table("duet", "TBT ms", "weighted speedup")
    for name in ("in_turn", "mixed"):
        row = summary[name]
        table.add_row(name, f"{row['tbt_ms']:.2f}", f"{row['weighted_speedup']:.3f}")
    for row in summary["splits"]:
        table.add_row(
            f"{row['decode_sms']} SMs decode",
            f"{row['tbt_ms']:.2f}",
            f"{row['weighted_speedup']:.3f}",
        )
    console.print(table)


@app.command()
def main(
    out: Annotated[Path, typer.Option(dir_okay=False)] = RESULTS,
    only: Annotated[list[Group] | None, typer.Option(help="Repeat it for several.")] = None,
    budget_s: Annotated[float, typer.Option(min=1, help="Cuts rounds, then splits.")] = 450.0,
    profile: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the fitted profile here too.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The profile's name.")] = None,
    device: Annotated[int, typer.Option(min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
) -> None:
    """Measure, write JSON, print a short table."""
    console, listed = Console(), steps([str(group) for group in only or []])
    if dry_run:
        command.dry_run(device, listed, budget_s, console)
        return
    try:
        gpu = command.open_device(device)
    except CalibrationError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    head = session.provenance(gpu.info, session.this_command())
    results: dict[str, Any] = {"provenance": head, "groups": earlier(out, head)}

    def save(group: str, result: dict[str, Any]) -> None:
        origin = {key: head[key] for key in ("command", "git_commit", "source_sha256")}
        results["groups"][group] = origin | result
        results["duet"] = experiments.duet_summary(session.records_of(results["groups"]))
        session.write_json(out, results)

    base, _ = session.base_profile(gpu.info)
    command.measure(gpu, listed(gpu.info, base), budget_s, save, Console(stderr=True))
    try:
        fitted = command.fit_groups(gpu.info, results["groups"], name)
    except CalibrationError as error:
        console.print(f"No profile: {error}.{command.first_error(results['groups'])}")
    else:
        results["fit"] = {"errors": dict(fitted.errors), "contention": fitted.profile.contention}
        session.write_json(out, results)
        if profile is not None:
            from vllm_duet.calibration.fit import write_profile

            write_profile(profile, fitted)
            console.print(f"Wrote {profile}")
        command.print_errors(fitted, console)
    print_facts(results["groups"], console)
    if results.get("duet"):
        print_duet(results["duet"], console)
    console.print(command.summary(results["groups"]))
    console.print(f"Wrote {out}")


if __name__ == "__main__":
    app()
