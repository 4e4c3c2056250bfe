# SPDX-License-Identifier: Apache-2.0
"""What orders the lanes, taken away one piece at a time: it must show.

Each mutation is served under several orders of the streams until something goes wrong: another
token than stock's, a kernel that fails, a copy whose source changed, a block or row that leaks.
Where nothing does, two accesses of the same bytes that nothing orders will do. ``UNNOTICED`` are
those that do not show, since something else keeps the same order: docs/design.md says what.
"""

from __future__ import annotations

import gc
import linecache
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from engine.harness import Arrival
from engine.scenarios import CountingScheduler
from engine.test_rules import (
    GivesBlocksAway,
    share_block_tables,
    share_input_buffers,
    share_slot_mappings,
)
from engine.workloads import cache_filling, in_flight, random_mix, tokens
from fake_gpu import FakeGpu, real_kernels
from fake_gpu.races import find_races
from fake_gpu.trace import read_trace
from gpu.real_tokens.conftest import DUET
from gpu.real_tokens.test_real_tokens import compare_all, late, who_find_a_block_of_their_step
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool

from vllm_duet.lanes import cuda
from vllm_duet.scheduler import DuetScheduler
from vllm_duet.worker import runner as runner_module

ORDERS = 4
"""Orders that a mutation is tried in."""
RACE_ORDERS = 2
"""Of those, in how many accesses that nothing orders are looked for, where tokens show nothing."""

WAITS = {
    "decode lane for the caller": ("decoding", "lane.wait_event(self._from_caller)"),
    "decode lane for what was prepared": ("decoding", "lane.wait_event(self._prepared)"),
    "caller for the decode lane": ("decoding", "caller.wait_event(ended)"),
    "preparing for the fork": ("preparing", "wait_event(self._take_fork())"),
    "prefill for what was prepared": ("_run", "lane.wait_event(ready)"),
    "prefill for the prefill before it": ("_run", "lane.wait_event(self._last_prefill)"),
    "caller for the prefill": ("result", "caller.wait_event(queued.busy.end)"),
}
"""Each wait of lanes/cuda.py: the function that it is in, and its line."""

UNNOTICED = {
    "no wait: decode lane for what was prepared",
    "no wait: prefill for the prefill before it",
    "a prefill's result not recorded for the caller",
    "a prefill's inputs not kept until the join",
    # Mostly noticed. Whether the next prefill writes over it in time is the host's threads' doing.
    "a prefill's result neither recorded nor kept",
}


@dataclass(frozen=True)
class Mutation:
    """``apply`` breaks something until monkeypatch mends it."""

    apply: Callable[[Any, pytest.MonkeyPatch], None] = lambda engine, patch: None
    arrivals: Callable[[int], list] = lambda seed: random_mix(seed, longest=200)
    engine: str = "roomy"
    scheduler: type = CountingScheduler


def without_wait(function: str, line: str) -> Callable[..., None]:
    def apply(engine: Any, patch: pytest.MonkeyPatch) -> None:
        stock, source = torch.cuda.Stream.wait_event, cuda.__file__

        def wait_event(self, event):
            caller = sys._getframe(1)
            code = caller.f_code
            text = linecache.getline(code.co_filename, caller.f_lineno)
            if (code.co_filename, code.co_name) != (source, function) or line not in text:
                stock(self, event)

        patch.setattr(torch.cuda.Stream, "wait_event", wait_event)

    return apply


def sharing(share: Callable[..., None]) -> Callable[..., None]:
    def apply(engine: Any, patch: pytest.MonkeyPatch) -> None:
        for state in engine.runner.prefill_states:
            for name, value in vars(state).items():
                patch.setattr(state, name, value)  # to be put back
            share(engine.runner, state)

    return apply


def one_state_for_two_prefills(engine: Any, patch: pytest.MonkeyPatch) -> None:
    states = engine.runner.prefill_states
    patch.setattr(engine.runner, "prefill_states", [states[0]] * len(states))


def no_deeper_pools(engine: Any, patch: pytest.MonkeyPatch) -> None:
    pools = list(reachable(engine.runner, UvaBufferPool))
    assert pools
    for pool in pools:
        patch.setattr(pool, "max_concurrency", pool.max_concurrency // 2)
        patch.setattr(pool, "_curr", 0)


def reachable(owner: Any, wanted: type) -> Iterator[Any]:
    """The objects of a class that ``owner`` refers to. gc.get_objects() lacks those that vLLM has
    frozen."""
    left, seen = [owner], {id(owner)}
    while left:
        found = left.pop()
        if isinstance(found, wanted):
            yield found
        for other in gc.get_referents(found):
            if id(other) not in seen and not isinstance(other, (type, ModuleType, FunctionType)):
                seen.add(id(other))
                left.append(other)


def result_not_recorded(engine: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def result_not_kept(engine: Any, patch: pytest.MonkeyPatch) -> None:
    result_not_recorded(engine, patch)
    stock = cuda._Launched.result

    def result(self):
        outcome = stock(self)
        self._started.result().outcome._result = None
        return outcome

    patch.setattr(cuda._Launched, "result", result)


def inputs_not_kept(engine: Any, patch: pytest.MonkeyPatch) -> None:
    stock = cuda._Launched.__init__

    def init(self, prefill, started, device):
        stock(self, None, started, device)

    patch.setattr(cuda._Launched, "__init__", init)


def blocks_touched_beside_the_prefill(engine: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner_module, "_touches_blocks", lambda output: False)


class AdmitsBesidePrefill(DuetScheduler):
    """Lets newcomers in while a prefill is in flight."""

    def _schedule_beside(self, prefill):
        return self._beside(AsyncScheduler.schedule(self), prefill)


def same_prefix(seed: int) -> list:
    """A prompt that arrives while another with the same beginning is in flight."""
    rng = random.Random(seed)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prefix = tokens(rng, 128)
    return [
        Arrival("decode", tokens(rng, 40), greedy),
        Arrival("first", prefix + tokens(rng, 9), greedy, step=4),
        Arrival("second", prefix + tokens(rng, 30), greedy, step=5),
    ]


def one_behind_another(seed: int) -> list:
    """Prompts of one length, so that the memory of one serves the next, which arrives beside it."""
    rng = random.Random(seed)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    decodes = [Arrival(f"decode-{i}", tokens(rng, 40), greedy) for i in range(4)]
    late_ones = [Arrival(f"late-{i}", tokens(rng, 90), greedy, step=3 + i) for i in range(8)]
    return decodes + late_ones


def aborted_in_flight(seed: int) -> list:
    *decodes, late_one = cache_filling(random.Random(seed))
    return [*decodes, replace(late_one, abort_when=in_flight("late"))]


def a_new_block_every_step(seed: int) -> list:
    """Each step some decode begins a KV block, and prompts are launched meanwhile."""
    rng = random.Random(seed)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    decodes = [Arrival(f"decode-{i}", tokens(rng, 20 + i), greedy) for i in range(12)]
    late_ones = [Arrival(f"late-{i}", tokens(rng, 60), greedy, step=4 + 2 * i) for i in range(4)]
    return decodes + late_ones


MUTATIONS = {
    **{
        f"no wait: {name}": Mutation(
            without_wait(*where), lambda seed: random_mix(100 + seed), "cramped"
        )
        for name, where in WAITS.items()
    },
    "rule 1: blocks of an aborted prompt given away": Mutation(
        arrivals=aborted_in_flight, engine="full_cache", scheduler=GivesBlocksAway
    ),
    "rule 2: input buffers shared": Mutation(sharing(share_input_buffers)),
    "rule 2: slot mappings shared": Mutation(sharing(share_slot_mappings)),
    "rule 2: block tables shared": Mutation(sharing(share_block_tables)),
    "rule 2: buffers shared by two prefills": Mutation(one_state_for_two_prefills),
    "rule 4: the fork before blocks are zeroed": Mutation(
        blocks_touched_beside_the_prefill, engine="zeroing"
    ),
    "rule 5: newcomers beside a prefill": Mutation(
        arrivals=same_prefix, scheduler=AdmitsBesidePrefill
    ),
    "vLLM's depth of pinned buffers": Mutation(no_deeper_pools, a_new_block_every_step),
    "a prefill's result not recorded for the caller": Mutation(
        result_not_recorded, one_behind_another
    ),
    "a prefill's result neither recorded nor kept": Mutation(result_not_kept, one_behind_another),
    "a prefill's inputs not kept until the join": Mutation(inputs_not_kept, one_behind_another),
}


def what_goes_wrong(engine, arrivals, stock, order, scheduler) -> str | None:
    """How serving in this order shows that something is broken, if it does."""
    engine.vllm_config.additional_config = {"duet": DUET | {"mode": "split"}}
    reports = len(FakeGpu().reports())
    try:
        with late(order):
            answers = engine.run(arrivals, scheduler)
        for request_id, answer in stock.items():
            for choice, wanted in answer.tokens.items():
                for at, (token, theirs) in enumerate(
                    zip(answers[request_id].tokens.get(choice, []), wanted, strict=False)
                ):
                    if token != theirs:
                        return f"token {at} of {request_id} is {token}, stock's {theirs}"
        compare_all(stock, answers)
    except Exception as error:  # whatever it is
        return f"{type(error).__name__}: {str(error)[:300]}"
    return next(iter(FakeGpu().reports()[reports:]), None)


def recover(engine) -> None:
    """Forget whatever a run that went wrong has left behind."""
    for prefill in engine.runner._in_flight:
        prefill.in_flight.wait_until_queued()
    torch.cuda.synchronize()
    real_kernels.errors.clear()
    if engine.core.batch_queue is not None:
        engine.core.batch_queue.clear()
    engine.discard()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_noticed(request, monkeypatch, tmp_path, name):
    mutation = MUTATIONS[name]
    engine = request.getfixturevalue(mutation.engine)
    found = None
    for order in range(ORDERS):
        arrivals = mutation.arrivals(order // 2)
        if order % 2 == 0:
            stock = engine.run(arrivals, AsyncScheduler)
        if order == 0:
            assert not what_goes_wrong(engine, arrivals, stock, order, CountingScheduler)
        with monkeypatch.context() as patch:
            mutation.apply(engine, patch)
            found = what_goes_wrong(engine, arrivals, stock, order, mutation.scheduler)
            if found:
                recover(engine)
                break
    for order in range(RACE_ORDERS if not found else 0):
        with monkeypatch.context() as patch, real_kernels.traced(tmp_path / "trace"):
            mutation.apply(engine, patch)
            found = what_goes_wrong(engine, arrivals, stock, order, mutation.scheduler)
        if found:
            recover(engine)
        elif races := find_races(read_trace(tmp_path / "trace")).races:
            found = f"{len(races)} races, the first: {races[0]}"
        if found:
            break
    print(f"{name}: {found or 'not noticed'} (order {order})")
    if not found and name in UNNOTICED:
        pytest.xfail("not noticed")
    assert found


def test_a_prompt_beside_the_decode_that_it_reads_from_is_noticed(
    synchronous, monkeypatch, tmp_path
):
    """Rule 5 within one step. With asynchronous scheduling vLLM registers such a block later, when
    it knows the tokens."""
    monkeypatch.setattr(DuetScheduler, "_reads_what_is_decoded", lambda *_: False)
    races = 0
    for arrivals in who_find_a_block_of_their_step(synchronous, 0):
        stock = synchronous.run(arrivals, AsyncScheduler)
        with real_kernels.traced(tmp_path / "trace"):
            found = what_goes_wrong(synchronous, arrivals, stock, 0, CountingScheduler)
        if found:
            recover(synchronous)
            return
        races += len(find_races(read_trace(tmp_path / "trace")).races)
    assert races
