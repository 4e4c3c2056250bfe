# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-duet``. Each command's work is in a module of its own."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_duet.anchors import mean_error
from vllm_duet.doctor import Diagnosis, Machine
from vllm_duet.roofline.hardware import MEASURED
from vllm_duet.steps_file import StepsFile
from vllm_duet.support import LIMITS
from vllm_duet.version import __version__


class MoeBackend(Enum):
    """Kernels of mxfp4 experts, by vLLM's names; auto is what vLLM takes on the GPU."""

    AUTO = "auto"
    MARLIN = "marlin"
    MXFP8 = "flashinfer_trtllm_afp8"


class Truth(Enum):
    """Where the simulated GPU's times come from."""

    MEASURED = "measured"
    ROOFLINE = "roofline"


NOT_GIVEN = "not given: that of the engine that was calibrated, else"

app = typer.Typer(no_args_is_help=True, add_completion=False)


def main() -> None:
    """The entry point of ``vllm-duet`` and of ``python -m vllm_duet``."""
    app(prog_name="vllm-duet")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def vllm_duet(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Prefill and decode side by side on one GPU, as a vLLM plugin."""


@app.command()
def doctor(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="The model's config.json, or the folder that holds it."),
    ] = None,
    gpu_profile: Annotated[
        str | None, typer.Option(help="A GPU profile's name or YAML file, instead of this GPU's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say which modes are possible on this machine, for this model, and why not.

    Exit code: 0 when steps can be split, 1 when they cannot (vLLM then serves as
    without vllm-duet, or with capped prefills), 2 when the command is wrong.
    """
    try:
        diagnosis = Diagnosis.of(Machine.inspect(), model, gpu_profile)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    if as_json:
        typer.echo(json.dumps(_as_json(diagnosis), indent=2))
    else:
        _print(diagnosis, Console())
    raise typer.Exit(0 if diagnosis.can_split else 1)


def _as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    shape, profile = diagnosis.shape, diagnosis.profile
    return {
        "can_split": diagnosis.can_split,
        "modes": {str(mode): found for mode, found in diagnosis.obstacles.items()},
        "split_needs": {limit.feature: limit.sentence for limit in LIMITS},
        "versions": diagnosis.machine.versions,
        "gpus": [
            {
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "compute_capability": gpu.compute_capability,
                "num_sms": gpu.num_sms,
            }
            for gpu in diagnosis.machine.gpus
        ],
        "gpu_profile": {"name": profile.name, "measured": profile.measured} if profile else None,
        "model": {
            "architecture": shape.architecture,
            "num_layers": shape.num_layers,
            "weight_bytes": shape.weight_bytes,
            "kv_bytes_per_token": shape.kv_bytes_per_token,
            "kv_cache_tokens": diagnosis.kv_cache_tokens,
        }
        if shape
        else None,
    }


def _print(diagnosis: Diagnosis, console: Console) -> None:
    machine, shape, profile = diagnosis.machine, diagnosis.shape, diagnosis.profile
    facts = Table(box=None, show_header=False, padding=(0, 2))
    facts.add_column(style="bold")
    for name, version in machine.versions.items():
        facts.add_row(name, version or "[dim]none[/dim]")
    for gpu in machine.gpus:
        major, minor = gpu.compute_capability
        sms = f", {gpu.num_sms} SMs" if gpu.num_sms else ""
        facts.add_row(
            "GPU",
            f"{escape(gpu.name)}, {gpu.memory_bytes / 2**30:.0f} GiB{sms},"
            f" compute capability {major}.{minor}",
        )
    if profile:
        origin = MEASURED[profile.measured]
        facts.add_row("GPU profile", f"{profile.name}, {profile.num_sms} SMs, {origin}")
    if shape:
        facts.add_row(
            "Model",
            f"{shape.architecture}, {shape.num_layers} layers,"
            f" {shape.weight_bytes / 1e9:.1f} GB of weights,"
            f" {shape.kv_bytes_per_token / 1e3:.0f} kB of KV cache a token",
        )
        if (tokens := diagnosis.kv_cache_tokens) is not None:
            room = f"yes, with KV cache for about {tokens:,} tokens" if tokens > 0 else "no"
            facts.add_row("Fits the GPU", room)
    console.print(facts)

    modes = Table(title="\nWhat a step can be", title_justify="left", title_style="bold")
    modes.add_column("Mode")
    modes.add_column("Possible")
    modes.add_column("Why not", overflow="fold")
    for mode, obstacles in diagnosis.obstacles.items():
        possible = "[red]no[/red]" if obstacles else "[green]yes[/green]"
        modes.add_row(mode.upper(), possible, escape("\n".join(obstacles)))
    console.print(modes)
    console.print("\n[bold]What else keeps an engine from splitting[/bold]")
    limits = Table.grid(padding=(0, 2))
    for limit in LIMITS:
        limits.add_row(limit.feature, f"[dim]{escape(limit.sentence)}[/dim]")
    console.print(limits)
    if shape is None and diagnosis.shape_problem is None:
        console.print("\nGive a model with --model to check its architecture too.")


@app.command()
def simulate(
    trace: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Azure CSV, Mooncake or plain JSONL.")
    ],
    model: Annotated[
        Path,
        typer.Option(exists=True, help="The model's config.json, or the folder that holds it."),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")],
    gpu: Annotated[
        str, typer.Option(help="A GPU profile's name or YAML file, or what calibrate wrote.")
    ] = "h100-sxm",
    scheduler: Annotated[
        str, typer.Option(help="stock, duet, or another that --list-schedulers shows.")
    ] = "duet",
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Requests a second; not given: the trace's own arrivals."),
    ] = None,
    tbt_slo_ms: Annotated[
        float, typer.Option(min=1e-3, help="The bound on the time between tokens.")
    ] = 100.0,
    ttft_slo_ms: Annotated[
        float, typer.Option(min=1e-3, help="The limit on TTFT of a good request.")
    ] = 2000.0,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"vLLM's token budget; {NOT_GIVEN} 8192.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help=f"vLLM's batch size; {NOT_GIVEN} 1024.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help=f"Longest request; {NOT_GIVEN} the model's.")
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="Only the first requests of the trace.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the forecast's error.")] = 0,
    model_error: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="How wrong the policy's profile is, on top of its own; 0.1 is 10 %."
        ),
    ] = 0.0,
    measure_at_start: Annotated[
        bool,
        typer.Option(
            "--measure-at-start/--no-measure-at-start",
            help="The policy forecasts by steps that it has run on the simulated GPU before, as an"
            " engine does; by those of a file of calibrate always.",
        ),
    ] = False,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"GPUs that share the model; one scheduler serves them; {NOT_GIVEN} 1."
        ),
    ] = None,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option(
            "--enable-expert-parallel", help="GPUs hold whole experts, not a part of each."
        ),
    ] = False,
    moe_backend: Annotated[
        MoeBackend, typer.Option(help="Which kernel multiplies mxfp4 experts, as in vLLM.")
    ] = MoeBackend.AUTO,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto, bfloat16, or fp8, as in vLLM.")
    ] = "auto",
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A closed loop of as many clients, as vllm bench serve --max-concurrency;"
            " the trace's arrivals do not count then.",
        ),
    ] = None,
    prefix_length: Annotated[
        int, typer.Option(min=0, help="Tokens put before each prompt, the same for many.")
    ] = 0,
    num_prefixes: Annotated[
        int, typer.Option(min=1, help="How many different prefixes; one is drawn for each.")
    ] = 1,
    frontend_ms: Annotated[
        float, typer.Option(min=0, help="The API server's work for each request: HTTP, template.")
    ] = 0.0,
    tokenizer_us: Annotated[
        float, typer.Option(min=0, help="The API server's work for each token of a prompt.")
    ] = 0.0,
    async_scheduling: Annotated[
        bool,
        typer.Option(
            "--async-scheduling/--no-async-scheduling",
            help="Without: stock as it was before vLLM 0.14.",
        ),
    ] = True,
    truth: Annotated[
        Truth,
        typer.Option(help="Times of the GPU: measured operators where there are any, or not."),
    ] = Truth.MEASURED,
    list_schedulers: Annotated[
        bool,
        typer.Option(
            "--list-schedulers",
            callback=lambda wanted: _list_schedulers() if wanted else None,
            is_eager=True,
            help="Show what can be simulated.",
        ),
    ] = False,
) -> None:
    """Serve a trace in virtual time: the real schedulers, on a simulated GPU."""
    command = _simulator()
    prefixes = prefix_length, num_prefixes
    try:
        options = command.options_for(
            gpu,
            model=model,
            scheduler=scheduler,
            tbt_slo_ms=tbt_slo_ms,
            ttft_slo_ms=ttft_slo_ms,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            seed=seed,
            model_error=model_error,
            measure_at_start=measure_at_start,
            tensor_parallel_size=tensor_parallel_size,
            enable_expert_parallel=enable_expert_parallel,
            moe_backend=None if moe_backend is MoeBackend.AUTO else moe_backend.value,
            kv_dtype=kv_cache_dtype,
            concurrency=concurrency,
            async_scheduling=async_scheduling,
            truth=truth.value,
            front_end=command.FrontEnd(frontend_ms, tokenizer_us),
        )
        summary = command.simulate(options, trace, rate, num_requests, out, prefixes)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    _print_summary(summary, out)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `simulate` wrote.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The page.")] = Path("report.html"),
) -> None:
    """Compare simulated runs on one HTML page."""
    from vllm_duet.report import ReportError, write_report

    try:
        write_report(folders, out)
    except (OSError, ReportError) as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"Wrote {out}")


@app.command(context_settings={"ignore_unknown_options": True})
def calibrate(
    model: Annotated[str, typer.Argument(help="The model, as vllm serve takes it.")],
    engine_options: Annotated[
        list[str] | None,
        typer.Argument(help="vLLM's engine options, as vllm serve takes them.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The file; not given: steps-MODEL.json.")
    ] = None,
) -> None:
    """Measure the steps of a model on this machine, as an engine does at its start.

    `simulate --gpu FILE` then has this machine's own times. Other work on the machine
    spoils the measurement.
    """
    try:
        from vllm_duet import calibrate as command
    except ImportError as error:
        raise _without_vllm("calibrate starts an engine", error) from None
    try:
        found = command.calibrate(model, engine_options or [])
        path = out or command.default_path(model)
        found.save(path)
    except (OSError, command.CalibrationError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    _print_steps(found, Console())
    typer.echo(f"Wrote {path}")


def _print_steps(found: StepsFile, console: Console) -> None:
    table = Table(
        title=f"Measured on {escape(found.device)}", title_justify="left", title_style="bold"
    )
    for column in ("decodes", "prompt tokens", "after", "ms"):
        table.add_column(column, justify="right")
    for step, ms in found.found.anchors:
        after = step.decode_context or step.prefill_context
        table.add_row(str(step.decodes or ""), str(step.prefill or ""), str(after), f"{ms:.2f}")
    console.print(table)
    measured = found.found
    if measured.checks:
        console.print(
            f"Forecasts of {len(measured.checks)} mixed steps that are none of these are off by"
            f" {mean_error(found.roofline(), measured.checks):.0%}."
        )
    if measured.gains:
        gains = (f"{gain:.2f} ({sms} SMs)" for sms, gain in measured.gains.items())
        console.print(
            f"Side by side the lanes do {', '.join(gains)} of what the GPU does one after the"
            " other."
        )
    if measured.obstacle:
        console.print(f"No step is split: {escape(measured.obstacle)}.")


def _simulator() -> Any:
    """The module behind `simulate`. vLLM takes seconds to import, and only it needs vLLM."""
    try:
        from vllm_duet.sim import command
    except ImportError as error:
        raise _without_vllm("the simulator runs vLLM's schedulers", error) from None
    return command


def _without_vllm(why: str, error: ImportError) -> typer.BadParameter:
    return typer.BadParameter(f"{why}, and vLLM cannot be imported ({error})")


def _list_schedulers() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, system in _simulator().SYSTEMS.items():
        table.add_row(f"[bold]{name}[/bold]", system.summary)
    Console().print(table)
    raise typer.Exit


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    console, steps = Console(), summary["steps"]
    table = Table(title="Simulated", title_justify="left", title_style="bold")
    for column in ("", "mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    for key, name in (("ttft_ms", "TTFT ms"), ("tbt_ms", "TBT ms"), ("e2e_ms", "end to end ms")):
        row = summary[key]
        table.add_row(name, *(f"{row[k]:,.1f}" for k in ("mean", "p50", "p90", "p99", "max")))
    console.print(table)
    load = f"at {summary['rate']:.2f} a second"
    if summary["concurrency"]:
        load = f"from {summary['concurrency']} clients"
    console.print(
        f"{summary['finished_requests']} requests {load}"
        f" ({summary['rejected_requests']} longer than the model takes),"
        f" {summary['output_throughput']:,.0f} tokens a second out,"
        f" {summary['tbt_within_slo']:.2%} of gaps within {summary['tbt_slo_ms']:g} ms,"
        f" {summary['preemptions']} preemptions"
    )
    console.print(
        f"{summary['good_requests_share']:.2%} of requests good: TTFT within"
        f" {summary['ttft_slo_ms']:g} ms, their own p99 gap within {summary['tbt_slo_ms']:g} ms and"
        f" none beyond three times that; vllm bench's --goodput by mean TPOT:"
        f" {summary['request_goodput']:.2f} requests/s"
    )
    console.print(f"The GPU's times: {summary['truth']}", soft_wrap=True)
    console.print("Steps: " + ", ".join(f"{n} {mode}" for mode, n in steps.items()))
    console.print(f"Wrote {out}")
