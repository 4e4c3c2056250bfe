# SPDX-License-Identifier: Apache-2.0
"""Random request mixes that together reach every path of the in-flight protocol."""

from __future__ import annotations

import random
from typing import Any

from engine.harness import Arrival
from vllm import SamplingParams

VOCABULARY = range(3, 510)


def tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(VOCABULARY, k=count)


def in_flight(request_id: str) -> Any:
    """Says whether the scheduler has a prefill of ``request_id`` in flight."""

    def check(scheduler: Any) -> bool:
        # vLLM appends a random suffix to a client's request id.
        return any(
            i.rsplit("-", 1)[0] == request_id
            for prefill in getattr(scheduler, "_in_flight", ())
            for i in prefill.output.num_scheduled_tokens
        )

    return check


def cache_filling(rng: random.Random) -> list[Arrival]:
    """Four decodes and one late prompt that together fill 8 KV blocks of 32 tokens.

    The decodes cross a block boundary while the prompt is in flight, so they
    take any block it gives back too soon.
    """
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    decodes = [Arrival(f"decode-{i}", tokens(rng, 28), greedy) for i in range(4)]
    return [*decodes, Arrival("late", tokens(rng, 100), greedy, step=2)]


def random_mix(seed: int, num_requests: int = 9, longest: int = 300) -> list[Arrival]:
    """Mixed lengths, shared prefixes, stop tokens, one-token answers, seeds, logprobs,
    several choices a request, priorities, and aborts while waiting, decoding and in flight."""
    rng = random.Random(seed)
    shared = tokens(rng, 96)
    arrivals = []
    for i in range(num_requests):
        request_id = f"r{i}"
        prompt = tokens(rng, rng.randint(5, longest - len(shared)))
        if rng.random() < 0.4:
            prompt = shared + prompt
        if rng.random() < 0.1:
            prompt = shared[:64]  # may be cached to the last token
        temperature = rng.choice([0.0, 0.8])
        params = SamplingParams(
            temperature=temperature,
            seed=seed * 100 + i,
            max_tokens=rng.choice([1, 6, 16, 40]),
            stop_token_ids=tokens(rng, 8),
            logprobs=rng.choice([None, None, None, 3]),
            # Triton's interpreter takes seconds over a long prompt's logprobs.
            prompt_logprobs=1 if len(prompt) < 40 else None,
            presence_penalty=rng.choice([0.0, 0.0, 0.7]),
            n=rng.choice([1, 1, 2]) if temperature else 1,
            ignore_eos=True,
            detokenize=False,
        )
        step = rng.randint(0, 12)
        fate = rng.random()
        arrivals.append(
            Arrival(
                request_id,
                prompt,
                params,
                step=step,
                priority=rng.randint(0, 2),
                abort_at=step + rng.randint(0, 12) if fate < 0.15 else None,
                abort_when=in_flight(request_id) if fate > 0.9 else None,
            )
        )
    return arrivals
