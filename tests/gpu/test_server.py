# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` itself on the fake GPU, with its defaults, and real clients."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cpu_server import VllmServer, duet_options
from gpu.process import environment
from prometheus_client.parser import text_string_to_metric_families
from streaming import Request, answer, connect, make_request, stream
from tiny_model import make_tiny_config

NUM_CLIENTS = 32
NUM_LEAVING = 16
STOP_TIMEOUT_S = 120
KERNEL_US = 50
"""So that a prefill is in flight for some milliseconds, and clients can leave meanwhile."""


class GpuServer(VllmServer):
    machine_options = (
        *("--load-format", "dummy", "--skip-tokenizer-init"),
        *("--worker-extension-cls", "gpu.watched_worker.WatchedWorker"),
    )

    def program(self) -> list[str]:
        return [str(Path(sys.executable).with_name("vllm")), "serve"]

    def environment(self) -> dict[str, str]:
        fake_gpu = environment(kernel_us=KERNEL_US)
        return fake_gpu | {"VLLM_SERVER_DEV_MODE": "1"} | self._environment

    def ask_worker(self, method: str) -> Any:
        answer = httpx.post(f"{self.url}/collective_rpc", json={"method": method}, timeout=60)
        (result,) = answer.raise_for_status().json()["results"]
        return result

    def metrics(self) -> dict[str, float]:
        """vllm-duet's series, and vLLM's of requests that run and wait."""
        found = {}
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        for sample in (sample for family in families for sample in family.samples):
            if sample.name.startswith(("vllm_duet:", "vllm:num_requests_")):
                kind = [v for k, v in sample.labels.items() if k in ("mode", "lane", "reason")]
                found[" ".join([sample.name, *kind])] = sample.value
        return found

    def in_flight(self) -> int:
        """Prefills that have been launched and have not joined."""
        metrics = self.metrics()
        launched = metrics["vllm_duet:prefills_launched_total"]
        return int(launched - metrics["vllm_duet:prefills_joined_total"])

    def fault(self, line: str) -> None:
        """Arm a fault of the fake GPU, or disarm one: ``line`` is one of src/faults.c."""
        Path(self._environment["FAKECUDA_FAULTS"]).write_text(f"{line}\n")

    def processes(self) -> list[psutil.Process]:
        """Those that run in its session, which it leads."""
        found = []
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                ended = process.status() == psutil.STATUS_ZOMBIE
                if os.getsid(process.pid) == self._process.pid and not ended:
                    found.append(process)
        return found

    def interrupt(self) -> int:
        """Ctrl-C in its terminal; returns the exit code."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self._process.wait(STOP_TIMEOUT_S)


@dataclass(frozen=True)
class Case:
    """``says``: why steps cannot be split; empty where they can. ``splits``: some must be."""

    options: list[str]
    says: str = ""
    splits: bool = False
    variables: dict[str, str] = field(default_factory=dict)


FEW = ["--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
"""Fewer at once than there are clients."""
FORCED = duet_options(mode="split", cuda_lanes=True, decode_sms=[16, 64])
PREFILL_SMS = 132 - 16
"""Of the lane that is used then."""
CASES = {
    "split": Case([*FEW, *FORCED, "--enable-log-requests"], splits=True),
    "auto": Case(duet_options(cuda_lanes=True)),
    "V1": Case(
        [*FEW, *FORCED], "Model Runner V2 is off", variables={"VLLM_USE_V2_MODEL_RUNNER": "0"}
    ),
    "defaults": Case(duet_options(), "the CUDA lanes are not proved at start"),
}


@dataclass(frozen=True)
class Client:
    """``stays_s``: when it leaves, counted from when all are connected; ``None`` if it stays."""

    request: Request
    stays_s: float | None

    async def num_tokens(self, http: httpx.AsyncClient) -> int:
        """How many tokens it was streamed until it left or the stream ended."""
        count = 0
        try:
            async with asyncio.timeout(self.stays_s):
                async for tokens in stream(http, self.request):
                    count += len(tokens)
        except TimeoutError:
            pass
        return count


def make_clients(seed: int) -> list[Client]:
    rng = random.Random(seed)

    def client(stays_s: float | None = None) -> Client:
        lengths = rng.choice([5, 60, 400, 1500]), rng.choice([1, 8, 40, 120])
        return Client(make_request(rng, *lengths), stays_s)

    staying = [client() for _ in range(NUM_CLIENTS)]
    return staying + [client(rng.uniform(0, 2)) for _ in range(NUM_LEAVING)]


async def visit(url: str, clients: list[Client]) -> list[int]:
    async with connect(url) as http:
        return await asyncio.gather(*(client.num_tokens(http) for client in clients))


@pytest.mark.parametrize("names", [("split", "V1"), ("auto", "defaults")], ids="+".join)
def test_clients_come_and_leave_and_ctrl_c_ends_it(names, tmp_path):
    model = make_tiny_config(tmp_path / "model")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                GpuServer(
                    model,
                    CASES[name].options,
                    environment=CASES[name].variables
                    | {"FAKECUDA_FAULTS": str(tmp_path / f"faults-{name}")},
                )
            )
            for name in names
        ]
        for name, server in zip(names, servers, strict=True):
            server.wait_until_ready()
            check(CASES[name], server)


async def leave_in_flight(server: GpuServer) -> None:
    """A client leaves while its prefill is in flight, for certain: nothing runs on that lane.

    Meanwhile another one goes on receiving tokens.
    """
    rng = random.Random(1)
    received: list[int] = []

    async def stay(http: httpx.AsyncClient) -> None:
        async for tokens in stream(http, make_request(rng, 5, 2000)):
            received.extend(tokens)

    async with connect(server.url) as http, asyncio.TaskGroup() as clients:
        staying = clients.create_task(stay(http))
        await until(lambda: received)
        server.fault(f"hold {PREFILL_SMS}")
        leaving = clients.create_task(answer(http, make_request(rng, 400, 8)))
        await until(lambda: server.in_flight() == 1)
        leaving.cancel()
        await until(lambda: " aborted." in server.log(10**6))
        server.ask_worker("imported_of_the_cpu")  # by then the engine core has heard of it, too
        so_far = len(received)
        await until(lambda: len(received) > so_far + 8)
        assert server.in_flight() == 1
        server.fault("release")
        await until(lambda: server.in_flight() == 0)
        staying.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def check(case: Case, server: GpuServer) -> None:
    if case.splits:
        asyncio.run(leave_in_flight(server))
    clients = make_clients(0)
    given = asyncio.run(visit(server.url, clients))
    for client, num_tokens in zip(clients, given, strict=True):
        assert client.stays_s is not None or num_tokens == client.request.max_tokens
    assert asyncio.run(visit(server.url, clients[:1])) == [clients[0].request.max_tokens]

    metrics = server.metrics()
    launched = metrics["vllm_duet:prefills_launched_total"]
    assert metrics["vllm_duet:prefills_joined_total"] == launched
    assert metrics["vllm_duet:prefills_failed_total"] == 0
    (possible,) = (name for name in metrics if name.startswith("vllm_duet:split_possible"))
    assert metrics[possible] == (not case.says) and case.says in possible
    assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0
    said = [line for line in server.log(10**6).splitlines() if "does not split here" in line]
    assert [case.says in line for line in said] == [True] * bool(case.says)
    assert launched > 0 or not case.splits
    assert server.ask_worker("imported_of_the_cpu") == []

    assert len(server.processes()) > 1
    assert server.interrupt() == 0
    psutil.wait_procs(server.processes(), timeout=10)  # multiprocessing's resource tracker is last
    assert server.processes() == []
