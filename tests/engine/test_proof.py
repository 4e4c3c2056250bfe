# SPDX-License-Identifier: Apache-2.0
"""Split steps held against whole ones before the first request: right ones pass, whenever the
prefill runs; wrong ones are refused in one sentence, and the engine goes on whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine.harness import Engine
from engine.test_rules import share_block_tables, share_input_buffers, share_slot_mappings
from engine.workloads import random_mix
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.hand_made import HandMadeSteps
from vllm_duet.lanes.serial import SerialLanePair
from vllm_duet.worker import proof, runner
from vllm_duet.worker.proof import Proof, prove_lanes

SPLITS = {16: 116, 64: 68}


def prove(engine: Engine, timing: str = "late", hold_steps: int = 2) -> Proof:
    """And check that an engine which has been through it serves as before."""
    worker = engine.llm_engine.model_executor.driver_worker.worker
    own, engine.runner.lanes = engine.runner.lanes, SerialLanePair(timing, hold_steps)
    steps = HandMadeSteps(engine.vllm_config, engine.runner.kv_cache_config)
    try:
        return prove_lanes(worker, steps, SPLITS, engine.runner.max_num_reqs)
    finally:
        engine.runner.lanes.shutdown()
        engine.runner.lanes = own
        engine.runner._in_flight.clear()
        states = engine.runner.req_states
        assert not states.req_id_to_index
        assert sorted(states.free_indices) == list(range(states.max_num_reqs))


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    # Triton's interpreter is slow.
    monkeypatch.setattr(proof, "MOST_DECODES", 4)
    monkeypatch.setattr(proof, "CONTEXTS", (3, 70))
    monkeypatch.setattr(proof, "MOST_PREFILL", 90)


@pytest.mark.parametrize("hold_steps", [0, 2, 5])
@pytest.mark.parametrize("timing", ["early", "late", "threaded", "interleaved"])
def test_split_steps_compute_what_whole_ones_do(roomy, timing, hold_steps) -> None:
    assert prove(roomy, timing, hold_steps) == Proof(None)


def test_with_few_rows(few_rows) -> None:
    assert prove(few_rows) == Proof(None)


def test_an_engine_serves_as_before(roomy) -> None:
    arrivals = random_mix(1)
    stock = roomy.run(arrivals, AsyncScheduler)
    assert prove(roomy) == Proof(None)
    again = roomy.run(arrivals, AsyncScheduler)
    assert {i: a.tokens for i, a in stock.items()} == {i: a.tokens for i, a in again.items()}


def assert_refused(found: Proof, *words: str) -> None:
    assert found.obstacle is not None and all(word in found.obstacle for word in words), found
    assert "\n" not in found.obstacle and ". " not in found.obstacle


@pytest.mark.parametrize("share", [share_input_buffers, share_slot_mappings, share_block_tables])
def test_buffers_that_both_lanes_write_to(roomy, share) -> None:
    states = roomy.runner.prefill_states
    own = [vars(state).copy() for state in states]
    for state in states:
        share(roomy.runner, state)
    try:
        found = prove(roomy)
    finally:
        for state, kept in zip(states, own, strict=True):
            vars(state).update(kept)
    assert_refused(found, "lanes of 16 and 116 SMs", "do not compute what whole ones do")
    assert found.runs


def wrong_hidden_states(stock):
    def run_prefill(self, lanes, forward):
        hidden = stock(self, lanes, forward)
        hidden[-1] += 0.1 * hidden[-1].norm() * torch.randn_like(hidden[-1]) / 8
        return hidden

    return run_prefill


def no_forward(stock):
    """The KV cache is not written."""

    def run_prefill(self, lanes, forward):
        before = [cache.clone() for cache in self.kv_caches]
        hidden = stock(self, lanes, forward)
        for cache, kept in zip(self.kv_caches[-1:], before[-1:], strict=True):
            cache.copy_(kept)
        return hidden

    return run_prefill


@pytest.mark.parametrize("broken", [wrong_hidden_states, no_forward])
def test_a_prefill_that_computes_something_else(roomy, monkeypatch, broken) -> None:
    mixin = runner.DuetModelRunnerMixin
    monkeypatch.setattr(mixin, "_run_prefill", broken(mixin._run_prefill))
    found = prove(roomy, "early")
    assert_refused(found, "do not compute what whole ones do")
    assert found.runs


def test_only_the_wrong_lane_is_named(roomy, monkeypatch) -> None:
    mixin = runner.DuetModelRunnerMixin
    stock = mixin._launch

    def launch(self, lanes, launch):
        stock(self, lanes, launch)
        if launch.decode_sms == 64:
            state = self.prefill_states[launch.launch_id % 2]
            state.slot_mappings += 1

    monkeypatch.setattr(mixin, "_launch", launch)
    assert_refused(prove(roomy), "lanes of 64 and 68 SMs")


def test_a_prefill_that_raises(roomy, monkeypatch) -> None:
    def run_prefill(*_):
        raise RuntimeError("no such kernel.")

    monkeypatch.setattr(runner.DuetModelRunnerMixin, "_run_prefill", run_prefill)
    found = prove(roomy, "early")
    assert_refused(found, "A prefill of", "failed on its lane of 116 SMs", "no such kernel")
    assert not found.runs


@pytest.fixture
def impatient(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(proof, "TIMEOUT_S", 0.5)


def test_a_prefill_that_does_not_end(roomy, impatient) -> None:
    found = prove(roomy, hold_steps=10**9)
    assert found == Proof("a prefill on its lane of 116 SMs had not ended after 0.5 s", runs=False)


def test_a_cache_that_is_too_small_for_the_batch(full_cache) -> None:
    found = prove(full_cache)
    assert found == Proof("there is no room for a batch that would prove the lanes", runs=False)
