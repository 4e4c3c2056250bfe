# SPDX-License-Identifier: Apache-2.0
"""Clients that stream completions, by token ids, from a real server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

VOCABULARY = range(3, 510)


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int


def make_request(rng: random.Random, prompt_tokens: int, max_tokens: int) -> Request:
    return Request(rng.choices(VOCABULARY, k=prompt_tokens), max_tokens)


def connect(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=300)


async def stream(client: httpx.AsyncClient, request: Request) -> AsyncIterator[list[int]]:
    """The token ids of each chunk, as it arrives."""
    body = {
        "model": "model",
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                yield chunk["choices"][0]["token_ids"]
        assert line == "" or line == "data: [DONE]"


async def answer(client: httpx.AsyncClient, request: Request) -> list[int]:
    return [token async for chunk in stream(client, request) for token in chunk]


async def answers(client: httpx.AsyncClient, requests: list[Request]) -> list[list[int]]:
    return await asyncio.gather(*(answer(client, request) for request in requests))
