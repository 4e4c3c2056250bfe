# SPDX-License-Identifier: Apache-2.0
"""The simulated GPU against arithmetic over the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim.harness import QUIET, beside, ground_truth, launch, of_lane, roofline, step, wait

from vllm_duet.roofline import Batch
from vllm_duet.sim.executor import Disturbances, Interval, Ran, SimulatedGpu

NUM_SMS = 132
NOTHING = Disturbances(
    noise=0.0, interference=1.0, shared=0.0, group_loss=0.0, launch_us=0.0, piecewise_tokens=0
)
DECODES = [4000] * 16


def simulated(disturbances: Disturbances = QUIET, seed: int = 0) -> SimulatedGpu:
    return SimulatedGpu(ground_truth(disturbances), seed)


def lane_times(
    decodes: Sequence[int], prefills: Sequence[tuple[int, int]], decode_sms: int
) -> tuple[float, float, float, float]:
    """Decode step and prefill, each alone on its lane, then each beside the other."""
    truth = ground_truth()
    decode = truth.decode(decodes)
    prefill = truth.prefill([q for q, _ in prefills], [c for _, c in prefills])
    prefill_sms = NUM_SMS - decode_sms
    return (
        truth.lane_ms(decode, decode_sms),
        truth.lane_ms(prefill, prefill_sms),
        *truth.pair_ms(decode, prefill, decode_sms, prefill_sms),
    )


# Ground truth


@pytest.mark.parametrize(
    ("decodes", "padded"),
    [(1, 1), (3, 4), (5, 8), (8, 8), (9, 16), (249, 256), (257, 272), (512, 512), (513, 513)],
)
def test_a_decode_batch_is_padded_to_its_graph(decodes: int, padded: int) -> None:
    truth, contexts = ground_truth(), [1000] * decodes
    actual = roofline().decode_summary(contexts)
    work = truth.decode(contexts)
    # Padding is rows of the GEMMs, not KV cache that is read.
    assert astuple(work.summary) == astuple(replace(actual, decode_tokens=padded))
    assert truth.step_ms(contexts, [], []) == roofline().step_ms(work.summary, NUM_SMS)
    assert truth.lane_ms(work, 32) >= roofline().step_ms(actual, 32) * (1 + QUIET.group_loss)


def test_a_step_with_prefill_is_not_padded() -> None:
    decodes, queries, contexts = [700, 900, 50], [600, 333], [0, 512]
    batch = Batch([1] * len(decodes) + queries, decodes + contexts)
    expected = roofline().predict(batch, NUM_SMS).ms
    assert ground_truth().step_ms(decodes, queries, contexts) == pytest.approx(expected)


batches = st.builds(
    lambda decodes, prefills, sms: (decodes, prefills, sms),
    st.lists(st.integers(1, 8000), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(2, 4000), st.integers(0, 8000)), min_size=1, max_size=3),
    st.integers(1, 15).map(lambda n: 8 * n),
)


@given(batch=batches)
def test_without_disturbances_lanes_are_the_rooflines(batch: Any) -> None:
    decodes, prefills, sms = batch
    truth = ground_truth(NOTHING)
    decode = truth.decode(decodes)
    prefill = truth.prefill([q for q, _ in prefills], [c for _, c in prefills])
    assert truth.lane_ms(decode, sms) == roofline().step_ms(decode.summary, sms)
    assert truth.pair_ms(decode, prefill, sms, NUM_SMS - sms) == pytest.approx(
        roofline().pair_ms(decode.summary, prefill.summary, sms, NUM_SMS - sms)
    )


@given(batch=batches)
def test_a_lane_is_slower_beside_another_and_in_a_group(batch: Any) -> None:
    decodes, prefills, sms = batch
    truth, d = ground_truth(), QUIET
    decode_alone, prefill_alone, decode_beside, prefill_beside = lane_times(decodes, prefills, sms)
    assert decode_alone < decode_beside and prefill_alone < prefill_beside
    work = truth.decode(decodes)
    summary = work.summary
    assert truth.lane_ms(work, NUM_SMS) == roofline().step_ms(summary, NUM_SMS)
    alone_ms = roofline().step_ms(summary, sms)
    assert decode_alone == pytest.approx(alone_ms * (1 + d.group_loss))
    # What the bus takes is multiplied, and what lanes lose anyway is added.
    prefill = truth.prefill([q for q, _ in prefills], [c for _, c in prefills])
    bus_ms = (
        roofline().pair_ms(
            decode=summary, prefill=prefill.summary, decode_sms=sms, prefill_sms=NUM_SMS - sms
        )[0]
        - alone_ms
    )
    expected = (alone_ms + d.shared * alone_ms + d.interference * bus_ms) * (1 + d.group_loss)
    assert decode_beside == pytest.approx(expected)


def test_the_cpus_launches_are_a_floor() -> None:
    # 36 layers of norms, QKV, its norm, rotary embedding, KV write, attention, output
    # projection, two MLP GEMMs and an activation; see operators.py for what is one.
    slow_us = 1000.0
    slow = ground_truth(replace(QUIET, launch_us=slow_us, piecewise_tokens=256))
    eager_ms, piecewise_ms = slow.launch_ms(257), slow.launch_ms(256)
    assert piecewise_ms == pytest.approx(2 * 36 * 1e-3 * slow_us)
    assert 36 * 10 < eager_ms / (1e-3 * slow_us) < 36 * 20
    quick = ground_truth(QUIET)
    for decodes, query, floor_ms in (
        ([], 256, piecewise_ms),
        ([], 257, eager_ms),
        # All the tokens of the step count.
        ([100], 255, piecewise_ms),
        ([100], 256, eager_ms),
    ):
        assert quick.step_ms(decodes, [query], [0]) < floor_ms
        assert slow.step_ms(decodes, [query], [0]) == floor_ms
    # A long prefill hides its launches, and a decode step is one graph.
    assert slow.step_ms([], [16000], [0]) == quick.step_ms([], [16000], [0]) > eager_ms
    assert slow.step_ms([100], [], []) == quick.step_ms([100], [], [])


# Whole steps


def test_steps_queue_behind_each_other() -> None:
    gpu, truth = simulated(), ground_truth()
    mixed_ms = truth.step_ms([900], [300], [0])
    decode_ms = truth.step_ms([901, 300], [], [])
    assert gpu.run(step([900], [(300, 0)]), 10.0) == Ran(pytest.approx(10 + mixed_ms))
    assert gpu.run(step([901, 300]), 11.0).end_ms == pytest.approx(10 + mixed_ms + decode_ms)
    # Idle until there is a step again.
    prefill_ms = truth.step_ms([], [40, 500], [512, 0])
    assert gpu.run(step(prefills=[(40, 512), (500, 0)]), 1e3).end_ms == pytest.approx(
        1e3 + prefill_ms
    )
    assert gpu.intervals == [
        Interval("gpu", "mixed", 10, pytest.approx(10 + mixed_ms), 1, 300, NUM_SMS),
        Interval(
            "gpu",
            "decode_only",
            pytest.approx(10 + mixed_ms),
            pytest.approx(10 + mixed_ms + decode_ms),
            2,
            0,
            NUM_SMS,
        ),
        Interval("gpu", "prefill_only", 1e3, pytest.approx(1e3 + prefill_ms), 0, 540, NUM_SMS),
    ]


def test_an_empty_step_takes_no_time() -> None:
    gpu = simulated()
    assert gpu.run(step(), 5.0) == Ran(5.0)
    end_ms = gpu.run(step([100]), 5.0).end_ms
    assert gpu.run(step(), 5.0) == Ran(end_ms)
    assert len(gpu.intervals) == 1


# Splits


def test_a_prefill_that_ends_inside_a_decode_step() -> None:
    # A large decode batch on few SMs, a small prompt on all others.
    decodes, prefills, sms = [6000] * 64, [(64, 0)], 16
    decode_ms, _, decode_beside_ms, prefill_beside_ms = lane_times(decodes, prefills, sms)
    assert prefill_beside_ms < decode_beside_ms / 2
    gpu = simulated()
    ran = gpu.run(launch(decodes, prefills, sms), 7.0)
    share = prefill_beside_ms / decode_beside_ms
    end_ms = 7 + prefill_beside_ms + (1 - share) * decode_ms
    assert ran.end_ms == pytest.approx(end_ms)
    assert ran.joined is None and ran.launch_cpu_ms == ground_truth().launch_ms(64)
    # The next step has the lane to itself, and takes the prefill along.
    ran = gpu.run(beside(decodes, sms), 0.0)
    assert ran.end_ms == pytest.approx(end_ms + decode_ms)
    assert ran.joined is not None and ran.joined.output.num_scheduled_tokens == {"p0": 64}
    (prefill,) = of_lane(gpu.intervals, "prefill")
    assert (prefill.start_ms, prefill.end_ms) == (7, pytest.approx(7 + prefill_beside_ms))
    assert (prefill.prefill_tokens, prefill.sms, prefill.mode) == (64, NUM_SMS - sms, "split")
    # It joins once.
    assert gpu.run(beside(decodes, sms), 0.0).joined is None


@given(
    starts=st.lists(st.floats(0, 30), min_size=1, max_size=12),
    tokens=st.integers(200, 6000),
    sms=st.sampled_from([16, 32, 64]),
)
def test_the_work_of_a_prefill_adds_up(starts: list[float], tokens: float, sms: int) -> None:
    """Its progress, in decode steps and in the pauses between them, is one prefill."""
    gpu, prefills, contexts = simulated(), [(tokens, 0)], DECODES
    ran = gpu.run(launch(contexts, prefills, sms), 0.0)
    joined_at = None
    for pause in starts:
        contexts = [c + 1 for c in contexts]
        ran = gpu.run(beside(contexts, sms), ran.end_ms + pause)
        if ran.joined is not None:
            joined_at = ran.end_ms
            break
    if joined_at is None:
        ran = gpu.run(wait(sms), ran.end_ms)
        assert ran.joined is not None
    (prefill,) = of_lane(gpu.intervals, "prefill")
    decode_steps = of_lane(gpu.intervals, "decode")
    done, now = 0.0, 0.0
    for n, decode in enumerate(decode_steps):
        _, alone_ms, _, beside_ms = lane_times([c + n for c in DECODES], prefills, sms)
        done += max(0.0, min(decode.start_ms, prefill.end_ms) - now) / alone_ms
        done += max(0.0, min(decode.end_ms, prefill.end_ms) - decode.start_ms) / beside_ms
        now = decode.end_ms
    done += max(0.0, prefill.end_ms - now) / alone_ms
    assert done == pytest.approx(1.0)
    if joined_at is not None:
        # By the first step that found it done, if that did not launch it.
        assert prefill.end_ms <= joined_at
        assert len(decode_steps) == 2 or prefill.end_ms > decode_steps[-2].end_ms
    else:
        assert ran.end_ms == max(prefill.end_ms, decode_steps[-1].end_ms)


@given(
    pauses=st.lists(st.floats(0, 20), min_size=1, max_size=8),
    tokens=st.tuples(st.integers(20, 5000), st.integers(20, 5000)),
    sms=st.sampled_from([16, 32, 64]),
)
def test_a_prefill_behind_another(pauses: list[float], tokens: tuple[int, int], sms: int) -> None:
    """The second starts when the first ends, whenever that is, and each is done once."""
    gpu = simulated()
    rans = [gpu.run(launch(DECODES, [(tokens[0], 0)], sms), 0.0)]
    rans.append(gpu.run(launch(DECODES, [(tokens[1], 0)], sms, launch_id=1), pauses[0]))
    second_launched = of_lane(gpu.intervals, "decode")[1].start_ms
    for pause in pauses:
        rans.append(gpu.run(beside(DECODES, sms), rans[-1].end_ms + pause))
    while sum(ran.joined is not None for ran in rans) < 2:
        rans.append(gpu.run(wait(sms), rans[-1].end_ms))
    assert [ran.joined.launch_id for ran in rans if ran.joined is not None] == [0, 1]
    first, second = prefills = of_lane(gpu.intervals, "prefill")
    assert second.start_ms == pytest.approx(max(first.end_ms, second_launched))
    times = [lane_times(DECODES, [(n, 0)], sms) for n in tokens]
    decodes = of_lane(gpu.intervals, "decode")
    for prefill, (_, alone_ms, _, beside_ms) in zip(prefills, times, strict=True):
        together = sum(overlap_ms(prefill, decode) for decode in decodes)
        apart = prefill.end_ms - prefill.start_ms - together
        assert together / beside_ms + apart / alone_ms == pytest.approx(1.0)
    # A decode step runs beside one, then the other, then alone.
    for decode in decodes:
        together_ms = [overlap_ms(prefill, decode) for prefill in prefills]
        done = sum(ms / t[2] for ms, t in zip(together_ms, times, strict=True))
        alone_ms = decode.end_ms - decode.start_ms - sum(together_ms)
        assert done + alone_ms / times[0][0] == pytest.approx(1.0)


def overlap_ms(one: Interval, other: Interval) -> float:
    return max(0.0, min(one.end_ms, other.end_ms) - max(one.start_ms, other.start_ms))


def test_without_decodes_the_gpu_waits_for_the_prefill() -> None:
    prefills, sms = [(4000, 0), (500, 2000)], 32
    _, alone_ms, decode_ms, beside_ms = lane_times(DECODES, prefills, sms)
    gpu = simulated()
    assert gpu.run(launch(DECODES, prefills, sms), 3.0).end_ms == pytest.approx(3 + decode_ms)
    ran = gpu.run(wait(sms), 3.5)
    done_ms = 3 + decode_ms + (1 - decode_ms / beside_ms) * alone_ms
    assert ran.joined is not None and ran.end_ms == pytest.approx(done_ms)
    assert len(of_lane(gpu.intervals, "decode")) == 1
    # A step that was queued meanwhile starts when it is done.
    gpu.run(step([10]), 4.0)
    (whole,) = of_lane(gpu.intervals, "gpu")
    assert whole.start_ms == pytest.approx(done_ms)


def test_a_wait_for_a_prefill_that_is_done_takes_no_time() -> None:
    decodes = [6000] * 64
    gpu = simulated()
    end_ms = gpu.run(launch(decodes, [(64, 0)], 16), 0.0).end_ms
    ran = gpu.run(wait(16), 0.0)
    assert ran.joined is not None and ran.end_ms == end_ms


def test_a_small_prefill_in_flight_takes_as_long_as_its_launches() -> None:
    slow = replace(QUIET, launch_us=1000.0)
    gpu = simulated(slow)
    ran = gpu.run(launch(DECODES, [(600, 0)], 32), 0.0)
    floor_ms = ground_truth(slow).launch_ms(600)
    assert ran.launch_cpu_ms == floor_ms
    gpu.run(wait(32), 0.0)
    (prefill,) = of_lane(gpu.intervals, "prefill")
    assert prefill.end_ms == pytest.approx(floor_ms)


def steps_until_join(prefill_tokens: int, join_after: int) -> tuple[SimulatedGpu, list[Ran]]:
    gpu = simulated()
    rans = [gpu.run(launch(DECODES, [(prefill_tokens, 0)], 32), 0.0, join_after)]
    while rans[-1].joined is None:
        assert len(rans) < 50
        rans.append(gpu.run(beside(DECODES, 32), 0.0))
    return gpu, rans


@pytest.mark.parametrize("join_after", [3, 7])
def test_a_prefill_that_is_done_joins_no_earlier_than_planned(join_after: int) -> None:
    gpu, rans = steps_until_join(64, join_after)
    (prefill,) = of_lane(gpu.intervals, "prefill")
    assert prefill.end_ms < rans[1].end_ms
    assert len(rans) >= join_after
    # One step more of the plan is one step more until the join.
    assert len(steps_until_join(64, join_after + 1)[1]) == len(rans) + 1


@pytest.mark.parametrize("join_after", [2, 3, 7])
def test_a_prefill_joins_after_as_many_steps_as_planned(join_after: int) -> None:
    gpu, rans = steps_until_join(64, join_after)
    assert len(rans) == len(of_lane(gpu.intervals, "decode")) == join_after


def test_at_its_planned_join_the_gpu_waits_for_the_prefill() -> None:
    gpu, rans = steps_until_join(30_000, 3)
    (prefill,) = of_lane(gpu.intervals, "prefill")
    decode_steps = of_lane(gpu.intervals, "decode")
    assert rans[-1].end_ms == prefill.end_ms > decode_steps[-1].end_ms
    # Until then decode steps follow without a pause.
    for before, after in pairwise(decode_steps):
        assert after.start_ms == before.end_ms
    gpu.run(step([10]), 0.0)
    assert of_lane(gpu.intervals, "gpu")[0].start_ms == prefill.end_ms


# Noise


def noisy_ends(seed: int, noise: float) -> list[float]:
    gpu = simulated(replace(QUIET, noise=noise), seed)
    return [gpu.run(output, 0.0).end_ms for output in steps_of_all_kinds()]


def steps_of_all_kinds() -> list[Any]:
    return [
        step(prefills=[(700, 0)]),
        step([500], [(300, 0)]),
        step(DECODES),
        launch(DECODES, [(3000, 0)], 32),
        beside(DECODES, 32),
        wait(32),
    ]


def test_a_seed_gives_the_same_noise() -> None:
    assert noisy_ends(1, 0.03) == noisy_ends(1, 0.03)
    assert all(a != b for a, b in zip(noisy_ends(1, 0.03), noisy_ends(2, 0.03), strict=True))
    assert noisy_ends(1, 0.0) == noisy_ends(2, 0.0)


def test_the_noise_is_as_large_as_it_says() -> None:
    noise, steps = 0.05, 2000
    gpu = simulated(replace(QUIET, noise=noise))
    for _ in range(steps):
        gpu.run(step([1000]), 0.0)
    forecast_ms = ground_truth().step_ms([1000], [], [])
    logs = [math.log((i.end_ms - i.start_ms) / forecast_ms) for i in gpu.intervals]
    # Four standard errors.
    assert mean(logs) == pytest.approx(0, abs=4 * noise / math.sqrt(steps))
    assert stdev(logs) == pytest.approx(noise, rel=4 / math.sqrt(2 * steps))
