# SPDX-License-Identifier: Apache-2.0
"""Drawn requests on the real engine: few request rows, short answers, asynchronous scheduling.

The draws are those of ``tests/scheduler``, where thousands of them are served by the real
scheduler on a modelled device. Here some are served by all that there is.
"""

from __future__ import annotations

import random

from engine.harness import Arrival
from engine.scenarios import CountingScheduler, run_both, serve
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scheduler.draws import Draw, requests
from scheduler.mutants import PrefillsOnTheDecodeLane
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet import scheduler as duet_scheduler

BLOCK_SIZE = 32
VOCABULARY = range(3, 510)


def arrivals_of(draws: list[tuple[Draw, int, int | None]], seed: int) -> list[Arrival]:
    rng = random.Random(seed)
    shared = rng.choices(VOCABULARY, k=8 * BLOCK_SIZE)
    arrivals, step = [], 0
    for number, (draw, pause, abort_after) in enumerate(draws):
        step += pause
        arrivals.append(
            Arrival(
                f"r{number}",
                shared[: draw.shared] + rng.choices(VOCABULARY, k=draw.own),
                SamplingParams(
                    temperature=0, max_tokens=draw.max_tokens, ignore_eos=True, detokenize=False
                ),
                step=step,
                abort_at=None if abort_after is None else step + abort_after,
            )
        )
    return arrivals


ALONE = [
    arrivals_of(
        [
            (Draw(shared=0, own=40, max_tokens=5, priority=0), 0, None),
            (Draw(shared=64, own=0, max_tokens=3, priority=0), 2, None),
            (Draw(shared=32, own=9, max_tokens=3, priority=0), pause, None),
        ],
        seed=1,
    )
    for pause in range(1, 6)
]
"""For the last prompt there is a step in which nobody decodes: the last token of the only
decode is in flight. It finds blocks in the prefix cache that the second has not written."""


def test_newcomers_may_be_alone_in_a_step_beside_a_prefill(few_rows):
    before = CountingScheduler.seen["launches without a decode"]
    for arrivals in ALONE:
        run_both(few_rows, arrivals, "late", 4, mode="split")
    assert CountingScheduler.seen["launches without a decode"] > before


def test_newcomers_on_the_decode_lane_are_noticed(few_rows, monkeypatch):
    # The scheduler would notice by itself.
    monkeypatch.setattr(duet_scheduler, "has_prefill", lambda output: False)
    noticed = 0
    for arrivals in ALONE:
        stock = few_rows.run(arrivals, AsyncScheduler)
        duet = serve(few_rows, arrivals, "late", 4, PrefillsOnTheDecodeLane, mode="split")
        noticed += any(duet[i].tokens != answer.tokens for i, answer in stock.items())
    assert noticed


@settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    draws=st.lists(
        st.tuples(
            requests(BLOCK_SIZE, 150, st.integers(1, 6)),
            st.integers(0, 2),
            st.one_of(st.none(), st.none(), st.integers(1, 6)),
        ),
        min_size=8,
        max_size=14,
    ),
    timing=st.sampled_from(["early", "late"]),
    hold_steps=st.integers(0, 6),
    mode=st.sampled_from(["split", "split", "random"]),
    seed=st.integers(0, 1000),
)
def test_tokens_are_stocks_for_any_draw(few_rows, draws, timing, hold_steps, mode, seed):
    run_both(few_rows, arrivals_of(draws, seed), timing, hold_steps, mode=mode, seed=seed)


def test_the_draws_reach_what_they_are_for():
    seen = CountingScheduler.seen
    for event in ("launches behind a prefill", "joins of an aborted request", "pure join steps"):
        assert seen[event]
