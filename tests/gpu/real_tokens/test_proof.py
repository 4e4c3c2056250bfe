# SPDX-License-Identifier: Apache-2.0
"""What the start proves, with kernels that compute: right lanes pass in whatever order the
streams run, and a wait that is missing is noticed."""

from __future__ import annotations

import pytest
import torch
from engine.harness import Engine
from engine.workloads import random_mix
from fake_gpu import real_kernels
from gpu.real_tokens.conftest import DECODE_SMS
from gpu.real_tokens.test_mutations import ORDERS, WAITS, recover, without_wait
from gpu.real_tokens.test_real_tokens import SEEDS, compare_all, late
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.hand_made import HandMadeSteps
from vllm_duet.worker import proof
from vllm_duet.worker.proof import Proof, prove_lanes

UNPROVED = {
    "prefill for the prefill before it",  # there is one at a time
}


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    # Triton's interpreter is slow.
    monkeypatch.setattr(proof, "MOST_DECODES", 4)
    monkeypatch.setattr(proof, "CONTEXTS", (3, 70))
    monkeypatch.setattr(proof, "MOST_PREFILL", 90)
    monkeypatch.setattr(proof, "TIMEOUT_S", 300.0)


def prove(engine: Engine, order: int | None) -> Proof:
    runner = engine.runner
    splits = dict(zip(DECODE_SMS, (132 - sms for sms in DECODE_SMS), strict=True))
    assert set(splits.values()) == runner.lanes.prefill_sms
    steps = HandMadeSteps(engine.vllm_config, runner.kv_cache_config)
    most_decodes = min(graphs.most_decodes for graphs in runner.lane_graphs.values())
    worker = engine.llm_engine.model_executor.driver_worker.worker
    with late(order):
        return prove_lanes(worker, steps, splits, most_decodes)


@pytest.mark.parametrize("engine", ["roomy", "synchronous"])
def test_right_lanes_pass_in_any_order_and_the_engine_serves_as_before(request, engine):
    engine = request.getfixturevalue(engine)
    arrivals = random_mix(1)
    stock = engine.run(arrivals, AsyncScheduler)
    for order in (None, *range(SEEDS)):
        assert prove(engine, order) == Proof(None)
    compare_all(stock, engine.run(arrivals, AsyncScheduler))


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_that_is_missing_is_noticed(roomy, monkeypatch, name):
    for order in range(ORDERS):
        with monkeypatch.context() as patch:
            without_wait(*WAITS[name])(roomy, patch)
            try:
                found = prove(roomy, order)
            except RuntimeError as error:  # of a kernel, which tells late() alone
                found = Proof(str(error))
        torch.cuda.synchronize()
        real_kernels.errors.clear()
        if found.obstacle is not None:
            recover(roomy)
            print(f"{name}: {found.obstacle} (order {order})")
            return
    if name in UNPROVED:
        pytest.xfail("not noticed")
    raise AssertionError("not noticed")
