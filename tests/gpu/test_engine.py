# SPDX-License-Identifier: Apache-2.0
"""The engine on the fake GPU: what it serves, what each lane is given, and when it fails."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from engine.scenarios import CountingScheduler
from gpu.engines import SPLIT, clients, running
from gpu.lane_trace import LaneTrace
from gpu.process import on_fake_gpu, own_trace
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_duet.lanes.cuda import _Launched

NUM_LAYERS = 2
DECODE_SMS, PREFILL_SMS = 64, 132 - 64
ONE_SPLIT = SPLIT | {"decode_sms": [DECODE_SMS]}


@on_fake_gpu(trace=True)
def test_every_mode_and_what_each_lane_is_given(tmp_path):
    with running(tmp_path, compilation_config={}) as engine:
        assert set(engine.runner.lane_graphs) == {16, 64}
        runs = []
        for seed, mode in enumerate(("aggregated", "capped", "split", "random", "auto")):
            for slices in (False, True):
                engine.runner.lanes._slices = slices
                begin = len(own_trace())
                CountingScheduler.seen.clear()
                engine.serve(clients(seed, leaving=0.1), mode=mode, seed=seed)
                alone = CountingScheduler.seen["launches without a decode"]
                runs.append((mode, engine.totals, alone, begin, len(own_trace())))
    trace = LaneTrace.read(own_trace())
    assert trace.left_alive == set()
    for mode, totals, alone, begin, end in runs:
        assert trace.faults(begin, end) == []
        assert totals.launched == totals.joined == trace.joins(begin, end)
        assert totals.launched - alone == trace.beside(begin, end)
        layers = trace.layers(begin, end)
        assert layers["prefill"] == NUM_LAYERS * totals.launched
        assert layers["prepare"] == layers["other"] == 0
        if mode in ("split", "random"):
            assert totals.launched and trace.graphs(begin, end)["decode"]


@on_fake_gpu(trace=True)
def test_a_decode_step_that_waits_for_a_prefill_would_be_noticed(tmp_path):
    with running(tmp_path) as engine:
        lanes = engine.runner.lanes
        decoding = lanes.decoding

        def waiting(decode_sms):
            if lanes._last_prefill is not None:
                lanes.decode_streams[decode_sms].wait_event(lanes._last_prefill)
            return decoding(decode_sms)

        lanes.decoding = waiting
        begin = len(own_trace())
        engine.serve(clients(2))
        faults = LaneTrace.read(own_trace()).faults(begin)
        assert faults
        assert all("decode, waits for" in fault and fault.endswith("prefill") for fault in faults)


@on_fake_gpu(trace=True)
def test_a_step_that_zeroes_blocks_comes_before_its_prefill(tmp_path):
    zeroing = patch.object(KVCacheConfig, "needs_kv_cache_zeroing", True)
    with zeroing, running(tmp_path) as engine:
        begin = len(own_trace())
        engine.serve(clients(7))
        trace = LaneTrace.read(own_trace())
        assert engine.totals.joined
        assert trace.faults(begin) == [] and trace.beside(begin, sys.maxsize) == 0

        begin = len(own_trace())
        with patch("vllm_duet.worker.runner._touches_blocks", lambda output: False):
            engine.serve(clients(7))
        faults = LaneTrace.read(own_trace()).faults(begin)
        assert faults and all("beside a step that zeroes KV blocks" in fault for fault in faults)


@on_fake_gpu()
def test_buffers_of_a_prefill_in_flight_stay_as_they_are(tmp_path):
    checked = patch.dict(os.environ, {"VLLM_DUET_CHECK": "1"})
    # It compares by a kernel.
    on_host = patch.object(torch, "equal", lambda a, b: bool((a.cpu() == b.cpu()).all()))
    with checked, on_host, running(tmp_path, SPLIT | {"prefill_launch": "slices"}) as engine:
        assert engine.runner.checks_lanes and engine.runner.lanes._slices
        engine.serve(clients(3, leaving=0.1))
        assert engine.totals.joined


@on_fake_gpu()
def test_preemption_beside_a_prefill(tmp_path):
    CountingScheduler.seen.clear()
    asked = Counter[int]()

    def done(launched):
        asked[id(launched)] += 1
        return asked[id(launched)] > 8  # steps: nothing takes time here

    with (
        patch.object(_Launched, "done", done),
        running(tmp_path, num_gpu_blocks_override=65) as engine,
    ):
        for seed in range(3):
            engine.serve(clients(seed, count=32, longest=200, leaving=0.2))
    assert CountingScheduler.seen["preemptions beside a prefill"]
    assert CountingScheduler.seen["joins of an aborted request"]


@pytest.mark.parametrize("what", ["a launch", "memory"])
@on_fake_gpu()
def test_a_prefill_that_fails_on_its_lane(tmp_path, what):
    with running(tmp_path, ONE_SPLIT) as engine, failing(engine, what, times=1):
        answers = engine.serve(clients(5))
        failed = [a for a in answers.values() if a.finish_reason == {0: "error"}]
        assert 1 <= len(failed) < len(answers)
        assert engine.totals.failed == 1 < engine.totals.joined
        where = f"on its lane of {PREFILL_SMS} SMs, beside a decode lane of {DECODE_SMS}"
        assert where in engine.log
        assert ("out of memory" in engine.log) == (what == "memory")


@on_fake_gpu()
def test_steps_are_whole_after_three_failures(tmp_path):
    with running(tmp_path, ONE_SPLIT) as engine, failing(engine, "a launch", times=3):
        engine.serve(clients(6, count=24))
        assert engine.totals.failed == 3
        assert engine.totals.launched <= 4  # one may have been behind the third
        assert "splits no more steps: 3 prefills have failed on their lane" in engine.log


@on_fake_gpu()
def test_the_end_gives_back_what_the_lanes_had(tmp_path):
    def left(gpu):
        return {what: gpu.count(what) for what in ("streams", "events", "graph_execs")}

    # What vLLM leaves, and an event that torch's allocator keeps once it has needed one.
    torch.empty(1, device="cuda").record_stream(torch.cuda.Stream())
    torch.cuda.empty_cache()
    with running(tmp_path, {}) as engine:
        engine.serve(clients(8))
    before = left(engine.gpu)
    with running(tmp_path) as engine:
        engine.serve(clients(8))
        assert engine.totals.joined
        assert all(left(engine.gpu)[what] > before[what] for what in before)
    assert left(engine.gpu) == before


@contextmanager
def failing(engine, what: str, times: int) -> Iterator[None]:
    """The lane's first ``times`` prefills fail, by "a launch" or by "memory" that runs out."""
    stock = engine.runner.lanes.launch

    def launch(prefill, prefill_sms):
        nonlocal times
        doomed, times = times > 0, times - 1

        def fails():
            if doomed and what == "memory":
                torch.cuda.empty_cache()  # the start has taken what a prefill needs
                engine.gpu.fail_malloc(times=2)  # torch tries again with its caches freed
            elif doomed:
                engine.gpu.fail_launch(PREFILL_SMS, times=1)
            return prefill()

        launched = stock(fails, prefill_sms)
        launched.wait_until_queued()  # or else it might be a decode step's memory
        return launched

    with patch.object(engine.runner.lanes, "launch", launch):
        yield
