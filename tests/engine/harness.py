# SPDX-License-Identifier: Apache-2.0
"""Drives a real vLLM engine step by step, with arrivals and aborts at given steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_duet.scheduler import DuetScheduler

MAX_STEPS = 1000


@dataclass(frozen=True)
class Arrival:
    """A request, the engine step it arrives at, and the step it is aborted at, if any.

    ``abort_when`` is asked before every step and aborts when it first says so. A ``prompt`` with
    images is a dictionary, as vLLM takes it.
    """

    request_id: str
    prompt: list[int] | str | dict[str, Any]
    params: SamplingParams
    step: int = 0
    priority: int = 0
    abort_at: int | None = None
    abort_when: Callable[[Any], bool] | None = None


@dataclass
class Answer:
    """What one client saw: per choice its tokens, text, logprobs and finish reason."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    finish_reason: dict[int, str | None] = field(default_factory=dict)
    prompt_logprobs: list[Any] | None = None
    token_steps: list[int] = field(default_factory=list)
    aborted: bool = False


ROOMY = dict(num_gpu_blocks_override=256)
"""Engines, by what they have ``make_llm`` change: plenty of KV cache, first come first served."""
CRAMPED = dict(
    num_gpu_blocks_override=18,
    max_model_len=512,
    max_num_batched_tokens=128,
    scheduling_policy="priority",
)
"""Priorities, and a KV cache that runs out."""
FULL_CACHE = dict(num_gpu_blocks_override=9, max_model_len=224)
"""A KV cache of eight blocks, which ``workloads.cache_filling`` fills."""


def make_llm(model: Path, scheduler_cls: type | str, **overrides: Any) -> LLM:
    """An engine in this process; on the CPU Model Runner V2 runs in Triton's interpreter.

    Keep it for the whole session: one that is garbage collected takes the process's
    distributed groups with it, which are every other engine's too.
    """
    settings: dict[str, Any] = dict(
        model=str(model),
        scheduler_cls=scheduler_cls,
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        block_size=32,
        seed=0,
        disable_log_stats=False,
        # Tests choose a mode for each run; this one lets the engine have lanes.
        additional_config={"duet": {"mode": "split"}},
    )
    return LLM(**(settings | overrides))


class Engine:
    """One loaded model; every ``run`` gets a fresh scheduler with an empty KV cache."""

    def __init__(self, llm: LLM) -> None:
        self.llm_engine = llm.llm_engine
        self.core = llm.llm_engine.engine_core.engine_core
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert isinstance(self.runner, GPUModelRunner)
        self.vllm_config = llm.llm_engine.vllm_config
        self._new_scheduler = self._scheduler_factory()

    def _scheduler_factory(self) -> Callable[[type], Any]:
        first = self.core.scheduler

        def make(scheduler_cls: type) -> Any:
            return scheduler_cls(
                self.vllm_config,
                kv_cache_config=first.kv_cache_config,
                structured_output_manager=first.structured_output_manager,
                block_size=first.block_size,
                hash_block_size=first.hash_block_size,
                include_finished_set=False,
                log_stats=True,
            )

        return make

    def run(
        self,
        arrivals: Iterable[Arrival],
        scheduler_cls: type = AsyncScheduler,
        on_step: Callable[[int, Any], None] | None = None,
    ) -> dict[str, Answer]:
        """Serve ``arrivals`` to the end and check that nothing leaked."""
        self.core.scheduler = scheduler = self._new_scheduler(scheduler_cls)
        for cache in self.runner.kv_caches:
            # The run before may have left just the values that a block read too
            # soon ought to have.
            if cache.is_floating_point():  # or bytes, of states and of keys and values
                cache.uniform_(-3, 3)
        arrivals = list(arrivals)
        answers = {a.request_id: Answer() for a in arrivals}
        waiting = list(arrivals)
        for step in range(MAX_STEPS):
            for arrival in [a for a in waiting if a.step <= step]:
                waiting.remove(arrival)
                self._add(arrival)
            for arrival in arrivals:
                answer = answers[arrival.request_id]
                due = arrival.abort_at is not None and step >= arrival.abort_at
                if arrival.abort_when is not None and arrival not in waiting:
                    due = due or arrival.abort_when(scheduler)
                if due and not answer.aborted and arrival not in waiting:
                    answer.aborted = True
                    self.llm_engine.abort_request([arrival.request_id])
            if not self._has_work():
                if not waiting:
                    break
                continue
            for output in self.llm_engine.step():
                self._collect(answers[output.request_id], output, step)
            if on_step is not None:
                on_step(step, scheduler)
        else:
            raise AssertionError(f"the engine did not finish within {MAX_STEPS} steps")
        self.assert_nothing_leaked(scheduler)
        return answers

    def discard(self) -> None:
        """Forget whatever a run that went wrong has left behind."""
        self.llm_engine.output_processor.abort_requests(
            list(self.llm_engine.output_processor.request_states), internal=True
        )
        self.runner._in_flight.clear()
        for request_id in list(self.runner.req_states.req_id_to_index):
            self.runner._remove_request(request_id)

    def _add(self, arrival: Arrival) -> None:
        arrival.params.output_kind = RequestOutputKind.DELTA
        prompt: Any = arrival.prompt
        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        self.llm_engine.add_request(
            arrival.request_id, prompt, arrival.params.clone(), priority=arrival.priority
        )

    def _has_work(self) -> bool:
        return (
            self.llm_engine.has_unfinished_requests()
            or self.core.scheduler.has_requests()
            or bool(self.core.batch_queue)
        )

    @staticmethod
    def _collect(answer: Answer, output: Any, step: int) -> None:
        answer.token_steps.append(step)
        if output.prompt_logprobs is not None:
            answer.prompt_logprobs = output.prompt_logprobs
        for choice in output.outputs:
            answer.tokens.setdefault(choice.index, []).extend(choice.token_ids)
            answer.text[choice.index] = answer.text.get(choice.index, "") + choice.text
            if choice.logprobs is not None:
                answer.logprobs.setdefault(choice.index, []).extend(choice.logprobs)
            if choice.finish_reason is not None:
                answer.finish_reason[choice.index] = choice.finish_reason

    def assert_nothing_leaked(self, scheduler: Any) -> None:
        """Every KV block, request and request row is back where it came from."""
        pool = scheduler.kv_cache_manager.block_pool
        lost = scheduler._kv_blocks.lost if isinstance(scheduler, DuetScheduler) else []
        free = [block for block in pool.blocks if not block.is_null and block not in lost]
        assert pool.get_num_free_blocks() == len(free)
        assert all(block.ref_cnt == 0 for block in free)
        assert not scheduler.requests and not scheduler.running and not scheduler.waiting
        assert not scheduler._inflight_prefills and not scheduler.finished_req_ids
        states = self.runner.req_states
        assert not states.req_id_to_index
        assert sorted(states.free_indices) == list(range(states.max_num_reqs))
        assert not getattr(scheduler, "_in_flight", ()) and not getattr(scheduler, "_held", ())
        assert not getattr(self.runner, "_in_flight", ())
