# SPDX-License-Identifier: Apache-2.0
"""Lanes that turn out slow, and splits that do not pay, on the simulated GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sim.harness import simulation

from vllm_duet import watch
from vllm_duet.sim.engine import RequestRecord, SimulatedEngine
from vllm_duet.sim.executor import GroundTruth, Ran, SimulatedGpu, Work
from vllm_duet.sim.results import latencies
from vllm_duet.sim.traces import TraceRequest

BOUND_MS, TTFT_MS = 50.0, 2000.0
RATE, BURST_S = 20.0, 8.0
"""Requests a second, of which about a third of the time is split, and for how long."""


class SlowLane(GroundTruth):
    """Decode steps on one lane take ``factor`` times what they should."""

    def __init__(self, truth: GroundTruth, decode_sms: int, factor: float) -> None:
        super().__init__(truth.roofline, truth.disturbances, truth.measured)
        self.decode_sms, self.factor = decode_sms, factor

    def lane_ms(self, work: Work, num_sms: int) -> float:
        return super().lane_ms(work, num_sms) * self._slowed(num_sms)

    def pair_ms(
        self, decode: Work, prefill: Work, decode_sms: int, prefill_sms: int
    ) -> tuple[float, float]:
        decode_ms, prefill_ms = super().pair_ms(decode, prefill, decode_sms, prefill_sms)
        return decode_ms * self._slowed(decode_sms), prefill_ms

    def _slowed(self, num_sms: int) -> float:
        return self.factor if num_sms == self.decode_sms else 1.0


class SlowLaunches(SimulatedGpu):
    """Each launch of a prefill holds the GPU up, which no forecast is compared with."""

    cost_ms = 0.0

    def run(self, *args: Any, **kwargs: Any) -> Ran:
        ran = super().run(*args, **kwargs)
        if (directive := getattr(args[0], "duet", None)) is None or directive.launch is None:
            return ran
        self._free_at += self.cost_ms
        return replace(ran, end_ms=ran.end_ms + self.cost_ms)


def burst(start_s: float, seconds: float = BURST_S) -> list[TraceRequest]:
    return [TraceRequest(1e3 * (start_s + i / RATE), 1400, 200) for i in range(int(RATE * seconds))]


def started(scheduler: str = "duet") -> SimulatedEngine:
    return simulation(scheduler, max_num_batched_tokens=8192, tbt_slo_ms=BOUND_MS).engine()


def good(records: Sequence[RequestRecord]) -> int:
    """How many requests were served as they should be."""
    values = latencies(records)
    return int(np.count_nonzero((values.ttft <= TTFT_MS) & (values.p99_gap <= BOUND_MS)))


def lanes_used(engine: SimulatedEngine, begin_s: float, end_s: float) -> Counter[int]:
    return Counter(
        interval.sms
        for interval in engine.gpu.intervals
        if interval.lane == "decode" and begin_s <= 1e-3 * interval.start_ms < end_s
    )


def test_a_slow_lane_is_left_and_used_again_when_it_has_recovered() -> None:
    trace = burst(0)
    usual = started()
    usual.run(trace)
    [(lane, usual_steps), *_] = lanes_used(usual, 0, 2 * BURST_S).most_common()

    engine, again_s, finished = started(), 10 * BURST_S + watch.FIRST_PAUSE_S, list[str]()
    engine.gpu.truth = slow = SlowLane(engine.gpu.truth, lane, 2.0)

    def recover(record: RequestRecord) -> None:
        finished.append(record.request_id)
        if len(finished) == len(trace):
            slow.factor = 1.0

    records = engine.run([*trace, *burst(again_s)], recover)
    before, after = records[: len(trace)], records[len(trace) :]
    watched = engine.scheduler._step_times.watch
    assert watched.taken_out == {(lane, "slow"): 1} and all(watched.in_use.values())
    assert 0 < lanes_used(engine, 0, again_s)[lane] < usual_steps / 2
    used_again = lanes_used(engine, again_s, 2 * again_s)
    assert used_again.most_common()[0][0] == lane
    whole = started("duet-no-splits")
    assert good(before) >= good(whole.run(trace))
    assert good(after) >= good(before)


@pytest.mark.parametrize("pays", [False, True])
def test_splits_that_do_not_pay_end(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SPLIT_S", 2.0)  # no need to simulate minutes
    trace = burst(0, 3 * BURST_S)
    engine = started()
    if not pays:
        engine.gpu = SlowLaunches(engine.gpu.truth, 0)
        engine.gpu.cost_ms = 40.0
    records = engine.run(trace)
    watched = engine.scheduler._step_times.watch
    assert all(watched.in_use.values()) is pays
    if pays:
        assert not watched.taken_out and watched.split_speedup > 1.05
        return
    assert set(watched.taken_out.values()) == {1}
    ended_ms = max(i.end_ms for i in engine.gpu.intervals if i.lane == "decode")
    later = [i for i, record in enumerate(records) if record.arrival_ms > ended_ms + TTFT_MS]
    assert len(later) > 100
    whole = started("duet-no-splits").run(trace)
    assert good([records[i] for i in later]) >= good([whole[i] for i in later])
    # Where nobody watches, it would have gone on like this.
    assert good(records[: later[0]]) < good(whole[: later[0]])
