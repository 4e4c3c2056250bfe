# SPDX-License-Identifier: Apache-2.0
"""`make demo`: answers stream while long prompts arrive, from real servers on this machine's CPU.

First what splitting gives: the same requests go to stock vLLM and to DuetScheduler told to
split wherever it can. Shown are an answer as it streams, the steps by mode, and whether every
token is stock vLLM's. A CPU runs the two lanes one after the other, so this shows that
splitting is exact, not that it is fast.

Then what a bound does, in numbers: vLLM's plain CPU build, stock and with DuetScheduler as it
ships, which CAPS prompts there. The same requests arrive at the same times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from cpu_load import Request, as_clients_saw, send_all
from cpu_server import CpuServer, PlainServer, VllmServer, duet_options, port_is_busy
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from smollm2 import prepare

DEFAULT_PORT = 8765
NEEDED_GIB = 6
STEPS = "vllm_duet:steps"
SYSTEMS = "stock vLLM", "vllm-duet"

QUESTION = "Explain in a few sentences why the sky is blue."
ANSWER_TOKENS = 60
CHUNKS_BEFORE_DOCUMENTS = 4

DOCUMENT = Path(__file__).parent.parent / "LICENSE"
NUM_DOCUMENTS = 3
DOCUMENT_CHARACTERS = 2500
SUMMARY_TOKENS = 6

# In bfloat16 the likeliest token can depend on who shares the batch, split or not.
OPTIONS = ["--dtype", "float32", "--max-num-seqs", "8", "--max-model-len"]
SPLIT_OPTIONS = [*OPTIONS, "2048", "--max-num-batched-tokens", "256"]
BOUND_OPTIONS = [*OPTIONS, "4096", "--enforce-eager"]

BOUND_MS = 250.0
NUM_STREAMS = 3
STREAM_TOKENS = 150
NUM_LONG_PROMPTS = 3
LONG_PROMPT_CHARACTERS = 4500
LONG_PROMPT_EVERY_S = 5.0

console = Console(highlight=False)


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The token ids of each answer of one server, and its steps by mode."""

    answers: list[list[int]]
    steps: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: steps were split, and every token was stock vLLM's; 2: cannot run here."""
    parser = argparse.ArgumentParser(description="Answers stream while long prompts arrive.")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="(default: %(default)s)")
    port = parser.parse_args(arguments).port
    # As Ctrl-C, so that the server is stopped too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        check_machine(port)
    except DemoError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    try:
        model = prepare()
        equal = split_steps(model, port)
        return 0 if keep_a_bound(model, port) and equal else 1
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130
    except (RuntimeError, httpx.HTTPError) as error:
        console.print(f"[red]{error}[/red]")
        return 1


def check_machine(port: int) -> None:
    """Raises DemoError now for what would go wrong a minute later."""
    if busy := [number for number in (port, port + 1) if port_is_busy(number)]:
        raise DemoError(f"Port {busy[0]} is busy; choose another, as in: make demo PORT={port + 2}")
    free_gib = psutil.virtual_memory().available / 2**30
    if free_gib < NEEDED_GIB:
        raise DemoError(f"The demo needs {NEEDED_GIB} GiB of memory; {free_gib:.1f} GiB are free.")


def split_steps(model: Path, port: int) -> bool:
    """Whether steps were split, and every token was stock vLLM's."""
    console.rule("1 of 2: are the tokens of split steps stock vLLM's?")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(CpuServer(model, [*SPLIT_OPTIONS, *options], port + number))
            for number, options in enumerate(([], duet_options(mode="split")))
        ]
        wait_for(*servers)
        outcomes = []
        for name, server in zip(SYSTEMS, servers, strict=True):
            console.print(f"[bold]{name}[/bold]")
            outcomes.append(asyncio.run(ask(server.url)))
    return report(*outcomes)


def keep_a_bound(model: Path, port: int) -> bool:
    """Show what clients see of both; whether their tokens were the same."""
    console.rule(f"2 of 2: what does a bound of {BOUND_MS:.0f} ms between tokens do?")
    answered = []
    table = Table("", "gap, p99", "longest gap", "time to first token", "tokens/s")
    with ExitStack() as stack:
        servers = []
        for number, options in enumerate(([], duet_options(tbt_slo_ms=BOUND_MS))):
            server = PlainServer(model, [*BOUND_OPTIONS, *options], port + number)
            # One by one: vllm-duet times some steps at its start.
            servers.append(stack.enter_context(server))
            wait_for(server)
        for name, server in zip(SYSTEMS, servers, strict=True):
            requests = streams_and_long_prompts()
            with waiting(f"{name}: {NUM_STREAMS} streams, {NUM_LONG_PROMPTS} long prompts"):
                asyncio.run(send_all(server.url, requests, temperature=0))
            answered.append([request.tokens for request in requests])
            seen = as_clients_saw(requests)
            table.add_row(
                name,
                f"{seen['p99_tbt_ms']:.0f} ms",
                f"{seen['worst_gap_ms']:.0f} ms",
                f"{seen['mean_ttft_s']:.1f} s",
                f"{seen['tokens_per_s']:.1f}",
            )
    console.print(table)
    return compare(*answered)


def streams_and_long_prompts() -> list[Request]:
    """Chats that go on while, every few seconds, a long document is to be read."""
    text = DOCUMENT.read_text()
    streams = [
        Request(0.2 * i, f"{i}. {QUESTION}", STREAM_TOKENS) for i in range(1, NUM_STREAMS + 1)
    ]
    starts = range(0, 1000 * NUM_LONG_PROMPTS, 1000)
    return streams + [
        Request(
            LONG_PROMPT_EVERY_S * (i + 0.5),
            "Summarise: " + text[start : start + LONG_PROMPT_CHARACTERS],
            SUMMARY_TOKENS,
        )
        for i, start in enumerate(starts)
    ]


def waiting(what: str) -> Progress:
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    )
    progress.add_task(what, total=None)
    return progress


def wait_for(*servers: VllmServer) -> None:
    with waiting("Starting"):
        for server in servers:
            server.wait_until_ready()


async def ask(url: str) -> Outcome:
    """Stream one answer; when it has begun, have long documents summarised beside it."""
    text = DOCUMENT.read_text()
    documents = [
        "Summarise: " + text[start : start + DOCUMENT_CHARACTERS]
        for start in range(0, NUM_DOCUMENTS * DOCUMENT_CHARACTERS, DOCUMENT_CHARACTERS)
    ]
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        answer: list[int] = []
        summaries: list[asyncio.Task[list[int]]] = []
        console.print(f"[bold]> {QUESTION}[/bold]")
        num_chunks = 0
        try:
            async for chunk in stream_chat(client, QUESTION, ANSWER_TOKENS):
                answer += chunk["token_ids"] or []
                console.print(chunk["delta"].get("content") or "", end="", markup=False)
                num_chunks += 1
                if num_chunks == CHUNKS_BEFORE_DOCUMENTS:
                    console.print(f" [dim]({NUM_DOCUMENTS} long prompts arrive)[/dim]", end="")
                    summaries = [asyncio.create_task(tokens(client, d)) for d in documents]
            console.print()
            answers = [answer, *await asyncio.gather(*summaries)]
        finally:
            for summary in summaries:  # else Ctrl-C would close the client under them
                summary.cancel()
        return Outcome(answers, steps_by_mode((await client.get("/metrics")).text))


async def tokens(client: httpx.AsyncClient, document: str) -> list[int]:
    """The token ids of a summary, begun while another answer streams."""
    chunks = stream_chat(client, document, SUMMARY_TOKENS)
    return [token async for chunk in chunks for token in chunk["token_ids"] or []]


async def stream_chat(
    client: httpx.AsyncClient, message: str, max_tokens: int
) -> AsyncIterator[dict[str, Any]]:
    """The choices of each chunk of an answer, as they arrive."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": message}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            raise DemoError(f"The server answered {response.status_code}: {response.text}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    yield {"token_ids": None} | choice


def steps_by_mode(metrics: str) -> dict[str, int]:
    """Read from the text of a server's /metrics; empty for stock vLLM."""
    return {
        sample.labels["mode"]: int(sample.value)
        for family in text_string_to_metric_families(metrics)
        if family.name == STEPS
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def report(stock: Outcome, duet: Outcome) -> bool:
    """Print what was shown; whether it is what it should be."""
    steps = ", ".join(f"{count} {mode}" for mode, count in duet.steps.items())
    console.print(f"Steps by mode: {steps or 'none reported'}")
    if not duet.steps.get("split"):
        console.print("[red]No step was split.[/]")
    return compare(stock.answers, duet.answers) and bool(duet.steps.get("split"))


def compare(stock: list[list[int]], duet: list[list[int]]) -> bool:
    """Say whether the answers are the same."""
    differing = sum(a != b for a, b in zip(stock, duet, strict=True))
    if differing:
        console.print(f"[red]{differing} of {len(duet)} answers are not stock vLLM's.[/]")
    else:
        count = sum(map(len, duet))
        console.print(f"[green]All {count} tokens of {len(duet)} answers are stock vLLM's.[/]")
    return not differing


if __name__ == "__main__":
    sys.exit(main())
