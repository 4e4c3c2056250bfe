# SPDX-License-Identifier: Apache-2.0
"""vLLM's plain CPU build, served over HTTP: how far forecasts are off, what a bound does,
and how long a start takes.

    python eval/cpu_serving.py MODEL forecasts  # every step of a served load, beside its forecast
    python eval/cpu_serving.py MODEL table      # stock, six static budgets and vllm-duet
    python eval/cpu_serving.py MODEL start      # what measuring steps adds to a start

Every server gets the same requests at the same times. The results are in
eval/results/cpu_serving.json, under the command's name.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import typer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from cpu_load import Request, as_clients_saw, send_all  # noqa: E402
from cpu_server import PlainServer, duet_options  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "cpu_serving.json"
LIMITS = ("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16")
BUDGETS = (64, 128, 256, 512, 1024, 2048)
BOUND_MS = 250.0
STARTS = 2
VOCABULARY = range(100, 40_000)


class Server(PlainServer):
    machine_options = LIMITS
    machine_environment: ClassVar = PlainServer.machine_environment | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")]),
    }


def load(seed: int, count: int, rate: float) -> list[Request]:
    """``count`` requests, ``rate`` a second: prompts of 16 to 2000 tokens, 350 in the middle."""
    rng, arrival_s, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        arrival_s += rng.expovariate(rate)
        length = int(min(2000, max(16, rng.lognormvariate(np.log(350), 1.0))))
        requests.append(Request(arrival_s, rng.choices(VOCABULARY, k=length), rng.randint(16, 96)))
    return requests


def served(model: Path, options: Sequence[str], requests: list[Request], **variables: str) -> None:
    with Server(model, options, environment=variables) as server:
        server.wait_until_ready()
        asyncio.run(send_all(server.url, requests))


def forecasts(model: Path, seed: int, count: int, rate: float) -> dict[str, Any]:
    """How far the forecasts of a served load's steps are off."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        options = duet_options(tbt_slo_ms=BOUND_MS, measure_at_start="always")
        options[1] = "watched_scheduler.WatchedScheduler"
        served(model, options, load(seed, count, rate), FORECASTS=str(path))
        steps = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, Any] = {}
    for kind, prompts in (("all", None), ("decodes alone", False), ("with prompts", True)):
        errors = np.array(
            [
                step["forecast_ms"] / step["ms"] - 1
                for step in steps
                if prompts in (None, step["prompt_tokens"] > 0)
            ]
        )
        found[kind] = {
            "steps": len(errors),
            "mean_abs_error": float(np.abs(errors).mean()),
            "median_abs_error": float(np.median(np.abs(errors))),
            "median_error": float(np.median(errors)),
        }
    return found


def table(model: Path, seed: int, count: int, rate: float) -> dict[str, Any]:
    """The same requests by every system in turn."""
    systems: dict[str, list[str]] = {"stock": []}
    for budget in BUDGETS:
        systems[f"stock, budget {budget}"] = ["--max-num-batched-tokens", str(budget)]
    systems["vllm-duet"] = duet_options(tbt_slo_ms=BOUND_MS)
    found: dict[str, Any] = {"bound_ms": BOUND_MS}
    for name, options in systems.items():
        requests = load(seed, count, rate)
        served(model, options, requests)
        found[name] = as_clients_saw(requests)
        print(name, json.dumps(found[name]))
    return found


def start(model: Path, seed: int, count: int, rate: float) -> dict[str, Any]:
    """Seconds until a server is ready, in turns; the load does not matter."""
    with tempfile.TemporaryDirectory() as folder:
        systems = {
            "stock": [],
            "nothing measured": duet_options(measure_at_start="never"),
            "measured": duet_options(measure_at_start="always"),
            "measured before": duet_options(measure_at_start="auto"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(1 + STARTS):
            for name, options in systems.items():
                began = time.perf_counter()
                with Server(model, options, environment={"VLLM_CACHE_ROOT": folder}) as server:
                    server.wait_until_ready()
                    taken = time.perf_counter() - began
                if turn:  # the first makes what is kept on disk
                    seconds[name].append(round(taken, 1))
    return {"seconds": seconds, "medians": {n: median(s) for n, s in seconds.items()}}


def main(
    model: Annotated[Path, typer.Argument(exists=True)],
    what: Annotated[Literal["forecasts", "table", "start"], typer.Argument()],
    seed: int = 0,
    count: int = 60,
    rate: float = 0.8,
    note: Annotated[str, typer.Option(help="What else the machine was doing.")] = "",
) -> None:
    """Serve MODEL by vLLM's plain CPU build and write down what clients see."""
    load_before = os.getloadavg()[0]
    found = {"forecasts": forecasts, "table": table, "start": start}[what](model, seed, count, rate)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[what] = {
        "command": f"python eval/cpu_serving.py MODEL {what} --seed {seed} --count {count}"
        f" --rate {rate}",
        "measured": time.strftime("%Y-%m-%d"),
        "model": model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before_and_after": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "note": note,
        **found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[what], indent=1))


if __name__ == "__main__":
    typer.run(main)
