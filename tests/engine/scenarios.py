# SPDX-License-Identifier: Apache-2.0
"""Serves the same requests by stock vLLM and by DuetScheduler, and compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, ClassVar

import pytest
from engine.harness import Answer, Arrival, Engine
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.lanes import LanePair
from vllm_duet.lanes.serial import SerialLanePair, Timing
from vllm_duet.scheduler import DuetScheduler


class WatchedLanes(SerialLanePair):
    """Serial lanes that count the decode steps that begin when a prefill has begun."""

    def __init__(self, timing: Timing, hold_steps: int) -> None:
        super().__init__(timing, hold_steps)
        self._in_a_prefill = False

    def give_way(self) -> None:
        self._in_a_prefill = True
        super().give_way()
        self._in_a_prefill = False

    def decoding(self, decode_sms: int) -> AbstractContextManager[None]:
        CountingScheduler.seen["decode steps in the middle of a prefill"] += self._in_a_prefill
        return super().decoding(decode_sms)


class CountingScheduler(DuetScheduler):
    """DuetScheduler that counts what the tests have to reach."""

    seen: ClassVar[Counter[str]] = Counter()

    def _join(self, joined):
        self.seen["joins"] += 1
        self.seen["joins of an aborted request"] += bool(self._in_flight[0].finished)
        return super()._join(joined)

    def _preempt_request(self, request, *args, **kwargs):
        self.seen["preemptions"] += 1
        self.seen["preemptions beside a prefill"] += bool(self._in_flight)
        super()._preempt_request(request, *args, **kwargs)

    def _launch_behind(self, prefill, plan):
        in_flight = len(self._in_flight)
        output = super()._launch_behind(prefill, plan)
        self.seen["launches behind a prefill"] += len(self._in_flight) - in_flight
        return output

    def _split(self, output, plan, num_decodes):
        decode = super()._split(output, plan, num_decodes)
        self.seen["launches without a decode"] += bool(
            decode is not None and not decode.num_scheduled_tokens
        )
        return decode

    def _schedule_beside(self, prefill):
        output = super()._schedule_beside(prefill)
        decodes = output.total_num_scheduled_tokens
        self.seen["decode steps beside a prefill"] += bool(decodes)
        self.seen["pure join steps"] += not decodes
        return output


def assert_blocks_kept(step: int, scheduler: Any) -> None:
    """Rule 1 of docs/design.md: no block of a prefill in flight is free."""
    for prefill in getattr(scheduler, "_in_flight", ()):
        kept = [prefill.left.values()]
        for request_id in prefill.output.num_scheduled_tokens:
            if request_id not in prefill.left:
                kept.append(scheduler.kv_cache_manager.get_blocks(request_id).blocks)
        for blocks in chain.from_iterable(kept):
            assert all(block.ref_cnt > 0 for block in blocks)


def serve(
    engine: Engine,
    arrivals: Sequence[Arrival],
    timing: Timing,
    hold_steps: int,
    scheduler_cls: type = CountingScheduler,
    **duet: Any,
) -> dict[str, Answer]:
    """The answers of a DuetScheduler with the options ``duet``."""
    return serve_on(WatchedLanes(timing, hold_steps), engine, arrivals, scheduler_cls, **duet)


def serve_on(
    lanes: LanePair,
    engine: Engine,
    arrivals: Sequence[Arrival],
    scheduler_cls: type = CountingScheduler,
    on_step: Callable[[int, Any], None] | None = None,
    **duet: Any,
) -> dict[str, Answer]:
    engine.runner.lanes.shutdown()
    engine.runner.lanes = lanes
    engine.vllm_config.additional_config = {"duet": duet}
    if scheduler_cls is CountingScheduler and on_step is None:
        on_step = assert_blocks_kept
    return engine.run(arrivals, scheduler_cls, on_step)


def compare(stock: Answer, duet: Answer) -> None:
    if stock.aborted or duet.aborted:
        # They were cut off after different numbers of tokens.
        for choice, tokens in stock.tokens.items():
            theirs = duet.tokens.get(choice, [])
            shorter = min(len(tokens), len(theirs))
            assert tokens[:shorter] == theirs[:shorter]
        return
    assert duet.tokens == stock.tokens
    assert duet.finish_reason == stock.finish_reason
    assert duet.text == stock.text
    assert duet.logprobs.keys() == stock.logprobs.keys()
    for choice, positions in stock.logprobs.items():
        for ours, theirs in zip(duet.logprobs[choice], positions, strict=True):
            compare_logprobs(ours, theirs)
    assert (duet.prompt_logprobs is None) == (stock.prompt_logprobs is None)
    for ours, theirs in zip(duet.prompt_logprobs or [], stock.prompt_logprobs or [], strict=True):
        if theirs is not None:
            compare_logprobs(ours, theirs)


def compare_logprobs(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for token_id, logprob in theirs.items():
        assert ours[token_id].logprob == pytest.approx(logprob.logprob, abs=1e-3)


def run_both(
    engine: Engine, arrivals: Sequence[Arrival], timing: Timing, hold_steps: int, **duet: Any
) -> None:
    CountingScheduler.seen["runs"] += 1
    stock = engine.run(arrivals, AsyncScheduler)
    answers = serve(engine, arrivals, timing, hold_steps, **duet)
    for arrival in arrivals:
        compare(stock[arrival.request_id], answers[arrival.request_id])
