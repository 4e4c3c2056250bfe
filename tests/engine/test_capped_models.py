# SPDX-License-Identifier: Apache-2.0
"""CAPPED steps of models that are not split: hybrids, and those whose tokens are drafted.

Random caps on the real engine; every token is stock vLLM's.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from engine.harness import Answer, Arrival, Engine, make_llm
from engine.scenarios import compare
from engine.workloads import random_mix
from tiny_families import eagle3_drafter, glm4_moe, qwen3_next
from tiny_model import make_tiny_model
from triton.runtime.interpreter import InterpreterBuilder
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_duet.plan import Mode
from vllm_duet.scheduler import DuetScheduler

NUM_DRAFTS = 3
NEARLY = 0.2
"""In bfloat16 a logprob of these models is off by up to 0.05."""
ENGINES: list[Engine] = []
"""Kept, as ``make_llm`` says."""


@pytest.fixture(scope="module", autouse=True)
def _masks_of_numbers():
    """vLLM's n-gram kernel has masks that are numbers; the interpreter takes truth values alone."""

    def with_truth_values(stock: Any, at: int) -> Any:
        def run(self: Any, *args: Any) -> Any:
            args[at].data = np.asarray(args[at].data).astype(bool)
            return stock(self, *args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
            stock = getattr(InterpreterBuilder, name)
            patch.setattr(InterpreterBuilder, name, with_truth_values(stock, at))
        yield


def hybrid(tmp_path) -> dict[str, Any]:
    return {"model": str(qwen3_next(tmp_path / "model")), "dtype": "bfloat16"}


def mtp(tmp_path) -> dict[str, Any]:
    return {"model": str(glm4_moe(tmp_path / "model"))} | drafted(method="mtp")


def ngram(tmp_path) -> dict[str, Any]:
    model = make_tiny_model(tmp_path / "model")
    lookup = dict(prompt_lookup_min=1, prompt_lookup_max=4)
    return {"model": str(model)} | drafted(method="ngram", **lookup)


def eagle3(tmp_path) -> dict[str, Any]:
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    drafter = eagle3_drafter(tmp_path / "drafter")
    return {"model": str(model)} | drafted(method="eagle3", model=str(drafter))


def own_drafter(tmp_path) -> dict[str, Any]:
    """Drafts that are taken nearly always: the model drafts for itself."""
    model = str(make_tiny_model(tmp_path / "model"))
    return {"model": model} | drafted(method="draft_model", model=model)


def drafted(**options: Any) -> dict[str, Any]:
    return {"speculative_config": {"num_speculative_tokens": NUM_DRAFTS} | options}


class Watched(DuetScheduler):
    """Counts the decodes of CAPPED steps by the tokens that they compute."""

    seen: ClassVar[Counter[int]] = Counter()

    def schedule(self, throttle_prefills: bool = False):
        before = self.totals.steps[Mode.CAPPED]
        decodes = [r.request_id for r in self.running if not r.is_prefill_chunk]
        output = super().schedule(throttle_prefills)
        if self.totals.steps[Mode.CAPPED] > before:
            tokens = output.num_scheduled_tokens
            self.seen.update(tokens[i] for i in decodes if i in tokens)
        return output


def served(engine: Engine, arrivals: list[Arrival], scheduler_cls: type) -> dict[str, Answer]:
    engine.vllm_config.additional_config = {"duet": {"mode": "random"}}
    return engine.run(arrivals, scheduler_cls)


def likeliest(arrival: Arrival) -> Arrival:
    """The same prompt, for the likeliest tokens and their rivals."""
    params = SamplingParams(
        temperature=0, max_tokens=16, logprobs=4, ignore_eos=True, detokenize=False
    )
    return replace(arrival, params=params)


def compare_rounded(stock: Answer, ours: Answer) -> tuple[int, int]:
    """In bfloat16 the batch decides which of two tokens that are as likely is the likelier: so it
    does in stock vLLM with another token budget. Returns how many tokens could be compared, and of
    how many."""
    tokens, theirs = ours.tokens.get(0, []), stock.tokens.get(0, [])
    both = min(len(tokens), len(theirs))
    same = next((n for n in range(both) if tokens[n] != theirs[n]), both)
    if same < both:
        likely = stock.logprobs[0][same]
        assert tokens[same] in likely
        assert likely[tokens[same]].logprob > likely[theirs[same]].logprob - NEARLY
    return same, both


def engine_of(settings: dict[str, Any]) -> Engine:
    engine = Engine(
        make_llm(
            scheduler_cls="vllm_duet.DuetScheduler", **{"num_gpu_blocks_override": 256} | settings
        )
    )
    ENGINES.append(engine)
    Watched.seen.clear()
    return engine


@pytest.mark.parametrize(
    ("family", "asynchronous"),
    [(ngram, False), (mtp, True), (eagle3, True), (own_drafter, False)],
)
def test_drafted_tokens_are_stocks(tmp_path, async_scheduling, experts, family, asynchronous):
    with async_scheduling() if asynchronous else nullcontext():
        engine = engine_of(family(tmp_path))
    assert engine.vllm_config.scheduler_config.async_scheduling == asynchronous
    stock_cls = AsyncScheduler if asynchronous else Scheduler
    for seed in range(2):
        arrivals = random_mix(seed, num_requests=7, longest=220)
        stock, answers = (served(engine, arrivals, cls) for cls in (stock_cls, Watched))
        for request_id, answer in stock.items():
            compare(answer, answers[request_id])
    assert Watched.seen[1 + NUM_DRAFTS] > 10


def test_tokens_of_a_hybrid_are_stocks(tmp_path, experts):
    engine = engine_of(hybrid(tmp_path))
    assert engine.core.scheduler.need_mamba_block_aligned_split
    same = both = 0
    for seed in range(2):
        arrivals = [likeliest(a) for a in random_mix(seed, num_requests=7, longest=220)]
        stock, answers = (served(engine, arrivals, cls) for cls in (Scheduler, Watched))
        for request_id, answer in stock.items():
            found = compare_rounded(answer, answers[request_id])
            same, both = same + found[0], both + found[1]
    assert same > 0.8 * both
    assert Watched.seen[1] > 20
