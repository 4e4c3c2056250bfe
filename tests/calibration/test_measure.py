# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from calibration.simulated import TRUTH, SimulatedDevice

from vllm_duet.calibration import facts
from vllm_duet.calibration.device import CalibrationError
from vllm_duet.calibration.experiments import (
    ATTENTION,
    READ,
    coarse_first,
    duet,
    duet_summary,
)
from vllm_duet.calibration.measure import alone, beside
from vllm_duet.calibration.work import (
    SHAPE,
    Gemm,
    PagedAttention,
    SmallKernel,
    Stream,
    amounts,
    from_json,
    gemm,
    layer,
    predicted_ms,
    predicted_pair_ms,
    summary_of,
    to_json,
)
from vllm_duet.roofline import Batch, GpuProfile, Roofline

H100 = GpuProfile.load("h100-sxm")


# Work, as the roofline counts it


def test_a_layer_costs_what_the_roofline_says_of_a_models_layer() -> None:
    """All but the copy of new K and V into their blocks, which our kernel does not make."""
    formula = replace(H100, factors={})
    works = layer(64, PagedAttention(batch=64, context_len=1501))
    prediction = Roofline(SHAPE, formula).predict(Batch([1] * 64, [1500] * 64), 132)
    same = {"qkv_proj", "o_proj", "gate_up", "down", "attention_decode"}
    ours = [op for op in prediction.operators if op.name in same]
    expected = sum(op.ms for op in ours) / SHAPE.num_layers
    assert predicted_ms(formula, works, 132) == pytest.approx(expected, rel=2e-3)
    flops, moved = amounts(works)
    assert flops * SHAPE.num_layers == pytest.approx(sum(op.flops for op in ours))
    copied = 64 * 2 * SHAPE.kv_bytes_per_token
    assert moved * SHAPE.num_layers + copied == pytest.approx(sum(op.bytes for op in ours))


@pytest.mark.parametrize(
    "work", [gemm("down", 7, sm_target=8), READ, ATTENTION, SmallKernel(), Stream("copy", 64)]
)
def test_work_survives_json(work: Gemm) -> None:
    assert from_json(to_json(work)) == work


def test_one_lane_has_one_batch() -> None:
    with pytest.raises(ValueError, match=r"equal rows, not \[1, 2\]"):
        summary_of([gemm("down", 1), gemm("down", 2)], "decode")


# Timing


def test_alone_times_one_run_whatever_a_launch_holds() -> None:
    device = SimulatedDevice()
    for work in (SmallKernel(), gemm("down", 8192)):
        with device.split(64) as lanes:
            timing = alone(device, [work], lanes.prefill, 5, H100)
        assert timing.ms == pytest.approx(predicted_ms(TRUTH, [work], 68), rel=1e-6)
        assert timing.launches == 5
        assert timing.min_ms <= timing.ms <= timing.max_ms
    assert timing.runs == 1


def test_noise_shows_as_spread() -> None:
    device = SimulatedDevice(noise=0.1)
    timing = alone(device, [READ], device.whole(), 9, H100)
    assert timing.min_ms < timing.ms < timing.max_ms


@pytest.mark.parametrize("decode_sms", [8, 64, 120])
def test_beside_is_timed_while_both_lanes_are_busy(decode_sms: int) -> None:
    """Lanes as unequal as they come: each launch counted is slowed all the way."""
    device = SimulatedDevice()
    decode, prefill = [READ], [gemm("gate_up", 64)]
    with device.split(decode_sms) as lanes:
        found = beside(device, decode, prefill, lanes, 3, H100)
    expected = predicted_pair_ms(TRUTH, decode, prefill, decode_sms, 132 - decode_sms)
    assert (found.decode.ms, found.prefill.ms) == pytest.approx(expected, rel=1e-6)
    # But for the CPU, which has to queue the first launches.
    assert found.decode.max_ms == pytest.approx(found.decode.min_ms, rel=0.02)
    single = predicted_ms(TRUTH, decode, decode_sms)
    assert found.decode_alone.ms == pytest.approx(single, rel=1e-6)


def test_lanes_that_run_one_after_the_other_are_no_pair() -> None:
    device = SimulatedDevice(turns="decode first")
    with (
        pytest.raises(CalibrationError, match="the lanes did not run at once"),
        device.split(64) as lanes,
    ):
        beside(device, [READ], [gemm("gate_up", 2048)], lanes, 3, H100)


def test_lanes_that_take_turns_are_slow_beside_each_other() -> None:
    device = SimulatedDevice(turns="fifo")
    with device.split(64) as lanes:
        found = beside(device, [READ], [gemm("gate_up", 2048)], lanes, 5, H100)
    for lane in (found.decode, found.prefill):
        both = found.decode_alone, found.prefill_alone
        assert lane.ms * lane.runs > sum(side.ms * side.runs for side in both) * 0.99


def test_coarse_first_covers_the_range_at_every_length() -> None:
    values = list(range(8, 129, 8))
    ordered = coarse_first(values)
    assert sorted(ordered) == values and ordered[:3] == [8, 128, 64]
    for length in range(3, len(values)):
        gaps = sorted(ordered[:length])
        largest = max(b - a for a, b in pairwise(gaps))
        assert largest <= 2 * (128 - 8) / (length - 1) + 8
    assert coarse_first([8]) == [8] and coarse_first([]) == []


# Facts


@pytest.mark.parametrize(
    ("stays", "verdict"),
    [
        (True, "captured kernels stay in the group they were captured in"),
        (False, "captured kernels run in the group the graph is launched in"),
    ],
)
def test_where_captured_kernels_run(stays: bool, verdict: str) -> None:
    device = SimulatedDevice(captured_stays=stays)
    found = facts.captured_kernels_stay_in_their_group(device, 3, H100)
    assert found["verdict"] == verdict
    assert len(found["decode_sm_ids"]) + len(found["prefill_sm_ids"]) == 132


def test_replay_and_launch_are_told_apart() -> None:
    found = facts.replay_against_launch(SimulatedDevice(), 3, H100)
    assert found["launch"]["cpu_us"] == pytest.approx(4)
    assert found["replay"]["cpu_us"] == pytest.approx(8 / found["kernels"])
    assert found["replay"]["gpu_us"] == pytest.approx(2.6, rel=0.05)


@pytest.mark.parametrize("turns", [None, "fifo"])
def test_a_launch_behind_a_long_queue_is_seen(turns: str | None) -> None:
    found = facts.launch_beside_a_long_queue(SimulatedDevice(turns=turns), 3, H100)
    delays = [s["beside_us"] - s["idle_us"] for s in found["settings"]]
    if turns:
        assert found["verdict"] == "delayed under 4 of 4 settings"
        assert min(delays) > 1e3 * facts.LONG_QUEUE_MS / 2
        assert {s["queue_ended_first"] for s in found["settings"]} == {3}
    else:
        assert found["verdict"] == "delayed under 0 of 4 settings"
        assert max(delays) < 5
        assert {s["queue_ended_first"] for s in found["settings"]} == {0}


def test_memory_is_counted_by_context_and_by_graph() -> None:
    found = facts.memory_held(SimulatedDevice(), 3, H100)
    assert found["bytes_per_green_context"] == 20 * 2**20
    assert found["bytes_per_graph"] == 2**20


def test_changing_the_split_is_timed() -> None:
    found = facts.changing_the_split(SimulatedDevice(), 4, H100)
    assert found["create_ms"] == pytest.approx(3)
    assert found["other_split_us"] > 0


def test_groups_are_counted() -> None:
    found = facts.group_sizes(SimulatedDevice(), 1, H100)
    assert found["verdict"] == "smallest 8, step 8: 15 of 15 splits are what was asked for"
    assert found["splits"][0]["counted"] == [8, 124]


def test_persistent_kernels_have_a_row_each() -> None:
    found = facts.persistent_kernels(SimulatedDevice(), 3, H100)
    assert {(row["kernel"], row["num_sms"]) for row in found["rows"]} == {
        (kernel, sms) for kernel in ("cublas", "persistent") for sms in (8, 124, 64, 68, 120, 12)
    }


# The duet


def test_the_duet_is_judged_against_one_batch_and_in_turn() -> None:
    device, records = SimulatedDevice(replace(TRUTH, contention=0.0)), []
    for step in duet(device.info, H100):
        records += step.run(device, 3)
    summary = duet_summary(records)
    assert summary is not None
    assert [row["decode_sms"] for row in summary["splits"]] == list(device.info.splits)
    assert summary["in_turn"]["weighted_speedup"] == 1.0
    # Reading the weights once for both is what one batch gains.
    assert 1.0 < summary["mixed"]["weighted_speedup"] < 1.5
    best = max(summary["splits"], key=lambda row: row["weighted_speedup"])
    assert best["weighted_speedup"] > 1.0
    assert best["tbt_ms"] < summary["mixed"]["tbt_ms"]
    assert duet_summary(records[1:]) is None
