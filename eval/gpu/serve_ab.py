# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM and DuetScheduler in turn, over HTTP, on the same arrivals.

    python eval/gpu/serve_ab.py --rates "2 4 6" --synthetic 4096/512
    python eval/gpu/serve_ab.py --rates "10 16" --trace TRACE --order stock,duet,duet,stock

Each server of ``--order`` starts in turn, with the same options, and gets the same requests
at each rate, at the times of their arrival whether or not it keeps up. Measured is what
clients see: TTFT, every gap between two tokens, tokens a second. Weights are random
(``--load-format dummy``) and prompts are token ids: neither changes what a step costs.
The JSON is written after every run; the table comes last. A run that its share of
``--budget-s`` does not suffice for is cut off, and says how many requests that hit.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import engines  # first: it finds the modules below
import httpx
import numpy as np
import typer
from cpu_server import ServerError, VllmServer, duet_options
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_duet.sim.results import FloatArray, statistics
from vllm_duet.sim.traces import TraceError, TraceRequest, at_rate, prompts, read_trace, synthetic

SYSTEMS = ("stock", "duet")
WARM_UP_REQUESTS, WARM_UP_TOKENS = 4, 8
DRAIN_S = 5.0
"""Left of a run's time for requests that are cut off to end."""

console = Console(stderr=True)


@dataclass(slots=True)
class Answer:
    """One request as its client saw it; seconds since the run began."""

    request: TraceRequest
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    outcome: str = "cut off"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every server."""

    rates: tuple[float, ...]
    order: tuple[str, ...]
    requests: dict[float, list[TraceRequest]]
    left_out: int
    options: dict[str, list[str]]
    model: Path
    vocabulary: int


def main(
    rates: Annotated[str, typer.Option(help="Requests a second, such as '2 4 6'.")],
    trace: Annotated[
        Path | None, typer.Option(exists=True, help="Azure CSV, Mooncake JSONL or plain JSONL.")
    ] = None,
    mix: Annotated[
        str, typer.Option("--synthetic", help="Mean prompt and answer, without a trace.")
    ] = "4096/512",
    requests: Annotated[int, typer.Option(min=1, help="How many, at each rate.")] = 100,
    model: Annotated[
        Path, typer.Option(exists=True, help="A folder with config.json; weights are random.")
    ] = engines.ROOT / "eval" / "models" / "qwen3-8b",
    order: Annotated[
        str, typer.Option(help="Servers in turn; more than one of each is pooled.")
    ] = "stock,duet",
    tbt_slo_ms: Annotated[
        float, typer.Option(help="The bound on the time between tokens.")
    ] = 100.0,
    duet_config: Annotated[str, typer.Option(help="More options of vllm-duet, as JSON.")] = "{}",
    server_args: Annotated[str, typer.Option(help="More options for both servers.")] = "",
    budget_s: Annotated[
        float, typer.Option(help="For all of it, servers' starts included.")
    ] = 480.0,
    seed: int = 0,
    out: Annotated[Path, typer.Option(dir_okay=False)] = engines.RESULTS / "serve_ab.json",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Compare DuetScheduler with stock vLLM, as clients see them."""
    try:
        plan = make_plan(
            tuple(map(float, rates.split())),
            tuple(order.split(",")),
            trace,
            mix,
            requests,
            model,
            {"tbt_slo_ms": tbt_slo_ms, **engines.duet_section(duet_config)},
            shlex.split(server_args),
            seed,
        )
    except (TraceError, ValueError, KeyError) as error:
        raise typer.BadParameter(str(error)) from None
    if dry_run:
        show_plan(plan)
        return
    deadline_s = time.monotonic() + budget_s
    results: dict[str, Any] = {"provenance": engines.provenance(), "runs": []}
    results["provenance"] |= {
        "options": plan.options,
        "model": str(model),
        "trace": trace.name if trace else mix,
        "tbt_slo_ms": tbt_slo_ms,
        "requests_left_out": plan.left_out,
    }
    answers: dict[tuple[str, float], list[Answer]] = {}
    failed = None
    try:
        for leg, system in enumerate(plan.order):
            runs_left = (len(plan.order) - leg) * len(plan.rates)
            serve(plan, leg, system, deadline_s, runs_left, answers, results, out, tbt_slo_ms)
    except ServerError as error:
        failed = error
    print_table(answers, results["runs"], tbt_slo_ms)
    if failed is not None:
        typer.echo(str(failed), err=True)
        raise typer.Exit(1)


def make_plan(
    rates: tuple[float, ...],
    order: tuple[str, ...],
    trace: Path | None,
    mix: str,
    count: int,
    model: Path,
    duet: dict[str, Any],
    server_args: list[str],
    seed: int,
) -> Plan:
    """
    Raises:
        ValueError: a rate, the order, or the model's config is wrong; as TraceError, the trace.
    """
    if not rates or min(rates) <= 0:
        raise ValueError("--rates needs numbers above 0")
    if unknown := set(order) - set(SYSTEMS):
        raise ValueError(f"--order takes {' and '.join(SYSTEMS)}, not {', '.join(unknown)}")
    config = json.loads((model / "config.json").read_text())
    longest, by_rate, left_out = int(config["max_position_embeddings"]), {}, 0
    for rate in rates:
        if trace is not None:
            made = at_rate(read_trace(trace)[:count], rate)
        else:
            input_length, output_length = map(int, mix.split("/"))
            made = synthetic(count, rate, input_length, output_length, seed)
        kept = [r for r in made if r.input_length + r.output_length <= longest]
        by_rate[rate], left_out = kept, len(made) - len(kept)
    common = [*engines.engine_options(), "--load-format", "dummy", "--skip-tokenizer-init"]
    common += ["--seed", str(seed), *server_args]
    options = {"stock": common, "duet": [*common, *duet_options(**duet)]}
    vocabulary = int(config["vocab_size"])
    return Plan(rates, order, by_rate, left_out, options, model, vocabulary)


def show_plan(plan: Plan) -> None:
    typer.echo(f"model {plan.model}, on {'a GPU' if engines.ON_GPU else 'this CPU'}")
    for system in dict.fromkeys(plan.order):
        typer.echo(f"{system}: {shlex.join(VllmServer(plan.model, plan.options[system]).command)}")
    for rate, requests in plan.requests.items():
        last_s = requests[-1].arrival_ms / 1e3 if requests else 0.0
        tokens = sum(r.input_length for r in requests), sum(r.output_length for r in requests)
        typer.echo(
            f"{rate:g} requests/s: {len(requests)} requests within {last_s:.0f} s,"
            f" {tokens[0]:,} prompt tokens, {tokens[1]:,} to answer"
        )
    typer.echo(f"order {','.join(plan.order)}; {plan.left_out} requests too long for the model")


def serve(
    plan: Plan,
    leg: int,
    system: str,
    deadline_s: float,
    runs_left: int,
    answers: dict[tuple[str, float], list[Answer]],
    results: dict[str, Any],
    out: Path,
    tbt_slo_ms: float,
) -> None:
    """One server, from its start to its end, and a run at each rate."""
    with (
        engines.environment() as variables,
        VllmServer(plan.model, plan.options[system], environment=variables) as server,
    ):
        console.print(f"{system}: the server starts")
        server.wait_until_ready(max(deadline_s - time.monotonic(), 1.0))
        for rate in plan.rates:
            share_s = (deadline_s - time.monotonic()) / runs_left
            runs_left -= 1
            found, counted, ratios = asyncio.run(
                run(
                    server.url,
                    plan.requests[rate],
                    plan.vocabulary,
                    share_s,
                    f"{system} {rate:g}/s",
                )
            )
            answers.setdefault((system, rate), []).extend(found)
            results["runs"].append(
                {
                    "leg": leg,
                    "system": system,
                    "rate": rate,
                    **figures([found], tbt_slo_ms),
                    **what_duet_did(counted),
                    "step_time_ratios": ratios,
                }
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


async def run(
    url: str, requests: Sequence[TraceRequest], vocabulary: int, seconds: float, title: str
) -> tuple[list[Answer], dict[str, float], dict[str, float]]:
    """All requests at their times; what is left after ``seconds`` is cut off.

    Returns the answers, what this run added to DuetScheduler's counters, and its
    ``step_time_ratios`` at the end.
    """
    answers = [Answer(request) for request in requests]
    bodies = [
        {
            "model": "model",
            "prompt": [token % vocabulary for token in prompt],
            "max_tokens": request.output_length,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        for request, prompt in zip(requests, prompts(requests), strict=True)
    ]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        end_s = time.perf_counter() + seconds - DRAIN_S
        # Other tokens: the prefix cache must not know the prompts already.
        warm_up = [
            ask(
                client,
                {**body, "prompt": body["prompt"][::-1], "max_tokens": WARM_UP_TOKENS},
                Answer(answer.request),
                0.0,
            )
            for body, answer in zip(bodies[:WARM_UP_REQUESTS], answers, strict=False)
        ]
        await until(end_s, warm_up)
        before = duet_counters(await metrics(client))
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(title, total=len(answers))
            start_s = time.perf_counter()

            async def one(body: dict[str, Any], answer: Answer) -> None:
                due_s = start_s + answer.request.arrival_ms / 1e3
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                await ask(client, body, answer, start_s)
                progress.advance(task)

            await until(
                end_s, [one(body, answer) for body, answer in zip(bodies, answers, strict=True)]
            )
        samples = await metrics(client)
    after = duet_counters(samples)
    added = {name: total - before.get(name, 0.0) for name, total in after.items()}
    return answers, added, step_time_ratios(samples)


async def until(end_s: float, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """All of ``work`` at once; what is not done at ``end_s`` is cancelled.

    That closes its connection, and the server aborts the request.
    """
    jobs = [asyncio.create_task(one) for one in work]
    if jobs:
        await asyncio.wait(jobs, timeout=max(end_s - time.perf_counter(), 0.1))
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, start_s: float
) -> None:
    """Send one request and note when each of its tokens arrives."""
    answer.sent_s = time.perf_counter() - start_s
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.outcome = f"HTTP {response.status_code}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now_s = time.perf_counter() - start_s
                    [choice] = json.loads(line.removeprefix("data: "))["choices"]
                    # Tokens that come together do so for the client, too.
                    answer.token_s += [now_s] * len(choice["token_ids"])
    except httpx.HTTPError as error:
        answer.outcome = type(error).__name__
        return
    answer.outcome = "finished" if len(answer.token_s) == body["max_tokens"] else "ended early"


async def metrics(client: httpx.AsyncClient) -> list[Sample]:
    """What the server tells on /metrics."""
    text = (await client.get("/metrics")).text
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def duet_counters(samples: Sequence[Sample]) -> dict[str, float]:
    """DuetScheduler's counters, as name or "name label"; stock has none."""
    found = {}
    for sample in samples:
        if sample.name.startswith("vllm_duet:") and sample.name.endswith("_total"):
            name = sample.name.removeprefix("vllm_duet:").removesuffix("_total")
            label = sample.labels.get("mode") or sample.labels.get("lane")
            found[f"{name} {label}" if label else name] = sample.value
    return found


def step_time_ratios(samples: Sequence[Sample]) -> dict[str, float]:
    """Measured over forecast step times, as DuetScheduler has learned them."""
    return {s.labels["kind"]: s.value for s in samples if s.name == "vllm_duet:step_time_ratio"}


def what_duet_did(counted: dict[str, float]) -> dict[str, Any]:
    """Steps by mode, how busy the lanes were while steps were split, and prefills that failed."""
    split_s = counted.get("split_seconds", 0.0)
    return {
        "steps_by_mode": labelled("steps", counted),
        "split_s": split_s,
        "lane_utilization": {
            lane: busy_s / split_s
            for lane, busy_s in labelled("lane_busy_seconds", counted).items()
            if split_s
        },
        "prefills_failed": int(counted.get("prefills_failed", 0)),
    }


def labelled(name: str, counted: dict[str, float]) -> dict[str, float]:
    """The series called ``name``, by their label."""
    prefix = f"{name} "
    return {key.removeprefix(prefix): v for key, v in counted.items() if key.startswith(prefix)}


def figures(legs: Sequence[Sequence[Answer]], tbt_slo_ms: float) -> dict[str, Any]:
    """What clients saw, of runs that each began at 0."""
    answers = [answer for leg in legs for answer in leg]
    with_tokens = [answer for answer in answers if answer.token_s]
    gaps = [np.diff(answer.token_s) * 1e3 for answer in with_tokens]
    tbt_ms = np.concatenate([*gaps, np.empty(0)])
    ttft_ms = np.array([1e3 * (a.token_s[0] - a.request.arrival_ms / 1e3) for a in with_tokens])
    end_to_end_ms = np.array(
        [
            1e3 * (a.token_s[-1] - a.request.arrival_ms / 1e3)
            for a in answers
            if a.outcome == "finished"
        ]
    )
    lasted_s = sum(max((a.token_s[-1] for a in leg if a.token_s), default=0.0) for leg in legs)
    outcomes: dict[str, int] = {}
    for answer in answers:
        outcomes[answer.outcome] = outcomes.get(answer.outcome, 0) + 1
    tokens = sum(len(a.token_s) for a in answers)
    return {
        "outcomes": outcomes,
        "output_tokens_per_s": tokens / lasted_s if lasted_s else 0.0,
        "ttft_ms": distribution(ttft_ms),
        "tbt_ms": distribution(tbt_ms),
        "e2e_ms": distribution(end_to_end_ms),
        "tbt_within_slo": float((tbt_ms <= tbt_slo_ms).mean()) if tbt_ms.size else None,
        "sent_late_ms": max(
            (1e3 * a.sent_s - a.request.arrival_ms for a in answers if a.sent_s), default=0.0
        ),
    }


def distribution(values: FloatArray) -> dict[str, float] | None:
    """The statistics of ``values``; None where there are none."""
    return statistics(values) if values.size else None


def print_table(
    answers: dict[tuple[str, float], list[Answer]], runs: Sequence[dict[str, Any]], slo_ms: float
) -> None:
    """A line for each system and rate, and under it duet over stock."""
    names = ("tokens/s", "TTFT mean", "TTFT p99", "TBT mean", "TBT p99", "TBT max")
    table = Table("rate", "system", *names, "within", "outcomes", "steps")
    table.add_column("lanes busy")
    table.add_column("over forecast")
    for rate in dict.fromkeys(rate for _, rate in answers):
        shown: dict[str, list[float]] = {}
        for system in SYSTEMS:
            if (system, rate) not in answers:
                continue
            f = figures([answers[system, rate]], slo_ms)
            legs = [r for r in runs if (r["system"], r["rate"]) == (system, rate)]
            nothing = {"mean": float("nan"), "p99": float("nan"), "max": float("nan")}
            ttft, tbt = f["ttft_ms"] or nothing, f["tbt_ms"] or nothing
            shown[system] = [
                # Of legs that ran one after the other.
                float(np.mean([leg["output_tokens_per_s"] for leg in legs])),
                *(ttft["mean"], ttft["p99"], tbt["mean"], tbt["p99"], tbt["max"]),
            ]
            steps = {
                mode: sum(leg["steps_by_mode"].get(mode, 0) for leg in legs)
                for mode in legs[0]["steps_by_mode"]
            }
            table.add_row(
                f"{rate:g}",
                system,
                *(f"{value:,.1f}" for value in shown[system]),
                "-" if f["tbt_within_slo"] is None else f"{f['tbt_within_slo']:.2%}",
                ", ".join(f"{count} {name}" for name, count in f["outcomes"].items()),
                " ".join(f"{mode}:{count:.0f}" for mode, count in steps.items() if count),
                "; ".join(
                    " ".join(f"{lane} {share:.0%}" for lane, share in busy.items())
                    for leg in legs
                    if (busy := leg["lane_utilization"])
                ),
                " ".join(f"{k} {r:.2f}" for k, r in legs[-1]["step_time_ratios"].items()),
            )
        if len(shown) == 2:
            ratios = np.array(shown["duet"]) / np.array(shown["stock"])
            table.add_row("", "duet/stock", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=190).print(table)


if __name__ == "__main__":
    typer.run(main)
