# SPDX-License-Identifier: Apache-2.0
"""A prefill that fails on its lane takes its own requests along, and nothing else."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import pytest
import torch
from engine.harness import Arrival
from engine.scenarios import CountingScheduler, compare, serve
from engine.workloads import tokens
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.lanes.serial import SerialLanePair, Timing
from vllm_duet.scheduler import MAX_FAILURES, DuetScheduler
from vllm_duet.worker.cpu import DuetCPUModelRunner

MARK = 511
"""A token that no other prompt has: the forward pass of a prompt with it fails."""


@contextmanager
def failing(engine, times: int = 1) -> Iterator[None]:
    """Let the forward pass of prompts with MARK run out of memory, before its last layer."""
    left, forward = times, threading.local()

    def look(module, args, kwargs) -> None:
        nonlocal left
        forward.is_doomed = left > 0 and bool((kwargs["input_ids"] == MARK).any())
        left -= forward.is_doomed

    def fail(module, args) -> None:
        if forward.is_doomed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model = engine.runner.model
    hooks = [
        model.register_forward_pre_hook(look, with_kwargs=True),
        model.model.layers[-1].register_forward_pre_hook(fail),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def arrivals() -> list[Arrival]:
    """Decodes; a prompt that fails; one behind it on the lane that finds its first 64 tokens
    in the prefix cache; one behind it that does not; and the first 64 tokens again, later."""
    rng = random.Random(3)
    greedy = SamplingParams(
        temperature=0, max_tokens=30, ignore_eos=True, detokenize=False, logprobs=2
    )
    prefix = tokens(rng, 64)
    decodes = [Arrival(f"decode-{i}", tokens(rng, 20 + i), greedy) for i in range(3)]
    later = {
        "doomed": ([*prefix, MARK, *tokens(rng, 50)], 3),
        "relies on it": ([*prefix, *tokens(rng, 30)], 5),
        "later": ([*prefix, *tokens(rng, 40)], 22),
    }
    return [
        *decodes,
        *(Arrival(name, prompt, greedy, step=s) for name, (prompt, s) in later.items()),
    ]


class LaunchesBehind(CountingScheduler):
    """Launches newcomers behind a prefill whenever that is allowed."""

    def _ends_later(self, prefill) -> bool:
        return False


@pytest.mark.parametrize("timing", get_args(Timing))
def test_who_relies_on_it_fails_too_and_nobody_else(roomy, arrivals, timing, vllm_log):
    stock = roomy.run(arrivals, AsyncScheduler)
    with failing(roomy):
        duet = serve(roomy, arrivals, timing, 6, LaunchesBehind, mode="split")
    for name in ("doomed", "relies on it"):
        assert duet[name].finish_reason == {0: "error"} and not duet[name].tokens.get(0)
    for name in stock.keys() - {"doomed", "relies on it"}:
        compare(stock[name], duet[name])
    totals = roomy.core.scheduler.totals
    assert totals.failed == 1 and totals.joined == totals.launched >= 3
    sentence = "A prefill of 115 tokens failed on its lane of 116 SMs, beside a decode lane of 16"
    assert f"{sentence}: CUDA out of memory, for 2 GiB more" in vllm_log.text
    assert "2 requests failed" in vllm_log.text


class LeavesItInThePrefixCache(LaunchesBehind):
    """Forgets that a failed prefill has registered blocks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kv_blocks.written = lambda prefill, request_id: set()


def test_what_is_left_in_the_prefix_cache_would_be_noticed(roomy, arrivals):
    stock = roomy.run(arrivals, AsyncScheduler)
    with failing(roomy):
        duet = serve(roomy, arrivals, "late", 6, LeavesItInThePrefixCache, mode="split")
    with pytest.raises(AssertionError):
        compare(stock["later"], duet["later"])


def test_an_aborted_one_fails_quietly(roomy, arrivals):
    aborted = [
        replace(a, abort_at=5) if a.request_id == "doomed" else a
        for a in arrivals
        if a.request_id != "relies on it"
    ]
    stock = roomy.run(aborted, AsyncScheduler)
    with failing(roomy):
        duet = serve(roomy, aborted, "late", 6, mode="split")
    assert roomy.core.scheduler.totals.failed == 1
    for arrival in aborted:
        compare(stock[arrival.request_id], duet[arrival.request_id])


def test_a_chunk_that_fails_ends_its_request(roomy):
    rng = random.Random(5)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    prompt = tokens(rng, 500)
    prompt[400] = MARK  # in the second chunk
    arrivals = [
        Arrival("decode", tokens(rng, 20), greedy),
        Arrival("long", prompt, greedy, step=2),
    ]
    stock = roomy.run(arrivals, AsyncScheduler)
    with failing(roomy):
        duet = serve(roomy, arrivals, "late", 2, mode="split")
    assert duet["long"].finish_reason == {0: "error"}
    compare(stock["decode"], duet["decode"])


def test_steps_are_whole_after_a_few_failures(roomy, vllm_log):
    rng = random.Random(6)
    greedy = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, detokenize=False)
    doomed = [
        Arrival(f"doomed-{i}", [MARK, *tokens(rng, 60)], greedy, step=8 * i + 3)
        for i in range(MAX_FAILURES + 1)
    ]
    arrivals = [Arrival("decode", tokens(rng, 20), greedy), *doomed]
    stock = roomy.run(arrivals, AsyncScheduler)
    with failing(roomy, MAX_FAILURES):
        duet = serve(roomy, arrivals, "late", 1, DuetScheduler, mode="split")
    failed = [name for name, answer in duet.items() if answer.finish_reason == {0: "error"}]
    assert failed == [a.request_id for a in doomed[:MAX_FAILURES]]
    for name in stock.keys() - failed:
        compare(stock[name], duet[name])
    assert roomy.core.scheduler.totals.launched == MAX_FAILURES
    assert "splits no more steps: 3 prefills have failed on their lane" in vllm_log.text


def test_an_error_that_shows_up_later_names_the_lanes(roomy, arrivals, monkeypatch):
    """As of a kernel: the host learns of it when it waits for the tokens."""
    joined, stock = [], DuetCPUModelRunner._sample_prefill

    class Broken:
        def get_output(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def sample_prefill(runner, lanes, prefill):
        stock(runner, lanes, prefill)
        joined.append(True)
        return Broken()

    monkeypatch.setattr(DuetCPUModelRunner, "_sample_prefill", sample_prefill)
    try:
        with pytest.raises(RuntimeError, match="illegal memory access") as raised:
            serve(roomy, arrivals, "late", 2, mode="split")
    finally:
        roomy.discard()
    said = "There was a prefill on a lane of 116 SMs, beside a decode lane of 16."
    assert joined and said in raised.value.__notes__


def test_a_device_that_does_not_go_on_stops_the_engine(roomy, arrivals, monkeypatch):
    monkeypatch.setattr(SerialLanePair, "is_usable", lambda self: False)
    said = r"^A prefill of 115 tokens failed on its lane of 116 SMs, .*: CUDA out of memory, for 2"
    try:
        with failing(roomy), pytest.raises(RuntimeError, match=said):
            serve(roomy, arrivals, "late", 2, mode="split")
    finally:
        roomy.discard()
