# SPDX-License-Identifier: Apache-2.0
"""The draws: what clients and operators do to an engine, and when its lanes run."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler.device import VOCABULARY
from scheduler.draws import ANSWERS, Draw, requests
from scheduler.engine import BLOCK_SIZE, Engine, Shape
from vllm.v1.core.sched.interface import PauseState

from vllm_duet.scheduler import DuetScheduler

SHAPES = st.builds(
    Shape,
    blocks_a_group=st.sampled_from([200, 60, 34]),
    max_num_seqs=st.sampled_from([3, 5, 12]),
    max_num_batched_tokens=st.sampled_from([16, 24, 64]),
    windows=st.sampled_from([(0,), (0,), (0, 6)]),
    asynchronous=st.booleans(),
    by_priority=st.booleans(),
    mode=st.sampled_from(["split", "split", "random"]),
    seed=st.integers(0, 1000),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Draws a life of ``scheduler_cls``, in an engine whose shape has what ``fixed`` says."""

    scheduler_cls: ClassVar[type] = DuetScheduler
    fixed: ClassVar[dict[str, Any]] = {}

    @initialize(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
    def start(self, shape: Shape, seed: int) -> None:
        self.engine = Engine(self.scheduler_cls, replace(shape, **self.fixed), seed)
        self.random = Random(seed + 1)

    def alive(self) -> list[str]:
        return [i for i, client in self.engine.clients.items() if not client.is_done]

    def prompt(self, shared: int, own: int) -> list[int]:
        return [i % VOCABULARY for i in range(shared)] + self.random.choices(
            range(VOCABULARY), k=own
        )

    @rule(
        draws=st.lists(requests(BLOCK_SIZE, 48), min_size=1, max_size=4),
        stop_token=st.integers(-40, VOCABULARY - 1),
    )
    def arrive(self, draws: list[Draw], stop_token: int) -> None:
        for draw in draws:
            prompt = self.prompt(draw.shared, draw.own)
            self.engine.add(prompt, draw.max_tokens, stop_token, draw.priority)

    @precondition(lambda self: self.engine.clients)
    @rule(which=st.integers(0, 100), ahead=st.integers(0, 3), own=st.integers(1, 8))
    def follow_up(self, which: int, ahead: int, own: int) -> None:
        """A prompt that goes on from an answer, as far as it goes or a little further."""
        clients = list(self.engine.clients.values())
        client = clients[-1 - which % min(len(clients), 8)]
        end = len(client.tokens) + ahead
        if end:
            client.answer[end - 1]
        prompt = list(client.request.prompt_token_ids)
        prompt += client.answer.tokens[len(prompt) : len(prompt) + end]
        if len(prompt) + own <= 60:
            self.engine.add(prompt + self.random.choices(range(VOCABULARY), k=own), 2)

    @precondition(lambda self: self.alive())
    @rule(which=st.integers(0, 100), during_a_step=st.booleans())
    def abort(self, which: int, during_a_step: bool) -> None:
        alive = self.alive()
        self.engine.abort(alive[-1 - which % len(alive)], during_a_step=during_a_step)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(count=st.integers(1, 12))
    def more_steps(self, count: int) -> None:
        self.steps(count)

    @rule(
        what=st.sampled_from(
            [
                *["a prefill fails"] * 2,
                *PauseState,
                *[PauseState.UNPAUSED] * 5,
                *["reset", "reset all", "sleep"],
            ]
        )
    )
    def operate(self, what: str | PauseState) -> None:
        if isinstance(what, PauseState):
            self.engine.scheduler.set_pause_state(what)
        elif what == "a prefill fails":
            self.engine.device.fail_next = True
        elif what == "sleep":
            self.engine.pause_and_abort_all()
        else:
            self.engine.reset_prefix_cache(reset_running_requests=what == "reset all")

    def aborted(self) -> list[str]:
        """Requests whose ids vLLM takes again."""
        clients = self.engine.clients.items()
        ids = [request_id for request_id, client in clients if client.aborted]
        return [i for i in ids if not self.engine.is_in_a_queued_step(i)]

    @precondition(lambda self: self.aborted())
    @rule(which=st.integers(0, 100), own=st.integers(1, 48), max_tokens=ANSWERS)
    def arrive_again(self, which: int, own: int, max_tokens: int) -> None:
        ids = self.aborted()
        request_id = ids[-1 - which % len(ids)]
        self.engine.add(self.prompt(0, own), max_tokens, request_id=request_id)

    def teardown(self) -> None:
        if hasattr(self, "engine") and not self.engine.is_broken:
            self.engine.drain()
