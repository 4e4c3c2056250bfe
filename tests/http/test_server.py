# SPDX-License-Identifier: Apache-2.0
"""Real clients of a real server: what streams to them, and what happens when they leave."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from failing_lane import MARK
from prometheus_client.parser import text_string_to_metric_families
from streaming import Request, answers, connect, make_request, stream

POLL_TIMEOUT_S = 60


async def num_requests(client: httpx.AsyncClient, state: str) -> int:
    metrics = (await client.get("/metrics")).text
    lines = metrics.splitlines()
    return sum(
        int(float(line.rsplit(" ", 1)[1]))
        for line in lines
        if line.startswith(f"vllm:num_requests_{state}{{")
    )


async def poll(condition: Callable[[], object]) -> None:
    """Return once ``await condition()`` is true."""
    async with asyncio.timeout(POLL_TIMEOUT_S):
        while not await condition():
            await asyncio.sleep(0.01)


class Listener:
    """Reads one stream in the background; ``arrivals`` notes who got each token, in order."""

    def __init__(
        self, client: httpx.AsyncClient, name: str, request: Request, arrivals: list[str]
    ) -> None:
        self.chunks: list[list[int]] = []
        self.started = asyncio.Event()
        self._name, self._arrivals = name, arrivals
        self.task = asyncio.create_task(self._read(stream(client, request)))

    async def _read(self, chunks: AsyncIterator[list[int]]) -> None:
        async for chunk in chunks:
            self.chunks.append(chunk)
            self._arrivals += [self._name] * len(chunk)
            self.started.set()

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk]


async def test_decodes_stream_while_prompts_are_in_flight(servers, hold_steps):
    rng = random.Random(0)
    decodes = [make_request(rng, 20 + i, 120) for i in range(3)]
    long = make_request(rng, 900, 4)  # four chunks, each in flight for hold_steps
    arrivals: list[str] = []
    async with connect(servers["split"]) as duet, connect(servers["stock"]) as stock:
        listeners = [
            Listener(duet, f"decode-{i}", request, arrivals) for i, request in enumerate(decodes)
        ]
        for listener in listeners:
            await listener.started.wait()
        sent = len(arrivals)
        listeners.append(Listener(duet, "long", long, arrivals))
        await asyncio.gather(*(listener.task for listener in listeners))

        in_flight = arrivals[sent : arrivals.index("long")]
        for i in range(len(decodes)):
            assert in_flight.count(f"decode-{i}") >= 4 * hold_steps
        for listener, expected in zip(
            listeners, await answers(stock, [*decodes, long]), strict=True
        ):
            assert len(listener.chunks) > 1
            assert listener.tokens == expected


async def test_a_client_that_leaves_mid_prefill_leaves_nothing_behind(servers):
    rng = random.Random(1)
    decodes = [make_request(rng, 20 + i, 120) for i in range(2)]
    following = [make_request(rng, n, 8) for n in (700, 40, 300)]
    arrivals: list[str] = []
    async with connect(servers["split"]) as duet:

        async def running(count: int) -> bool:
            return await num_requests(duet, "running") == count

        async def idle() -> bool:
            return await running(0) and await num_requests(duet, "waiting") == 0

        before = await answers(duet, [*following, *decodes])
        listeners = [Listener(duet, "decode", request, arrivals) for request in decodes]
        for listener in listeners:
            await listener.started.wait()
        leaver = Listener(duet, "leaver", make_request(rng, 900, 4), arrivals)
        await poll(lambda: running(len(decodes) + 1))
        leaver.task.cancel()
        await asyncio.wait([leaver.task])
        assert leaver.task.cancelled() and not leaver.chunks

        await asyncio.gather(*(listener.task for listener in listeners))
        await poll(idle)
        assert (await duet.get("/health")).is_success
        after = await answers(duet, following)
        assert [*after, *(listener.tokens for listener in listeners)] == before
        await poll(idle)


@pytest.mark.parametrize("server", ["split", "random"])
async def test_64_clients_at_once(servers, server):
    rng = random.Random(2)
    prefix = make_request(rng, 96, 0).prompt
    requests = []
    for _ in range(64):
        request = make_request(rng, rng.choice([5, 20, 60, 130, 500]), rng.choice([1, 4, 12]))
        shared = prefix if rng.random() < 0.3 else []
        requests.append(Request(shared + request.prompt, request.max_tokens))
    async with connect(servers["stock"]) as stock, connect(servers[server]) as duet:
        expected, given = await asyncio.gather(answers(stock, requests), answers(duet, requests))
    assert given == expected
    assert [len(tokens) for tokens in given] == [request.max_tokens for request in requests]


async def test_a_prefill_that_fails_is_an_error_for_its_client_alone(servers):
    rng = random.Random(3)
    decodes = [make_request(rng, 20 + i, 60) for i in range(2)]
    doomed = make_request(rng, 100, 8).prompt
    doomed[50] = MARK
    body = {"model": "model", "prompt": doomed, "max_tokens": 8}
    arrivals: list[str] = []
    async with connect(servers["failing"]) as duet, connect(servers["stock"]) as stock:
        listeners = [Listener(duet, "decode", request, arrivals) for request in decodes]
        for listener in listeners:
            await listener.started.wait()
        answered = await duet.post("/v1/completions", json=body)
        assert answered.status_code == 500 and "error" in answered.json()
        streamed = await duet.post("/v1/completions", json=body | {"stream": True})
        [line, *_] = streamed.text.splitlines()
        assert "error" in json.loads(line.removeprefix("data: "))
        await asyncio.gather(*(listener.task for listener in listeners))
        expected = await answers(stock, decodes)
        assert [listener.tokens for listener in listeners] == expected
        assert await answers(duet, decodes) == expected
        assert "vllm_duet:prefills_failed_total" in (await duet.get("/metrics")).text


async def series(client: httpx.AsyncClient) -> dict[tuple[str, str | None], float]:
    """Ours, by name and the label that is neither of the model nor of the engine."""
    return {
        (
            sample.name,
            next((v for k, v in sample.labels.items() if k not in ("model_name", "engine")), None),
        ): sample.value
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
        if sample.name.startswith("vllm_duet:")
    }


async def test_metrics_tell_which_lanes_are_in_use(servers):
    rng = random.Random(4)
    requests = [make_request(rng, 20 + i, 30) for i in range(4)]
    async with connect(servers["auto"]) as duet, connect(servers["stock"]) as stock:
        assert await answers(duet, requests) == await answers(stock, requests)
        found = await series(duet)
    assert [found["vllm_duet:lane_in_use", sms] for sms in ("16", "32", "56")] == [1, 1, 1]
    assert found["vllm_duet:late_gaps_total", "decode_only"] > 0


async def test_metrics_tell_what_the_lanes_did(servers):
    """Runs last: the tests above have kept both lanes busy."""
    async with connect(servers["split"]) as duet:
        found = await series(duet)
    launched = found["vllm_duet:prefills_launched_total", None]
    assert launched > 0 and found["vllm_duet:prefills_joined_total", None] == launched
    assert found["vllm_duet:prefills_failed_total", None] == 0
    assert found["vllm_duet:steps_total", "split"] > launched
    assert found["vllm_duet:late_gaps_total", "split"] >= found["vllm_duet:steps_total", "split"]
    busy_s = [found["vllm_duet:lane_busy_seconds_total", lane] for lane in ("decode", "prefill")]
    # These lanes take turns.
    assert min(busy_s) > 0 and sum(busy_s) < found["vllm_duet:split_seconds_total", None]
