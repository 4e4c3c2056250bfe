# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a chat answer streams while long prompts arrive and steps are split.

The same requests go to two real vLLM servers on this machine's CPU, one after
the other: stock, and with DuetScheduler told to split wherever it can. Shown are
the answer as it streams, the steps by mode, and whether every token is stock
vLLM's. A CPU runs the two lanes one after the other, so this shows that
splitting is exact, not that it is fast.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from cpu_server import CpuServer, duet_options, port_is_busy
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from smollm2 import prepare

DEFAULT_PORT = 8765
NEEDED_GIB = 6
STEPS = "vllm_duet:steps"

QUESTION = "Explain in a few sentences why the sky is blue."
ANSWER_TOKENS = 60
CHUNKS_BEFORE_DOCUMENTS = 4

DOCUMENT = Path(__file__).parent.parent / "LICENSE"
NUM_DOCUMENTS = 3
DOCUMENT_CHARACTERS = 2500
SUMMARY_TOKENS = 6

OPTIONS = ["--max-model-len", "2048", "--max-num-batched-tokens", "256", "--max-num-seqs", "8"]
# In bfloat16 the likeliest token can depend on who shares the batch, split or not.
OPTIONS += ["--dtype", "float32"]

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
    parser = argparse.ArgumentParser(description="A chat answer streams while steps are split.")
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
        stock = ask_server("1 of 2: stock vLLM", model, port, [])
        duet = ask_server("2 of 2: DuetScheduler", model, port, duet_options(mode="split"))
        return report(stock, duet)
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130
    except (RuntimeError, httpx.HTTPError) as error:
        console.print(f"[red]{error}[/red]")
        return 1


def check_machine(port: int) -> None:
    """Raises DemoError now for what would go wrong a minute later."""
    if port_is_busy(port):
        raise DemoError(f"Port {port} is busy; choose another, as in: make demo PORT={port + 1}")
    free_gib = psutil.virtual_memory().available / 2**30
    if free_gib < NEEDED_GIB:
        raise DemoError(f"The demo needs {NEEDED_GIB} GiB of memory; {free_gib:.1f} GiB are free.")


def ask_server(title: str, model: Path, port: int, options: list[str]) -> Outcome:
    """Start a server, send it the demo's requests, and stop it again."""
    console.rule(title)
    with CpuServer(model, [*OPTIONS, *options], port) as server:
        waiting = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        with waiting:
            task = waiting.add_task("Starting the server (about a minute)", total=1)
            server.wait_until_ready()
            waiting.update(task, completed=1)
        return asyncio.run(ask(server.url))


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


def report(stock: Outcome, duet: Outcome) -> int:
    """Print what was shown, and return the exit code."""
    console.rule("Result")
    steps = ", ".join(f"{count} {mode}" for mode, count in duet.steps.items())
    console.print(f"Steps by mode: {steps or 'none reported'}")
    differing = sum(a != b for a, b in zip(stock.answers, duet.answers, strict=True))
    if differing:
        console.print(f"[red]{differing} of {len(duet.answers)} answers are not stock vLLM's.[/]")
    elif not duet.steps.get("split"):
        console.print("[red]The tokens are stock vLLM's, but no step was split.[/]")
    else:
        count = sum(map(len, duet.answers))
        console.print(f"[green]All {count} tokens of {len(duet.answers)} answers are stock's.[/]")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
