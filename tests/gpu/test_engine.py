# SPDX-License-Identifier: Apache-2.0
"""The engine on the fake GPU: what it serves, what each lane is given, and when it fails."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from engine.scenarios import CountingScheduler
from fake_gpu import FakeGpu
from gpu.engines import SPLIT, clients, running
from gpu.lane_trace import LaneTrace
from gpu.process import on_fake_gpu, own_trace
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import AttentionGroup

from vllm_duet.lanes.cuda import _Launched
from vllm_duet.plan import MAX_IN_FLIGHT

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
    """Whether one falls beside a prefill the steps' order decides, which threads share in."""
    wanted = "preemptions beside a prefill", "joins of an aborted request"
    seen = CountingScheduler.seen
    seen.clear()
    asked = Counter[int]()

    def done(launched):
        asked[id(launched)] += 1
        return asked[id(launched)] > 8  # steps: nothing takes time here

    with (
        patch.object(_Launched, "done", done),
        running(tmp_path, num_gpu_blocks_override=65) as engine,
    ):
        for seed in range(20):
            engine.serve(clients(seed, count=32, longest=200, leaving=0.2))
            if seed > 1 and all(seen[what] for what in wanted):
                break
    assert all(seen[what] for what in wanted), seen


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
def test_a_prefill_has_a_workspace_of_its_own(tmp_path):
    """So have its metadata builders, some of which reserve memory there."""
    builders, forwards = [], set()
    stock = AttentionGroup.create_metadata_builders

    def create(group, *args, **kwargs):
        builders.append(workspace._workspace_lane.get())
        stock(group, *args, **kwargs)

    with (
        patch.object(AttentionGroup, "create_metadata_builders", create),
        running(tmp_path) as engine,
    ):
        last = workspace.current_workspace_manager()._num_lanes - 1
        assert last > engine.runner._draft_workspace_lane
        assert 0 in builders and builders[-MAX_IN_FLIGHT:] == [last] * MAX_IN_FLIGHT
        forward = engine.runner.model.forward

        def watched(*args, **kwargs):
            on_lane = threading.current_thread().name.startswith("duet-prefill")
            forwards.add((on_lane, workspace._workspace_lane.get()))
            return forward(*args, **kwargs)

        with patch.object(engine.runner.model, "forward", watched):
            engine.serve(clients(9))
    assert forwards == {(True, last), (False, 0)}


@on_fake_gpu(order="late:0")
def test_nothing_is_left_to_run_when_an_engine_goes_to_sleep(tmp_path):
    """vLLM gives the memory back that a prefill in flight works on."""
    gpu, left = FakeGpu(), []

    def sleep(worker, level=1):
        (prefill, *_) = worker.model_runner._in_flight
        left.append((prefill.in_flight.done(), gpu.count("queued")))

    def sleep_once(step, scheduler):
        if engine.runner._in_flight and not left:
            assert gpu.count("queued")
            engine.llm_engine.model_executor.driver_worker.worker.sleep()

    with patch.object(Worker, "sleep", sleep), running(tmp_path) as engine:
        engine.vllm_config.additional_config = {"duet": SPLIT}
        engine.run(clients(9), CountingScheduler, sleep_once)
    assert left == [(True, 0)]


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
