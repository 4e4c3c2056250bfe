# SPDX-License-Identifier: Apache-2.0
"""The engine loop around the real schedulers: times by formula, and what every system keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sim.harness import (
    MODEL,
    NO_COSTS,
    QUIET,
    Simulated,
    free_blocks,
    gaps,
    ground_truth,
    of_lane,
    roofline,
    simulation,
    token_times,
)

from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import AGGREGATED_STEP, DECODE_LANE, PREFILL_LANE, ForecastPolicy
from vllm_duet.sim.engine import CpuCosts, FrontEnd, RequestRecord
from vllm_duet.sim.executor import Disturbances, Interval
from vllm_duet.sim.simulation import BLOCK_SIZE, Options, Outcome, Simulation, SimulationError
from vllm_duet.sim.systems import SYSTEMS
from vllm_duet.sim.traces import TraceRequest, synthetic, with_prefixes

BUDGET = 512
ONE_GPU = [name for name in SYSTEMS if name != "disaggregated"]
REALISTIC = dict(
    disturbances=Disturbances(), costs=CpuCosts(), max_num_batched_tokens=1024, tbt_slo_ms=20.0
)
"""Under these duet aggregates, caps and splits the steps of ``mixed_trace``."""
KINDS = (AGGREGATED_STEP, DECODE_LANE, PREFILL_LANE)


def approx(times: Any) -> Any:
    return pytest.approx(times, rel=1e-9, abs=1e-6)


def prefill_ms(length: int, cached: int = 0, budget: int = BUDGET) -> float:
    """A prompt that has the GPU to itself, in chunks of ``budget``."""
    truth = ground_truth()
    starts = range(cached, length, budget)
    return sum(truth.step_ms([], [min(budget, length - at)], [at]) for at in starts)


def decode_ms(*contexts: int) -> float:
    truth = ground_truth()
    return truth.lane_ms(truth.decode(contexts), truth.num_sms)


def mixed_trace(count: int = 24, seed: int = 5) -> list[TraceRequest]:
    """Prompts of which a third share their first blocks, at a rate that queues them up."""
    trace = synthetic(count, 20.0, 900, 40, seed, spread=0.9)
    return [replace(r, hash_ids=(7, 8)) if n % 3 == 0 else r for n, r in enumerate(trace)]


# Times by formula


@pytest.mark.parametrize("scheduler", ONE_GPU)
def test_a_lone_request(scheduler: str) -> None:
    # No whole number of chunks; the second arrives when the first is long gone.
    trace = [TraceRequest(0.0, 1300, 20), TraceRequest(1e4, 70, 3)]
    outcome = simulation(scheduler).run(trace)
    for request, record in zip(trace, outcome.records, strict=True):
        assert record.token_ms[0] - request.arrival_ms == approx(prefill_ms(request.input_length))
        contexts = range(request.input_length, request.input_length + request.output_length - 1)
        assert gaps(record) == approx([decode_ms(context) for context in contexts])
    tokens = [(i.mode, i.decodes, i.prefill_tokens) for i in outcome.intervals]
    chunks = [("prefill_only", 0, n) for n in (512, 512, 276)]
    assert tokens[:23] == [*chunks, *[("decode_only", 1, 0)] * 19, ("prefill_only", 0, 70)]


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("scheduler", ["stock", "duet", "fixed-split"])
def test_decodes_of_one_batch(scheduler: str, batch: int) -> None:
    outcome = simulation(scheduler).run([TraceRequest(0.0, 60, 30)] * batch)
    truth = ground_truth()
    first_ms = truth.step_ms([], [60] * batch, [0] * batch)
    graph = {3: 4, 8: 8}[batch]
    padded = [replace(truth.decode([c] * batch).summary, decode_tokens=graph) for c in (60, 88)]
    for record in outcome.records:
        assert record.token_ms[0] == approx(first_ms)
        assert gaps(record) == approx([decode_ms(*[60 + n] * batch) for n in range(29)])
        for gap, summary in zip((gaps(record)[0], gaps(record)[28]), padded, strict=True):
            assert gap == approx(roofline().step_ms(summary, truth.num_sms))


def packed(lengths: Sequence[int], budget: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts in chunks, first come first served: (query lengths, contexts, who ends)."""
    steps, left, room = [([], [], [])], list(lengths), budget
    for i in range(len(lengths)):
        while left[i]:
            if not room:
                steps.append(([], [], []))
                room = budget
            taken = min(left[i], room)
            queries, contexts, ended = steps[-1]
            queries.append(taken)
            contexts.append(lengths[i] - left[i])
            left[i] -= taken
            room -= taken
            if not left[i]:
                ended.append(i)
    return steps


# A prompt that has just been computed is a decode to vLLM, and the next one waits for its turn.
@pytest.mark.parametrize("scheduler", [name for name in ONE_GPU if name != "prefill-interval"])
def test_prefill_alone(scheduler: str) -> None:
    lengths = [100, 700, 30, 512, 1, 2000, 411]
    outcome = simulation(scheduler).run([TraceRequest(0.0, n, 1) for n in lengths])
    now = 0.0
    for queries, contexts, ended in packed(lengths, BUDGET):
        now += ground_truth().step_ms([], queries, contexts)
        for i in ended:
            assert outcome.records[i].token_ms == approx([now])
    assert len(outcome.intervals) == len(packed(lengths, BUDGET))


@pytest.mark.parametrize("scheduler", ["stock", "duet"])
def test_a_prompt_that_is_in_the_cache_costs_the_rest_of_it(scheduler: str) -> None:
    trace = [
        TraceRequest(0.0, 1100, 2, (5, 6)),
        TraceRequest(1e4, 1100, 2, (5, 6)),
        TraceRequest(2e4, 1100, 2, (5, 7)),
        TraceRequest(3e4, 1100, 2),
    ]
    records = simulation(scheduler).run(trace).records
    cached = [0, 1024, 512, 0]
    assert [r.token_ms[0] - r.arrival_ms for r in records] == approx(
        [prefill_ms(1100, tokens) for tokens in cached]
    )


def test_a_newcomer_waits_for_the_steps_that_are_queued() -> None:
    """Under asynchronous scheduling one runs and one is queued."""
    sim = simulation("stock")
    alone = sim.run([TraceRequest(0.0, 400, 12)]).records[0].token_ms
    arrival = (alone[2] + alone[3]) / 2
    first, second = sim.run([TraceRequest(0.0, 400, 12), TraceRequest(arrival, 300, 2)]).records
    assert first.token_ms[:5] == alone[:5]
    mixed_ms = ground_truth().step_ms([404], [300], [0])
    assert second.token_ms[0] == first.token_ms[5] == approx(alone[4] + mixed_ms)
    next_ms = decode_ms(405, 300)
    assert second.token_ms[1] == first.token_ms[6] == approx(first.token_ms[5] + next_ms)


def test_cpu_costs_hide_behind_the_gpu_or_bound_the_step() -> None:
    trace = [TraceRequest(0.0, 60, 20)] * 4
    fast = CpuCosts(0.1, 0.1, 0.2, 0.1, 0.4)
    (record, *_), step_ms = simulation("stock", costs=fast).run(trace).records, decode_ms(*[60] * 4)
    first_ms = ground_truth().step_ms([], [60] * 4, [0] * 4)
    # Schedule and launch before the first step, and process its output after it.
    assert record.token_ms[0] == approx(0.1 + 4 * 0.1 + 0.4 + first_ms + 0.2 + 4 * 0.1)
    assert step_ms > 0.1 + 4 * 0.1 + 0.2 + 4 * 0.1 + 0.4
    assert gaps(record) == approx([decode_ms(*[60 + n] * 4) for n in range(19)])
    slow = CpuCosts(20.0, 10.0, 5.0, 2.5, 0.0)
    (record, *_) = simulation("stock", costs=slow).run(trace).records
    assert gaps(record)[1:-1] == approx([20 + 4 * 10 + 5 + 4 * 2.5] * 17)


def test_without_asynchronous_scheduling_the_gpu_waits_for_the_cpu() -> None:
    costs = CpuCosts(2.0, 0.5, 1.0, 0.25, launch_ms=0.125)
    trace, contexts = [TraceRequest(0.0, 60, 20)] * 2, range(60, 79)
    waiting = simulation("stock", costs=costs, async_scheduling=False).run(trace)
    cpu_ms = 2.0 + 1.0 + 0.125 + 1.0 + 0.5
    for record in waiting.records:
        assert gaps(record) == approx([decode_ms(c, c) + cpu_ms for c in contexts])
    with pytest.raises(SimulationError, match="asynchronous"):
        simulation("duet", async_scheduling=False)


# Clients and the front end


@pytest.mark.parametrize("scheduler", ["stock", "duet"])
@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_a_client_sends_its_next_request_when_it_has_its_answer(
    scheduler: str, concurrency: int
) -> None:
    trace = mixed_trace()
    records = simulation(scheduler, concurrency=concurrency, **REALISTIC).run(trace).records
    clients = min(concurrency, len(trace))
    assert [r.arrival_ms for r in records[:clients]] == [0.0] * clients
    answers = sorted(record.token_ms[-1] for record in records)
    # The n-th to be sent after the first is sent at the n-th answer.
    assert [r.arrival_ms for r in records[clients:]] == answers[: len(trace) - clients]
    assert [len(r.token_ms) for r in records] == [r.output_length for r in trace]


def test_a_closed_loop_takes_no_notice_of_the_traces_arrivals() -> None:
    trace = mixed_trace()
    late = [replace(r, arrival_ms=1e6 * n) for n, r in enumerate(trace)]
    runs = [simulation("stock", concurrency=4).run(t).records for t in (trace, late)]
    assert token_times(runs[0]) == token_times(runs[1])
    with pytest.raises(SimulationError, match="closed loop"):
        simulation("disaggregated", concurrency=4)


def test_the_front_end_takes_one_prompt_after_the_other() -> None:
    # Three at once, and one when the front end has long been free.
    trace = [
        TraceRequest(at, length, 2) for at, length in ((0, 400), (0, 100), (1, 200), (5e3, 400))
    ]
    front_end = FrontEnd(request_ms=200.0, token_us=1000.0)
    records = simulation("stock", front_end=front_end).run(trace).records
    reached = [600.0, 600 + 300.0, 600 + 300 + 400.0, 5e3 + 600]
    for record, at_ms in zip(records, reached, strict=True):
        assert record.token_ms[0] == approx(at_ms + prefill_ms(record.input_length))
    assert [r.arrival_ms for r in records] == [r.arrival_ms for r in trace]


def test_a_prefix_that_others_had_is_in_the_cache() -> None:
    prefix = 40 * BLOCK_SIZE
    trace = [TraceRequest(1e4 * n, 100, 2) for n in range(12)]
    trace = with_prefixes(trace, prefix, 2, seed=0)
    records = simulation("stock").run(trace).records
    seen = set()
    for request, record in zip(trace, records, strict=True):
        cached = prefix if request.prefix in seen else 0
        assert record.token_ms[0] - record.arrival_ms == approx(prefill_ms(prefix + 100, cached))
        seen.add(request.prefix)
    assert seen == {0, 1}
    cold = simulation("stock", enable_prefix_caching=False).run(trace).records
    for record in cold:
        assert record.token_ms[0] - record.arrival_ms == approx(prefill_ms(prefix + 100))


# What every system keeps


def check_served(sim: Simulated, trace: Sequence[TraceRequest], outcome: Outcome) -> None:
    """Every request is served whole and in time, and nothing of it is left behind."""
    assert [(r.arrival_ms, r.input_length, r.output_length) for r in outcome.records] == [
        (r.arrival_ms, r.input_length, r.output_length) for r in trace
    ]
    for record in outcome.records:
        assert len(record.token_ms) == record.output_length
        assert record.token_ms[0] >= record.arrival_ms
        assert all(gap >= 0 for gap in gaps(record))
    for started in sim.started:
        scheduler = started.engine.scheduler
        assert not scheduler.has_requests() and not scheduler.requests
        assert free_blocks(started.engine) == started.free_blocks


def check_lanes(outcome: Outcome) -> None:
    """A lane does one thing at a time, and beside a step of the whole GPU none does any."""
    for interval in outcome.intervals:
        assert interval.end_ms >= interval.start_ms
    in_order = sorted(outcome.intervals, key=lambda i: (i.start_ms, i.end_ms))
    for lane in ("gpu", "decode", "prefill"):
        check_apart(of_lane(in_order, lane))
    if outcome.num_gpus == 1:
        for lane in ("decode", "prefill"):
            check_apart([i for i in in_order if i.lane in ("gpu", lane)])


def check_apart(in_order: Sequence[Interval]) -> None:
    for before, after in pairwise(in_order):
        assert after.start_ms >= before.end_ms - 1e-6, (before, after)


@pytest.mark.parametrize("scheduler", SYSTEMS)
def test_every_request_is_served_while_the_kv_cache_runs_out(scheduler: str) -> None:
    trace, finished = mixed_trace(), []
    sim = simulation(scheduler, kv_cache_tokens=3072, **REALISTIC)
    outcome = sim.run(trace, finished.append)
    check_served(sim, trace, outcome)
    check_lanes(outcome)
    assert outcome.preemptions > 0
    assert sorted(map(id, finished)) == sorted(map(id, outcome.records))


@cache
def small(scheduler: str) -> Simulated:
    return simulation(scheduler, kv_cache_tokens=2048, **REALISTIC)


# A failing trace is short as it is: to make it shorter takes minutes.
@settings(max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    scheduler=st.sampled_from(list(SYSTEMS)),
    trace=st.lists(
        st.builds(
            TraceRequest,
            st.floats(0, 300),
            st.integers(1, 1800),
            st.integers(1, 60),
            st.sampled_from([(), (1,), (1, 2), (3,)]),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_any_trace_is_served(scheduler: str, trace: list[TraceRequest]) -> None:
    trace.sort(key=lambda r: r.arrival_ms)
    sim = small(scheduler)
    sim.started.clear()
    outcome = sim.run(trace)
    check_served(sim, trace, outcome)
    check_lanes(outcome)


@pytest.mark.parametrize("scheduler", ONE_GPU)
def test_every_token_is_computed_once(scheduler: str) -> None:
    trace = synthetic(20, 10.0, 900, 30, seed=2)
    outcome = simulation(scheduler, tbt_slo_ms=30.0).run(trace)
    assert outcome.preemptions == 0
    assert sum(i.prefill_tokens for i in outcome.intervals) == sum(r.input_length for r in trace)
    decodes = sum(i.decodes for i in outcome.intervals)
    assert decodes == sum(r.output_length - 1 for r in trace)


def test_the_systems_decide_differently() -> None:
    """Else the tests above would test stock vLLM alone."""
    trace = synthetic(20, 20.0, 1500, 30, seed=2)
    options = dict(tbt_slo_ms=10.0, max_num_batched_tokens=2048)
    steps = {name: simulation(name, **options).run(trace).steps_by_mode for name in SYSTEMS}
    assert steps.pop("stock") == steps.pop("disaggregated") == {}
    for name in ("duet", "paper", "fixed-split", "duet-join-after-k", "duet-no-caps"):
        assert steps[name]["split"] > 0, name
    assert steps["duet-no-splits"]["split"] == 0
    assert steps["duet-no-splits"]["capped"] > 0
    assert steps["duet-no-caps"]["capped"] == steps["paper"]["capped"] == 0


def test_what_is_left_of_a_split_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two prompts to be split the KV cache takes one, which a policy would rather cut. For that
    it is too late, and whole it could break the bound."""

    def decide(
        self: Any, decodes: Any, queries: list[int], contexts: Any, can_cap: bool = True, **_: Any
    ) -> DuetPlan:
        if len(queries) > 1 or not can_cap:
            return DuetPlan(Mode.SPLIT, "", 48, 84, prefill_ms=80.0, tbt_ms=10.0)
        return DuetPlan(Mode.CAPPED, "", max_prefill_tokens=256, tbt_ms=12.0)

    sim = simulation("duet", kv_cache_tokens=8000, max_num_batched_tokens=8192)
    monkeypatch.setattr(ForecastPolicy, "decide", decide)
    trace = [
        TraceRequest(0.0, 300, 400),
        TraceRequest(900.0, 4000, 8),
        TraceRequest(900.0, 4000, 8),
    ]
    outcome = sim.run(trace)
    launched = [lane.prefill_tokens for lane in of_lane(outcome.intervals, "prefill")]
    whole = [step.prefill_tokens for step in outcome.intervals if step.mode == "mixed"]
    assert launched == [4000] and max(whole) <= 256
    assert outcome.steps_by_mode["split"] > 0


def test_the_longest_request_that_is_not_rejected_is_served() -> None:
    sim = Simulation(Options(MODEL, scheduler="stock", disturbances=QUIET, costs=NO_COSTS))
    sim.kv_cache_tokens = sim.max_model_len = 64 * BLOCK_SIZE
    longest = sim.kv_cache_tokens - BLOCK_SIZE
    trace = [TraceRequest(0.0, longest - 24, 24), TraceRequest(0.0, longest - 23, 24)]
    outcome = sim.run(trace)
    assert [len(record.token_ms) for record in outcome.records] == [24]
    assert outcome.rejected == 1


# Determinism


@pytest.mark.parametrize("scheduler", ["stock", "duet", "paper", "disaggregated"])
def test_a_seed_decides_every_time(scheduler: str) -> None:
    def run(seed: int) -> Outcome:
        return simulation(scheduler, seed=seed, **REALISTIC).run(mixed_trace())

    one, same, other = run(1), run(1), run(2)
    assert token_times(one.records) == token_times(same.records)
    assert one.intervals == same.intervals
    assert all(a.token_ms != b.token_ms for a, b in zip(one.records, other.records, strict=True))


def test_a_simulation_starts_every_run_afresh() -> None:
    sim = simulation("duet", **REALISTIC)
    first, second = sim.run(mixed_trace()), sim.run(mixed_trace())
    assert token_times(first.records) == token_times(second.records)


def test_a_slow_process_decides_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections come from virtual time; by the wall clock steps would take 2 ms more."""
    trace = mixed_trace()
    sim = simulation("duet", **REALISTIC)
    fast = sim.run(trace)
    scheduler_cls = type(sim.started[0].engine.scheduler)
    schedule = scheduler_cls.schedule

    def slow_schedule(*args: Any) -> Any:
        time.sleep(0.002)
        return schedule(*args)

    monkeypatch.setattr(scheduler_cls, "schedule", slow_schedule)
    slow = sim.run(trace)
    assert slow.intervals == fast.intervals and slow.steps_by_mode == fast.steps_by_mode
    learned, again = (
        [started.engine.scheduler._step_times.correction.factor(kind) for kind in KINDS]
        for started in sim.started
    )
    assert learned == again != [1.0] * len(KINDS)


def test_forecasts_come_true_where_nothing_disturbs_them() -> None:
    """The correction finds nothing to correct, so it compares the right times.

    But for steps in which a decode turned out to have ended: they are 1 % shorter.
    """
    undisturbed = Disturbances(0.0, interference=1.0, shared=0.0, group_loss=0.0, launch_us=0.0)
    sim = simulation("duet-no-splits", disturbances=undisturbed, tbt_slo_ms=20.0)
    sim.run(synthetic(30, 10.0, 900, 30, seed=2))
    correction = sim.started[0].engine.scheduler._step_times.correction
    # Eight of them, or the factor would be 1 whatever was seen.
    assert correction._kinds[AGGREGATED_STEP].count > 8
    assert correction.factor(AGGREGATED_STEP) == pytest.approx(1.0, abs=2e-3)


def test_a_wrong_model_misleads_duet_and_not_stock() -> None:
    def intervals(scheduler: str, error: float) -> list[Interval]:
        sim = simulation(scheduler, model_error=error, **REALISTIC)
        return sim.run(mixed_trace()).intervals

    assert intervals("duet", 0.5) != intervals("duet", 0.0)
    assert intervals("stock", 0.5) == intervals("stock", 0.0)


# Systems that take a number


def test_a_fixed_split_of_so_many_sms() -> None:
    outcome = simulation("fixed-split:48").run(mixed_trace())
    assert {i.sms for i in of_lane(outcome.intervals, "decode")} == {48}
    assert {i.sms for i in of_lane(outcome.intervals, "prefill")} == {132 - 48}
    with pytest.raises(ValueError, match="decode_sms must be multiples of 8"):
        simulation("fixed-split:47").run(mixed_trace())


def test_a_cap_on_prefill_beside_decodes() -> None:
    trace = [TraceRequest(0.0, 700, 300), TraceRequest(100.0, 2000, 2)]
    outcome = simulation("prefill-cap:128").run(trace)
    beside = [i.prefill_tokens for i in outcome.intervals if i.decodes and i.prefill_tokens]
    alone = [i.prefill_tokens for i in outcome.intervals if not i.decodes]
    assert beside == [128] * 15 + [80] and max(alone) == BUDGET


def test_prefill_at_intervals() -> None:
    outcome = simulation("prefill-interval:3").run(mixed_trace())
    mixed = [n for n, i in enumerate(outcome.intervals) if i.decodes and i.prefill_tokens]
    assert len(mixed) > 10
    assert min(b - a for a, b in pairwise(mixed)) == 3
    stock = simulation("stock").run(mixed_trace()).intervals
    assert any(i.decodes and i.prefill_tokens for i in stock[mixed[0] + 1 : mixed[0] + 3])


# Disaggregated


def disaggregated(trace: Sequence[TraceRequest]) -> list[RequestRecord]:
    outcome = simulation("disaggregated").run(trace)
    assert outcome.num_gpus == 2
    return outcome.records


def link_ms(tokens: int) -> float:
    """Keys and values of 8 heads of 128 in 16 bits, in each of 36 layers, at 450 GB/s."""
    return 1e3 * tokens * (2 * 8 * 128 * 2 * 36) / 4.5e11


def test_disaggregated_tokens_all_come_from_the_decode_side() -> None:
    """Prefill as stock's, the link, a decode step over the prompt's last token."""
    trace = [TraceRequest(0.0, 1300, 4)]
    (record,), (stock,) = disaggregated(trace), simulation("stock").run(trace).records
    assert record.token_ms[0] == approx(stock.token_ms[0] + link_ms(1300) + decode_ms(1299))
    assert gaps(record) == approx(gaps(stock))


def test_a_request_of_one_token_travels_too() -> None:
    trace = [TraceRequest(0.0, 1300, 1)]
    (record,), (stock,) = disaggregated(trace), simulation("stock").run(trace).records
    assert record.token_ms == approx([stock.token_ms[0] + link_ms(1300) + decode_ms(1299)])


def test_the_link_carries_one_prompt_after_another() -> None:
    """Two prompts of one prefill step are ready at once."""
    trace = [TraceRequest(0.0, 200, 1)] * 2
    first, second = disaggregated(trace)
    ready_ms = ground_truth().step_ms([], [200, 200], [0, 0])
    assert first.token_ms == approx([ready_ms + link_ms(200) + decode_ms(199)])
    step_ms = decode_ms(199)
    assert second.token_ms == approx([max(first.token_ms[0], ready_ms + link_ms(400)) + step_ms])


def test_waiting_for_room_on_the_decode_side_is_ttft() -> None:
    """Its KV cache holds one of the two requests at a time."""
    trace = [TraceRequest(0.0, 900, 500)] * 2
    outcome = simulation("disaggregated", kv_cache_tokens=1504).run(trace)
    first, second = outcome.records
    assert outcome.preemptions == 0
    assert second.token_ms[0] > first.token_ms[-1]
    # After its first token it never waits again.
    assert max(gaps(second)) < 2 * decode_ms(1400)


LONG_PROMPTS_MEET_A_DECODE = [
    TraceRequest(0.0, 100, 150),
    *(TraceRequest(100.0 + 80 * n, 4000, 3) for n in range(5)),
]


def test_disaggregated_decodes_never_wait_for_a_prefill() -> None:
    longest_decode_ms = decode_ms(*[4100] * 6)
    chunk_ms = ground_truth().step_ms([100], [BUDGET - 1], [0])
    assert longest_decode_ms < 0.7 * chunk_ms
    (stock, *_) = simulation("stock").run(LONG_PROMPTS_MEET_A_DECODE).records
    assert max(gaps(stock)) > 0.99 * chunk_ms
    (record, *_) = disaggregated(LONG_PROMPTS_MEET_A_DECODE)
    assert max(gaps(record)) <= longest_decode_ms


def test_a_prompt_that_has_travelled_decodes_at_once() -> None:
    records = disaggregated(LONG_PROMPTS_MEET_A_DECODE)
    assert max(max(gaps(record)) for record in records[1:]) <= decode_ms(*[4100] * 6)


def test_disaggregated_reports_requests_of_one_token() -> None:
    finished: list[RequestRecord] = []
    trace = [TraceRequest(0.0, 100, 1), TraceRequest(0.0, 100, 2)]
    outcome = simulation("disaggregated").run(trace, finished.append)
    assert len(finished) == len(outcome.records)


# Options


def test_requests_that_are_too_long_are_counted() -> None:
    sim = simulation("stock", max_model_len=1000)
    lengths = [(900, 100), (901, 100), (10, 5), (2000, 1)]
    outcome = sim.run([TraceRequest(0.0, *pair) for pair in lengths])
    assert outcome.rejected == 2
    assert [(r.input_length, r.output_length) for r in outcome.records] == [(900, 100), (10, 5)]
    assert [len(r.token_ms) for r in outcome.records] == [100, 5]
    with pytest.raises(SimulationError, match="longer than 1000"):
        sim.run([TraceRequest(0.0, 1000, 1)])


def test_a_model_that_does_not_fit_names_it_and_the_gpu(tmp_path: Path) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    config |= {name: 4 * config[name] for name in ("hidden_size", "intermediate_size")}
    path = tmp_path / "large.json"
    path.write_text(json.dumps(config))
    with pytest.raises(SimulationError, match=r"Qwen3ForCausalLM does not fit l40s"):
        Simulation(Options(path, gpu="l40s"))


@pytest.mark.parametrize("name", ["dynamo", "stock:3", "fixed-split:", "prefill-cap:0"])
def test_an_unknown_scheduler_names_those_there_are(name: str) -> None:
    with pytest.raises(SimulationError, match=f"'{name}'") as raised:
        Simulation(Options(MODEL, scheduler=name))
    assert all(name in str(raised.value) for name in SYSTEMS)


def test_the_kv_cache_is_what_the_weights_leave() -> None:
    roomy, cramped = (
        Simulation(Options(MODEL, gpu=gpu)).kv_cache_tokens for gpu in ("h200", "l40s")
    )
    kv_bytes = 2 * 8 * 128 * 2 * 36
    weight_bytes = 2 * 8.19e9
    for tokens, memory_bytes in ((roomy, 141e9), (cramped, 48e9)):
        assert tokens % BLOCK_SIZE == 0
        assert tokens * kv_bytes < memory_bytes - weight_bytes
        # What is left beside weights and cache: vLLM's reserve, activations, logits.
        assert tokens * kv_bytes > 0.75 * memory_bytes - weight_bytes


def test_ranks_hold_the_kv_cache_together() -> None:
    one, two = (
        Simulation(Options(MODEL, tensor_parallel_size=ranks)).kv_cache_tokens for ranks in (1, 2)
    )
    # Twice the memory, and the weights once.
    assert 2 * one < two < 3 * one
    fp8 = Simulation(Options(MODEL, kv_dtype="fp8")).kv_cache_tokens
    assert fp8 == pytest.approx(2 * one, rel=1e-3)
