# SPDX-License-Identifier: Apache-2.0
"""What a simulation costs, by number of requests, and how much of it is vLLM's scheduler.

python eval/bench_simulator.py --traces FOLDER --out eval/results/simulator.json
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_duet.sim.results import provenance
from vllm_duet.sim.simulation import Options, Simulation
from vllm_duet.sim.traces import at_rate, read_trace

MODEL = Path(__file__).parent / "models" / "qwen3-8b"
COUNTS = (250, 500, 1000, 2000)
RATES = {"azure-conv-2023.csv": 16.0, "mooncake-conversation.jsonl": 1.2}


class Timed:
    """Counts the seconds inside methods of a scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.seconds = 0.0
        for name in ("schedule", "update_from_output", "add_request"):
            setattr(scheduler, name, self._timed(getattr(scheduler, name)))

    def _timed(self, method: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = method(*args)
            self.seconds += time.perf_counter() - start
            return result

        return call


def main(
    traces: Annotated[Path, typer.Option(exists=True, file_okay=False)],
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    cells = [(f, s, n) for f in RATES for s in ("stock", "duet") for n in COUNTS]
    rows: list[dict[str, Any]] = []
    for file, scheduler, count in track(cells, console=Console(stderr=True)):
        requests = at_rate(read_trace(traces / file)[:count], RATES[file])
        engine = Simulation(Options(MODEL, scheduler=scheduler)).engine()
        timed = Timed(engine.scheduler)
        start = time.perf_counter()
        engine.run([r for r in requests if r.input_length + r.output_length <= 40_960])
        seconds = time.perf_counter() - start
        rows.append(
            {
                "trace": Path(file).stem,
                "scheduler": scheduler,
                "requests": count,
                "seconds": seconds,
                "scheduler_share": timed.seconds / seconds,
            }
        )
    table = Table("trace", "scheduler", "requests", "seconds", "ms/request", "in the scheduler")
    for row in rows:
        table.add_row(
            row["trace"],
            row["scheduler"],
            str(row["requests"]),
            f"{row['seconds']:.1f}",
            f"{1e3 * row['seconds'] / row['requests']:.1f}",
            f"{row['scheduler_share']:.0%}",
        )
    Console().print(table)
    if out:
        # Where the traces are is nobody's business but this machine's.
        arguments = [Path(a).name if a == str(traces) else a for a in sys.argv[1:]]
        head = provenance(shlex.join(["python", "eval/bench_simulator.py", *arguments]))
        head |= {
            "label": "measured",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        }
        out.write_text(json.dumps({"provenance": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
