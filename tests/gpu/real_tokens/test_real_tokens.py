# SPDX-License-Identifier: Apache-2.0
"""Tokens of the CUDA path are real, and they are stock vLLM's, whatever the plan and in
whatever order the streams run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from engine.harness import Answer, Arrival, Engine
from engine.scenarios import CountingScheduler, compare
from engine.workloads import random_mix, tokens
from fake_gpu import FakeGpu, real_kernels
from fake_gpu.races import find_races
from fake_gpu.trace import read_trace
from gpu.real_tokens.conftest import DUET
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

SEEDS = int(os.environ.get("DUET_SEEDS", "2"))
"""How many draws of each kind; more for a night."""


@contextmanager
def late(seed: int | None) -> Iterator[None]:
    """Streams run as late as they can, in an order drawn by ``seed``; None: at once."""
    gpu = FakeGpu()
    gpu.order(seed)
    try:
        yield
        real_kernels.raise_errors()
    finally:
        gpu.order(None)


def serve(engine: Engine, arrivals, order: int | None, *, slices: bool = False, **duet):
    """The answers of a DuetScheduler with the options ``duet``."""
    engine.vllm_config.additional_config = {"duet": DUET | duet}
    engine.runner.lanes._slices = slices
    with late(order):
        return engine.run(arrivals, CountingScheduler)


def compare_all(stock: dict[str, Answer], answers: dict[str, Answer]) -> None:
    for request_id, answer in stock.items():
        compare(answer, answers[request_id])


def test_stock_tokens_are_those_of_transformers(roomy, tiny_model):
    """The kernels compute what the model says, in graphs and out of them."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(tiny_model).double()
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    rng = random.Random(3)
    arrivals = [Arrival(f"r{n}", tokens(rng, n), greedy) for n in (5, 40, 100, 300)]
    answers = roomy.run(arrivals, AsyncScheduler)
    for arrival in arrivals:
        prompt = torch.tensor([arrival.prompt])
        wanted = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert answers[arrival.request_id].tokens[0] == wanted[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("engine", ["roomy", "cramped", "synchronous"])
def test_stock_in_any_order(request, engine, seed):
    """Stock vLLM orders its streams as it should, and so do these kernels."""
    engine = request.getfixturevalue(engine)
    arrivals = random_mix(200 + seed)
    at_once = engine.run(arrivals, AsyncScheduler)
    with late(seed):
        compare_all(at_once, engine.run(arrivals, AsyncScheduler))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("mode", ["random", "split"])
@pytest.mark.parametrize("engine", ["roomy", "cramped", "synchronous"])
def test_any_plan_in_any_order(request, engine, mode, seed):
    engine = request.getfixturevalue(engine)
    arrivals = random_mix(seed)
    stock = engine.run(arrivals, AsyncScheduler)
    compare_all(stock, serve(engine, arrivals, None, slices=seed % 2 == 1, mode=mode, seed=seed))
    for order in range(2):
        answers = serve(engine, arrivals, order, slices=order == 1, mode=mode, seed=seed)
        compare_all(stock, answers)
        assert engine.core.scheduler.totals.joined


@pytest.mark.parametrize("mode", ["random", "split"])
@pytest.mark.parametrize("engine", ["roomy", "cramped", "zeroing"])
def test_whatever_two_streams_touch_is_ordered(request, tmp_path, engine, mode):
    """Every byte that a kernel reads or writes, in whatever order they happened to run."""
    engine = request.getfixturevalue(engine)
    with real_kernels.traced(tmp_path / "trace"):
        serve(engine, random_mix(1), 1, mode=mode)
    found = find_races(read_trace(tmp_path / "trace"))
    assert found.num_writes > 1000 and engine.core.scheduler.totals.joined
    assert found.races == []


@pytest.mark.parametrize("order", range(SEEDS))
@pytest.mark.parametrize("engine", ["roomy", "synchronous"])
def test_a_block_that_a_decode_fills_in_the_step_of_the_launch(request, engine, order):
    """Rule 5 within one step: the newcomer's prefix is written by the step that launches it."""
    engine = request.getfixturevalue(engine)
    for arrivals in who_find_a_block_of_their_step(engine, order):
        stock = engine.run(arrivals, AsyncScheduler)
        compare_all(stock, serve(engine, arrivals, order, mode="split"))


def who_find_a_block_of_their_step(engine: Engine, seed: int) -> Iterator[list[Arrival]]:
    """Prompts that begin with a block that a decode completes, at one of several steps."""
    rng = random.Random(seed)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    decode = Arrival("decode", tokens(rng, 30), greedy)
    answer = engine.run([decode], AsyncScheduler)["decode"].tokens[0]
    for step in range(1, 6):
        prompt = decode.prompt + answer[:2] + tokens(rng, 20)  # a block, and more
        yield [decode, Arrival("newcomer", prompt, greedy, step=step)]
