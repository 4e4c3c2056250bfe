# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells its policy of the step that vLLM is about to build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from scheduler.engine import BLOCK_SIZE, DECODE_SMS, NUM_SMS, Engine, Shape
from vllm.v1.request import Request

from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import FixedModePolicy, Load
from vllm_duet.scheduler import DuetScheduler
from vllm_duet.step_times import NUM_REQUESTS

LANE_STEP_MS = 7.0


class Told(FixedModePolicy):
    """Splits what it may, and keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(Mode.SPLIT, DECODE_SMS, NUM_SMS - DECODE_SMS, 0)
        self.prompts: list[list[int]] = []
        self.loads: list[Load] = []
        self.can_split: list[bool] = []
        self.joins_late = False

    def decide(
        self,
        decode_context_lens: Sequence[int],
        prefill_query_lens: Sequence[int],
        prefill_context_lens: Sequence[int],
        **kwargs: Any,
    ) -> DuetPlan:
        self.prompts.append(list(prefill_query_lens))
        self.loads.append(kwargs["load"])
        self.can_split.append(kwargs["can_split"])
        plan = super().decide(
            decode_context_lens, prefill_query_lens, prefill_context_lens, **kwargs
        )
        return replace(plan, tbt_ms=LANE_STEP_MS, joins_late=self.joins_late)


def served(shape: Shape, decodes: int = 2) -> tuple[Engine, Told]:
    """An engine in which requests decode."""
    engine, told = Engine(DuetScheduler, shape, seed=0), Told()
    for number in range(decodes):
        engine.add([number] * 5, max_tokens=60)
    for _ in range(4):
        engine.step()
    engine.scheduler._policy = told
    return engine, told


@pytest.mark.parametrize("why", ["use_structured_output", "resumable"])
def test_no_split_is_planned_for_a_prompt_that_cannot_be_in_flight(why, monkeypatch) -> None:
    engine, told = served(Shape())
    first = engine.add([7] * 9, max_tokens=2)
    monkeypatch.setattr(
        Request, why, property(lambda request: request.request_id == first, lambda *_: None),
        raising=False,
    )  # fmt: skip
    engine.step()
    assert told.can_split == [False]
    assert engine.scheduler.totals.launched == 0
    # As long as it waits, or is not looked at.
    monkeypatch.undo()
    engine.add([8] * 9, max_tokens=2)
    engine.step()
    assert told.can_split == [False, True]


def test_the_policy_is_told_of_no_more_than_the_kv_cache_has_room_for() -> None:
    engine, told = served(Shape(blocks_a_group=9))
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for _ in range(3):
        engine.add(range(18), max_tokens=2)
    engine.step()
    assert sum(told.prompts[0]) == free * BLOCK_SIZE < 22
    assert told.loads[0].backlog == pytest.approx(free * BLOCK_SIZE / 24)
    assert told.loads[0].kv_usage == pytest.approx(1 - free / 8)


def test_prompts_that_were_not_looked_at_are_in_the_backlog() -> None:
    engine, told = served(Shape())
    for number in range(40):
        engine.add([number] * 12, max_tokens=2)
    engine.step()
    assert sum(told.prompts[0]) == 22
    assert told.loads[0].backlog == pytest.approx(40 * 12 / 24)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_who_has_just_joined_waits_for_the_step_that_is_queued(asynchronous) -> None:
    engine, told = served(Shape(asynchronous=asynchronous))
    engine.add([7] * 9, max_tokens=20)
    while not engine.scheduler.totals.joined:
        engine.step()
    assert all(load.waited_ms == 0 for load in told.loads)
    engine.add([8] * 9, max_tokens=20)
    engine.step()
    assert told.loads[-1].waited_ms == (LANE_STEP_MS if asynchronous else 0)
    while engine.scheduler.totals.joined < 2:
        engine.step()
    for _ in range(3):  # who joined has been in a step
        engine.step()
    engine.add([9] * 9, max_tokens=20)
    engine.step()
    assert told.loads[-1].waited_ms == 0


def test_short_answers_that_join_late_are_counted() -> None:
    engine, told = served(Shape())
    for told.joins_late in (False, False, True, False):
        joined = engine.scheduler.totals.joined
        engine.add([7 + joined] * 9, max_tokens=2)
        while engine.scheduler.totals.joined == joined:
            engine.step()
        for _ in range(3):  # it ends
            engine.step()
    late = [load.late for load in told.loads]
    assert late[:3] == [0, 0, 0] and late[3] == pytest.approx(1 / NUM_REQUESTS, rel=0.01)
