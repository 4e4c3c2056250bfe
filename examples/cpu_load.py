# SPDX-License-Identifier: Apache-2.0
"""Clients that send requests at given times, and what they see: for the demo and
eval/cpu_serving.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np


@dataclass(slots=True)
class Request:
    """As its client saw it; seconds since the run began."""

    arrival_s: float
    prompt: str | list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)


async def send(client: httpx.AsyncClient, request: Request, began: float, **sampling: Any) -> None:
    await asyncio.sleep(max(0.0, began + request.arrival_s - time.monotonic()))
    body = {
        "model": "model",
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **sampling,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                tokens = json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"] or []
                request.tokens += tokens
                request.token_s += [time.monotonic() - began] * len(tokens)


async def send_all(url: str, requests: Sequence[Request], **sampling: Any) -> None:
    """Send each when it is due; ``sampling`` as in vLLM's HTTP API."""
    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        # The first requests of a server wait for what it loads late.
        await send(client, Request(0.0, [5] * 40, 8), time.monotonic())
        began = time.monotonic()
        await asyncio.gather(*(send(client, request, began, **sampling) for request in requests))


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
