# SPDX-License-Identifier: Apache-2.0
"""The host's side of the CUDA lanes on the real engine: two threads at once, on a CPU.

The lanes are those of a GPU, on streams that do at once what they are given. On a GPU the
decode steps beside a prefill are graphs and need no forward context (rule 3); here each
thread has one of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine.scenarios import compare, serve_on
from engine.workloads import random_mix
from lanes.fake_streams import fake_gpu
from vllm import _custom_ops, forward_context
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.lanes.cuda import CudaLanePair
from vllm_duet.worker import lane_state, runner

DEVICE = torch.device("cuda", 0)
DECODE_SMS = (16, 32, 64)
TIMEOUT_S = 60


NOT_FOR_TWO_THREADS = (
    "onednn_mm",
    "cpu_attn_get_scheduler_metadata",
    "cpu_attention_with_kv_cache",
)
"""vLLM's operators for a CPU that share memory of their own; a GPU's kernels do not."""


class MeetingLanes(CudaLanePair):
    """Lanes whose prefills begin when a decode step does, so that the two really meet."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: Counter[str] = Counter()
        self._prefill_runs = False
        self._begun = 0
        self._may_begin = threading.Event()

    def launch(self, prefill, prefill_sms):
        def meets():
            assert self._may_begin.wait(TIMEOUT_S)
            self._prefill_runs = True
            self._begun += 1
            try:
                return prefill()
            finally:
                self._prefill_runs = False

        self._may_begin.clear()
        launched = super().launch(meets, prefill_sms)
        # Whoever waits for it has no step for it to meet.
        launched.wait_until_queued = self._letting_it_begin(launched.wait_until_queued)
        launched.result = self._letting_it_begin(launched.result)
        return launched

    def _letting_it_begin(self, wait):
        def begins_and_waits():
            self._may_begin.set()
            return wait()

        return begins_and_waits

    @contextmanager
    def decoding(self, decode_sms: int) -> Iterator[None]:
        with super().decoding(decode_sms):
            runs, begun = self._prefill_runs, self._begun
            self._may_begin.set()
            yield
            self.seen["decode steps that met a prefill"] += runs or self._begun > begun

    def give_way(self) -> None:
        self.seen["layers"] += 1
        super().give_way()


class OfThisThread(threading.local):
    """A forward context for each thread, in the place of the one global."""

    context: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)


def one_at_a_time(function, turn):
    def taking_turns(*args, **kwargs):
        with turn:
            return function(*args, **kwargs)

    return taking_turns


@pytest.fixture
def lanes(request, monkeypatch):
    contexts = OfThisThread()

    @contextmanager
    def override_forward_context(context):
        before, contexts.context = contexts.context, context
        try:
            yield
        finally:
            contexts.context = before

    monkeypatch.setattr(forward_context, "_forward_context", contexts)
    monkeypatch.setattr(lane_state, "get_forward_context", lambda: contexts.context)
    for module in (forward_context, runner):
        monkeypatch.setattr(module, "override_forward_context", override_forward_context)
    turn = threading.Lock()
    for name in NOT_FOR_TWO_THREADS:
        monkeypatch.setattr(_custom_ops, name, one_at_a_time(getattr(_custom_ops, name), turn))
    fake_gpu(monkeypatch, at_once=True)
    pair = MeetingLanes.create(DECODE_SMS, DEVICE, request.param)
    yield pair
    pair.shutdown()


@pytest.mark.parametrize("lanes", [False, True], indirect=True, ids=["thread", "slices"])
@pytest.mark.parametrize("engine", ["roomy", "cramped"])
def test_tokens_are_stocks_when_both_lanes_run_at_once(request, engine, lanes, monkeypatch):
    engine = request.getfixturevalue(engine)
    monkeypatch.setattr(engine.runner, "checks_lanes", True)
    arrivals = random_mix(31, num_requests=14)
    stock = engine.run(arrivals, AsyncScheduler)
    options = dict(mode="random", seed=5, decode_sms=list(DECODE_SMS))
    duet = serve_on(lanes, engine, arrivals, **options)
    for arrival in arrivals:
        compare(stock[arrival.request_id], duet[arrival.request_id])
    assert lanes.seen["decode steps that met a prefill"] > 3
    assert lanes.seen["layers"] >= 2 * engine.core.scheduler.totals.joined > 0
