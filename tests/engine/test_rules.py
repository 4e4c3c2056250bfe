# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/design.md that keep a prefill in flight correct, one by one.

Each case is served correctly first, then with its rule broken on purpose: a
case that the broken version survives would prove nothing.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from engine.harness import Arrival
from engine.scenarios import CountingScheduler, compare, serve
from engine.workloads import cache_filling, in_flight, tokens
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.plan import Join, StepDirective
from vllm_duet.policy import DECODE_LANE
from vllm_duet.scheduler import DuetScheduler
from vllm_duet.worker.lane_state import LaneCheck

HOLD_STEPS = 8
"""Long enough for every decode to cross a block boundary beside the prefill."""


def all_equal(stock, answers) -> bool:
    try:
        for request_id, answer in stock.items():
            compare(answer, answers[request_id])
    except AssertionError:
        return False
    return True


def noticed(engine, stock, arrivals, hold_steps, scheduler_cls=DuetScheduler) -> bool:
    """Whether serving with a rule broken goes visibly wrong."""
    try:
        broken = serve(engine, arrivals, "late", hold_steps, scheduler_cls, mode="split")
    except AssertionError:  # it leaks, or a request never ends
        engine.discard()
        return True
    return not all_equal(stock, broken)


# Rule 1: blocks and rows of a prefill in flight are kept until the join.


class GivesBlocksAway(DuetScheduler):
    """Frees an aborted request at once although its prefill is in flight."""

    _free_request_blocks = AsyncScheduler._free_request_blocks


@pytest.fixture
def abort_in_flight():
    *decodes, late = cache_filling(random.Random(0))
    return [*decodes, replace(late, abort_when=in_flight("late"))]


def test_abort_in_flight(full_cache, abort_in_flight):
    stock = full_cache.run(abort_in_flight, AsyncScheduler)
    before = CountingScheduler.seen.copy()
    duet = serve(full_cache, abort_in_flight, "late", HOLD_STEPS, mode="split")
    seen = CountingScheduler.seen - before
    assert seen["joins of an aborted request"] and seen["preemptions beside a prefill"]
    assert all_equal(stock, duet)
    assert duet["late"].aborted and not duet["late"].tokens


def test_blocks_given_away_are_noticed(full_cache, abort_in_flight):
    stock = full_cache.run(abort_in_flight, AsyncScheduler)
    assert noticed(full_cache, stock, abort_in_flight, HOLD_STEPS, GivesBlocksAway)


# Rule 2: a prefill in flight shares no buffer with the decode lane.


@pytest.fixture
def beside_decodes():
    rng = random.Random(1)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    lengths = [(40, 0), (70, 0), (100, 5), (90, 8)]
    return [Arrival(f"r{i}", tokens(rng, n), greedy, step=s) for i, (n, s) in enumerate(lengths)]


def share_input_buffers(runner, state):
    state.input_buffers = runner.input_buffers


def share_slot_mappings(runner, state):
    state.slot_mappings = runner.block_tables.slot_mappings


def share_block_tables(runner, state):
    state.block_tables = tuple(runner.block_tables.input_block_tables)
    state.block_table_ptrs = runner.block_tables.input_block_table_ptrs


@pytest.mark.parametrize("share", [share_input_buffers, share_slot_mappings, share_block_tables])
def test_shared_buffers_are_noticed(roomy, beside_decodes, share):
    stock = roomy.run(beside_decodes, AsyncScheduler)
    assert all_equal(stock, serve(roomy, beside_decodes, "late", 3, mode="split"))
    states = roomy.runner.prefill_states
    own = [vars(state).copy() for state in states]
    for state in states:
        share(roomy.runner, state)
    try:
        assert noticed(roomy, stock, beside_decodes, 3)
    finally:
        for state, kept in zip(states, own, strict=True):
            vars(state).update(kept)


def test_buffers_shared_by_two_prefills_are_noticed(roomy, beside_decodes):
    stock = roomy.run(beside_decodes, AsyncScheduler)
    before = CountingScheduler.seen["launches behind a prefill"]
    assert all_equal(stock, serve(roomy, beside_decodes, "late", 6, mode="split"))
    assert CountingScheduler.seen["launches behind a prefill"] > before
    states = roomy.runner.prefill_states
    roomy.runner.prefill_states = [states[0]] * len(states)
    try:
        assert noticed(roomy, stock, beside_decodes, 6)
    finally:
        roomy.runner.prefill_states = states


def test_a_check_of_the_lanes_costs_no_token(roomy, beside_decodes, monkeypatch):
    """VLLM_DUET_CHECK=1 poisons buffers that nobody may read any more."""
    stock = roomy.run(beside_decodes, AsyncScheduler)
    monkeypatch.setattr(roomy.runner, "checks_lanes", True)
    before = CountingScheduler.seen["joins"]
    for timing in ("early", "late", "threaded"):
        assert all_equal(stock, serve(roomy, beside_decodes, timing, 3, mode="split"))
    assert CountingScheduler.seen["joins"] > before
    state = roomy.runner.prefill_states[0]
    assert state.slot_mappings.eq(-1).all() and not state.input_buffers.positions.any()


@pytest.mark.parametrize("name", ["input_ids", "seq_lens", "block table 0", "slot_mappings"])
def test_the_check_names_the_buffer_that_changed(roomy, name):
    state = roomy.runner.prefill_states[0]
    LaneCheck(state).verify(7)  # nothing has changed
    check = LaneCheck(state)
    state.tensors()[name].view(-1)[3] += 1
    with pytest.raises(RuntimeError, match=f"{name} of prefill 7 changed while it was in flight"):
        check.verify(7)


# Rule 3: on a GPU, decode steps beside a prefill are CUDA graphs.


class HasFewGraphs(CountingScheduler):
    """As if full CUDA graphs were captured for at most two decodes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._most_decodes = 2

    def schedule(self, throttle_prefills=False):
        output = super().schedule(throttle_prefills)
        if self._in_flight:
            self.seen["most decodes beside a prefill"] = max(
                self.seen["most decodes beside a prefill"], len(output.num_scheduled_tokens)
            )
        return output


def test_no_more_decodes_beside_a_prefill_than_there_are_graphs_for(roomy, beside_decodes):
    stock = roomy.run(beside_decodes, AsyncScheduler)
    CountingScheduler.seen["most decodes beside a prefill"] = 0
    assert all_equal(stock, serve(roomy, beside_decodes, "late", 3, HasFewGraphs, mode="split"))
    assert CountingScheduler.seen["most decodes beside a prefill"] == 2


# Rule 5: nobody reads prefix-cache blocks that a prefill in flight has yet to write.


class AdmitsBesidePrefill(DuetScheduler):
    """Lets newcomers in while a prefill is in flight."""

    def _schedule_beside(self, prefill):
        output = AsyncScheduler.schedule(self)
        self._step_times.scheduled(output, DECODE_LANE)
        join = Join.IF_DONE if output.total_num_scheduled_tokens else Join.WAIT
        output.duet = StepDirective(join=join)
        return output


@pytest.fixture
def same_prefix():
    rng = random.Random(2)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prefix = tokens(rng, 128)
    return [
        Arrival("decode", tokens(rng, 40), greedy),
        Arrival("first", prefix + tokens(rng, 9), greedy, step=4),
        Arrival("second", prefix + tokens(rng, 30), greedy, step=6),
    ]


def test_same_prefix_as_in_flight(roomy, same_prefix):
    stock = roomy.run(same_prefix, AsyncScheduler)
    assert all_equal(stock, serve(roomy, same_prefix, "late", 6, mode="split"))
    assert noticed(roomy, stock, same_prefix, 6, AdmitsBesidePrefill)


@pytest.mark.parametrize("engine", ["roomy", "few_rows"])
def test_reset_while_a_prefill_is_in_flight(request, engine, same_prefix):
    """All requests are computed anew, and nobody reads what was there before."""
    engine = request.getfixturevalue(engine)
    stock = engine.run(same_prefix, AsyncScheduler)
    resets = []

    def reset(step, scheduler):
        if len(resets) < 2 and scheduler._in_flight and scheduler._held:
            resets.append(engine.core.reset_prefix_cache(reset_running_requests=True))
            for cache in engine.runner.kv_caches:
                cache.uniform_(-3, 3)

    duet = serve(engine, same_prefix, "late", 6, on_step=reset, mode="split")
    assert resets and all(resets)
    assert all_equal(stock, duet)


# Streaming goes on: that is what the prefill is in flight for.


@pytest.mark.parametrize("timing", ["early", "late", "threaded"])
def test_decodes_stream_while_a_prefill_is_in_flight(roomy, beside_decodes, timing):
    hold_steps = 5
    answers = serve(roomy, beside_decodes, timing, hold_steps, mode="split")
    streaming = set(answers["r0"].token_steps)
    launched = beside_decodes[2].step
    first_token = answers["r2"].token_steps[0]
    assert first_token - launched > hold_steps
    assert streaming.issuperset(range(launched, first_token))
