# SPDX-License-Identifier: Apache-2.0
"""The work behind ``vllm-duet simulate``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_duet.sim import results
from vllm_duet.sim.engine import FrontEnd
from vllm_duet.sim.simulation import Options, Simulation, read_steps
from vllm_duet.sim.systems import SYSTEMS
from vllm_duet.sim.traces import at_rate, read_trace, with_prefixes

__all__ = ["SYSTEMS", "FrontEnd", "options_for", "simulate"]


def options_for(gpu: str, **given: Any) -> Options:
    """The options of a run, of which those that are None were not given.

    They are then those of the engine whose steps ``gpu`` holds, where it is such a file.

    Raises:
        SimulationError, StepsFileError: see read_steps.
    """
    engine: dict[str, Any] = {}
    if steps := read_steps(gpu):
        engine = {
            "max_num_batched_tokens": steps.max_num_batched_tokens,
            "max_num_seqs": steps.max_num_seqs,
            "max_model_len": steps.max_model_len,
            "tensor_parallel_size": steps.shape.tensor_parallel_size,
        }
    own = {key: value for key, value in given.items() if value is not None}
    return Options(gpu=gpu, **engine | own)


def simulate(
    options: Options,
    trace: Path,
    rate: float | None,
    num_requests: int | None,
    out: Path,
    prefixes: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Run a trace file and write the results to ``out``; returns the summary.

    ``prefixes``: tokens put before each prompt, and how many different such prefixes.

    Raises:
        TraceError, SimulationError, ValueError: see read_trace and Simulation.
            Nothing is written then.
    """
    requests = read_trace(trace)[:num_requests]
    if rate is not None:
        requests = at_rate(requests, rate)
    prefix_length, num_prefixes = prefixes
    if prefix_length:
        requests = with_prefixes(requests, prefix_length, num_prefixes, options.seed)
    simulation = Simulation(options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{options.scheduler}, requests", total=len(requests))
        outcome = simulation.run(requests, lambda _: progress.advance(task))
    head = results.provenance(shlex.join(["vllm-duet", *sys.argv[1:]])) | results.summary(
        options, trace.stem, requests, outcome
    )
    head |= {
        "gpu": simulation.steps.device if simulation.steps else options.gpu,
        "truth": simulation.truth,
        "measure_at_start": bool(simulation.steps) or options.measure_at_start,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_expert_parallel": options.enable_expert_parallel,
        "moe_backend": options.moe_backend,
        "kv_dtype": simulation.shape.kv_dtype,
        "concurrency": options.concurrency,
        "prefixes": {"count": num_prefixes, "tokens": prefix_length} if prefix_length else None,
        "async_scheduling": options.async_scheduling,
        "front_end": asdict(options.front_end),
        "host_costs": asdict(options.costs) | {"label": "measured here, on two CPU cores"},
        "disturbances": asdict(options.disturbances) | {"label": "assumed"},
    }
    results.write(out, head, outcome)
    return head
