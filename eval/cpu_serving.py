# SPDX-License-Identifier: Apache-2.0
"""vLLM's plain CPU build, served over HTTP: how far forecasts are off, and what a bound does.

    python eval/cpu_serving.py MODEL forecasts  # every step of a served load, beside its forecast
    python eval/cpu_serving.py MODEL table      # stock, six static budgets and vllm-duet

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import httpx
import numpy as np
import typer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from cpu_server import VllmServer, duet_options  # noqa: E402

RESULTS = ROOT / "eval" / "results" / "cpu_serving.json"
LIMITS = ("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16")
BUDGETS = (64, 128, 256, 512, 1024, 2048)
BOUND_MS = 250.0
VOCABULARY = range(100, 40_000)


class PlainServer(VllmServer):
    python = str(ROOT / ".venv-plain/bin/python")  # of `make test`
    machine_options = LIMITS
    machine_environment: ClassVar = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")]),
    }


@dataclass(slots=True)
class Request:
    """As its client saw it; seconds since the run began."""

    arrival_s: float
    prompt: list[int]
    max_tokens: int
    token_s: list[float] = field(default_factory=list)


def load(seed: int, count: int, rate: float) -> list[Request]:
    """``count`` requests, ``rate`` a second: prompts of 16 to 2000 tokens, 350 in the middle."""
    rng, arrival_s, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        arrival_s += rng.expovariate(rate)
        length = int(min(2000, max(16, rng.lognormvariate(np.log(350), 1.0))))
        requests.append(Request(arrival_s, rng.choices(VOCABULARY, k=length), rng.randint(16, 96)))
    return requests


async def send(client: httpx.AsyncClient, request: Request, began: float) -> None:
    await asyncio.sleep(max(0.0, began + request.arrival_s - time.monotonic()))
    body = {
        "model": "model",
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                tokens = json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                request.token_s += [time.monotonic() - began] * len(tokens or ())


async def send_all(url: str, requests: Sequence[Request]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        # The first requests of a server wait for what it loads late.
        await send(client, Request(0.0, [5] * 40, 8), time.monotonic())
        began = time.monotonic()
        await asyncio.gather(*(send(client, request, began) for request in requests))


def served(model: Path, options: Sequence[str], requests: list[Request], **variables: str) -> None:
    with PlainServer(model, options, environment=variables) as server:
        server.wait_until_ready()
        asyncio.run(send_all(server.url, requests))


def as_clients_saw(requests: Sequence[Request]) -> dict[str, float]:
    gaps = np.concatenate([np.diff(request.token_s) for request in requests])
    ttft = np.array([request.token_s[0] - request.arrival_s for request in requests])
    last = max(request.token_s[-1] for request in requests)
    return {
        "p50_tbt_ms": 1e3 * float(np.median(gaps)),
        "p99_tbt_ms": 1e3 * float(np.quantile(gaps, 0.99)),
        "worst_gap_ms": 1e3 * float(gaps.max()),
        "mean_ttft_s": float(ttft.mean()),
        "p99_ttft_s": float(np.quantile(ttft, 0.99)),
        "tokens_per_s": sum(len(request.token_s) for request in requests) / last,
    }


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


def main(
    model: Annotated[Path, typer.Argument(exists=True)],
    what: Annotated[Literal["forecasts", "table"], typer.Argument()],
    seed: int = 0,
    count: int = 60,
    rate: float = 0.8,
    note: Annotated[str, typer.Option(help="What else the machine was doing.")] = "",
) -> None:
    """Serve MODEL by vLLM's plain CPU build and write down what clients see."""
    load_before = os.getloadavg()[0]
    found = {"forecasts": forecasts, "table": table}[what](model, seed, count, rate)
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
