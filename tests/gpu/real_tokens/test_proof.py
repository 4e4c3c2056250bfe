# SPDX-License-Identifier: Apache-2.0
"""What the start proves, with kernels that compute: right lanes pass in whatever order the
streams run, and lanes that lack one of their waits do not."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
from engine.harness import Engine
from engine.workloads import random_mix
from fake_gpu import FakeGpu
from gpu.real_tokens.conftest import DECODE_SMS
from gpu.real_tokens.test_mutations import ORDERS, WAITS, recover, without_wait
from gpu.real_tokens.test_real_tokens import SEEDS, compare_all, late
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.start import MeasuredSteps
from vllm_duet.worker import proof
from vllm_duet.worker.proof import Proof


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    # Triton's interpreter is slow.
    monkeypatch.setattr(proof, "MOST_DECODES", 4)
    monkeypatch.setattr(proof, "CONTEXTS", (3, 70))
    monkeypatch.setattr(proof, "MOST_PREFILL", 90)
    # The device goes on while the proof waits; a query alone runs no kernel that computes.
    gpu, rng = FakeGpu(), random.Random(0)

    def sleep(seconds):
        gpu.advance(rng.choice([0, 10, 50]))

    monkeypatch.setattr(proof, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))


def prove(engine: Engine, order: int | None) -> Proof:
    splits = {sms: 132 - sms for sms in DECODE_SMS}
    assert set(splits.values()) == engine.runner.lanes.prefill_sms
    with late(order):
        return MeasuredSteps(engine.llm_engine.model_executor).prove_lanes(splits)


def test_right_lanes_pass_in_any_order_and_the_engine_serves_as_before(roomy):
    arrivals = random_mix(1)
    stock = roomy.run(arrivals, AsyncScheduler)
    for order in (None, *range(SEEDS)):
        assert prove(roomy, order) == Proof(None)
    compare_all(stock, roomy.run(arrivals, AsyncScheduler))


NOTICED = (
    "decode lane for the caller",
    "caller for the decode lane",
    "preparing for the fork",
    "prefill for what was prepared",
)
"""Of WAITS. In one order out of twelve "caller for the prefill", too, since the fake GPU's prefills
take no longer than its decode steps; the other two show in no tokens, see test_mutations.py."""


@pytest.mark.parametrize("name", NOTICED)
def test_a_wait_that_is_missing_is_noticed(roomy, monkeypatch, name):
    for order in range(3 * ORDERS):
        with monkeypatch.context() as patch:
            without_wait(*WAITS[name])(roomy, patch)
            found = prove(roomy, order)
        if found.obstacle is not None:
            recover(roomy)
            break
    assert found.obstacle is not None
