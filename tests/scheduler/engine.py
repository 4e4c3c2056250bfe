# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine loops around a real scheduler and the modelled device, with its clients.

After every step the invariants of docs/design.md are checked, and every token against what
its request has to get.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import torch
from scheduler.device import Answer, Device, first_read
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_duet.plan import Mode
from vllm_duet.policy import FixedModePolicy, RandomPolicy

MODEL = Path(__file__).parents[2] / "eval" / "models" / "qwen3-8b"
BLOCK_SIZE = 4
NUM_SMS, DECODE_SMS = 132, 32
NUM_CAPPED_TOKENS = 6
QUEUE_SIZE = 2
"""Steps in flight under asynchronous scheduling."""

IDLE_STEPS = 40
"""In a row, without a token and without a join: then nothing is going on any more."""

MOST_STEPS = 2000
"""To serve what is left at the end of a run."""


@dataclass(frozen=True)
class Shape:
    """An engine as its options make it; ``windows`` as in :class:`scheduler.device.Answer`."""

    blocks_a_group: int = 200
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 24
    windows: tuple[int, ...] = (0,)
    asynchronous: bool = True
    by_priority: bool = False
    mode: str = "split"
    seed: int = 0

    @property
    def num_blocks(self) -> int:
        return self.blocks_a_group * len(self.windows)


@dataclass
class Client:
    """One request as its client sees it."""

    request: Request
    answer: Answer
    number: int
    stop_token: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    aborted: bool = False
    admitted: bool = False

    @property
    def is_done(self) -> bool:
        return self.aborted or self.finish_reason is not None


def watched(method: Any) -> Any:
    """An engine in which it raises is broken, and not to be used any more."""

    @functools.wraps(method)
    def run(self: Engine, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            self.is_broken = True
            raise

    return run


@functools.cache
def vllm_config() -> VllmConfig:
    init_none_hash(sha256)
    return EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=120,
        max_num_batched_tokens=128,
        max_num_seqs=16,
        async_scheduling=False,
    ).create_engine_config()


def make_scheduler(scheduler_cls: type, shape: Shape) -> Any:
    config = vllm_config()
    config.scheduler_config.max_num_seqs = shape.max_num_seqs
    config.scheduler_config.max_num_batched_tokens = shape.max_num_batched_tokens
    config.scheduler_config.policy = "priority" if shape.by_priority else "fcfs"
    config.cache_config.block_size = BLOCK_SIZE
    config.cache_config.num_gpu_blocks = shape.num_blocks
    config.additional_config = {"duet": {"mode": "aggregated"}}
    common = dict(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    specs = [
        SlidingWindowSpec(**common, sliding_window=window)
        if window
        else FullAttentionSpec(**common)
        for window in shape.windows
    ]
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    scheduler = scheduler_cls(
        config,
        kv_cache_config=KVCacheConfig(shape.num_blocks, [], groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=False,
    )
    # Splitting is decided as on a device with two lanes.
    scheduler._blockers = []
    scheduler._policy = (
        RandomPolicy(shape.seed, [DECODE_SMS], NUM_SMS)
        if shape.mode == "random"
        else FixedModePolicy(Mode(shape.mode), DECODE_SMS, NUM_SMS - DECODE_SMS, NUM_CAPPED_TOKENS)
    )
    return scheduler


class Engine:
    """``step`` is EngineCore.step, or step_with_batch_queue where it is asynchronous."""

    def __init__(self, scheduler_cls: type, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.scheduler = make_scheduler(scheduler_cls, shape)
        self.device = Device(
            shape.max_num_seqs, shape.num_blocks, BLOCK_SIZE, shape.windows, Random(seed)
        )
        self.clients: dict[str, Client] = {}
        self.num_tokens = 0
        self.is_broken = False
        self._queue: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._aborts: list[str] = []
        self._block_hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._idle_steps = 0
        self._num_arrived = 0
        self._may_fail: set[str] = set()

    # What clients and operators do

    @watched
    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop_token: int = -1,
        priority: int = 0,
        request_id: str | None = None,
        mm_features: list[Any] | None = None,
    ) -> str:
        number = self._num_arrived
        self._num_arrived += 1
        request_id = request_id or f"r{number}"
        stops = [stop_token] if stop_token >= 0 else []
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stops
            ),
            pooling_params=None,
            arrival_time=float(number),
            priority=priority,
            mm_features=mm_features,
            block_hasher=self._block_hasher,
        )
        answer = Answer(prompt, self.shape.windows)
        self.clients[request_id] = Client(request, answer, number, stop_token)
        self.scheduler.add_request(request)
        return request_id

    @watched
    def abort(self, request_id: str, *, during_a_step: bool) -> None:
        """At once, or when a step has run and its output has not been processed."""
        self.clients[request_id].aborted = True
        if during_a_step:
            self._aborts.append(request_id)
        else:
            self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)

    def is_in_a_queued_step(self, request_id: str) -> bool:
        """Stock vLLM takes the id of such a request, but its output for the new request's."""
        return request_id in self._aborts or any(
            request_id in output.num_scheduled_tokens for output, _ in self._queue
        )

    @watched
    def reset_prefix_cache(self, *, reset_running_requests: bool) -> None:
        scheduler = self.scheduler
        has_blocks = any(
            blocks
            for group in scheduler.kv_cache_manager.coordinator.single_type_managers
            for blocks in group.req_to_blocks.values()
        )
        succeeded = scheduler.reset_prefix_cache(reset_running_requests)
        assert succeeded == (reset_running_requests or not has_blocks), (
            "the prefix cache was not reset as vLLM would"
        )
        if succeeded:
            self.device.forget_everything()

    @watched
    def pause_and_abort_all(self) -> None:
        """EngineCore.pause_scheduler as ``sleep`` calls it."""
        for client in self.clients.values():
            client.aborted |= not client.is_done
        self._aborts.clear()
        self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        self.scheduler.set_pause_state(PauseState.PAUSED_NEW)
        self.reset_prefix_cache(reset_running_requests=True)

    def has_work(self) -> bool:
        return self.scheduler.has_requests() or bool(self._queue)

    # The loop

    @watched
    def step(self) -> None:
        if not self.has_work():
            self._process_aborts()
            return
        before = self.num_tokens, len(self.device.in_flight)
        if self.shape.asynchronous:
            self._step_with_batch_queue()
        else:
            self._queue.append(self._schedule())
            self._update()
        moved = (self.num_tokens, len(self.device.in_flight)) != before
        paused = self.scheduler.pause_state is not PauseState.UNPAUSED
        self._idle_steps = 0 if moved or paused else self._idle_steps + 1
        assert self._idle_steps < IDLE_STEPS, "nothing is going on any more"
        self.check()

    def _step_with_batch_queue(self) -> None:
        if self.scheduler.has_requests():
            self._queue.append(self._schedule())
            executed = self._queue[-1][0].total_num_scheduled_tokens > 0
            if len(self._queue) < QUEUE_SIZE and (executed or self.scheduler.has_requests()):
                return
        self._update()

    def _schedule(self) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        output = self.scheduler.schedule()
        self._look_at_admissions(output)
        return output, self.device.execute(output)

    def _update(self) -> None:
        output, result = self._queue.popleft()
        self._process_aborts()
        joined = getattr(result, "duet", None)
        if joined is not None:
            if joined.error is not None:
                # Those behind it may have found its blocks in the prefix cache.
                in_flight = self.device.in_flight
                self._may_fail |= {q.request_id for p in in_flight for q in p.queries}
            self.device.in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for item in outputs.outputs:
                self._receive(item)

    def _process_aborts(self) -> None:
        aborts, self._aborts = self._aborts, []
        if aborts:
            self.scheduler.finish_requests(aborts, RequestStatus.FINISHED_ABORTED)

    def _receive(self, item: Any) -> None:
        client = self.clients[item.request_id]
        assert not client.is_done, f"{item.request_id} is answered after its end"
        for token in item.new_token_ids:
            assert token == client.answer[len(client.tokens)], (
                f"{item.request_id} gets a wrong token number {len(client.tokens)}"
            )
            client.tokens.append(token)
            self.num_tokens += 1
        if (reason := item.finish_reason) is None:
            return
        client.finish_reason = reason
        if reason is FinishReason.ERROR:
            assert item.request_id in self._may_fail
        elif reason is FinishReason.STOP:
            assert client.tokens[-1] == client.stop_token
        else:
            assert reason is FinishReason.LENGTH
            assert len(client.tokens) == client.request.max_tokens
        assert client.stop_token not in client.tokens[:-1]

    # Invariants

    def check(self) -> None:
        self._check_queues()
        self._check_blocks()

    def _check_queues(self) -> None:
        scheduler = self.scheduler
        held = getattr(scheduler, "_held", [])
        queued = Counter(
            request.request_id
            for request in chain(
                scheduler.running, held, scheduler.waiting, scheduler.kv_holding_waiting
            )
        )
        assert all(count == 1 for count in queued.values()), "a request is queued twice"
        alive = {i for i, c in self.clients.items() if not c.is_done or i in self._aborts}
        assert queued.keys() == alive, "a request is lost"
        in_flight = {q.request_id for p in self.device.in_flight for q in p.queries}
        running = {request.request_id for request in scheduler.running}
        assert not running & in_flight, "a request is in flight and running at once"
        assert len(running) + len(held) <= self.shape.max_num_seqs

    def _check_blocks(self) -> None:
        """Blocks are conserved, and those of a prefill in flight are nobody else's."""
        manager = self.scheduler.kv_cache_manager
        pool = manager.block_pool
        owners: dict[int, set[str]] = {}
        for group in manager.coordinator.single_type_managers:
            for request_id, blocks in group.req_to_blocks.items():
                for block in blocks:
                    owners.setdefault(block.block_id, set()).add(request_id)
        null = pool.null_block.block_id
        owners.pop(null, None)
        used = set(owners)
        later: set[str] = set()
        for prefill in reversed(self.device.in_flight):
            ids = {query.request_id for query in prefill.queries}
            for query in prefill.queries:
                end = -(-(query.start + query.num_tokens) // BLOCK_SIZE)
                for table, window in zip(query.block_table, self.shape.windows, strict=True):
                    read = set(table[first_read(window, query.start) // BLOCK_SIZE : end])
                    assert all(pool.blocks[i].ref_cnt > 0 for i in read), (
                        "a block of a prefill in flight is free"
                    )
                    # Behind the window a request may have given some back already.
                    used |= read | {i for i in table if pool.blocks[i].ref_cnt > 0}
                    for block in table[query.start // BLOCK_SIZE : end]:
                        others = owners.get(block, set()) - ids - later
                        assert not others, f"a block in flight is also of {others}"
            later |= ids
        used.discard(null)
        assert all(pool.blocks[i].ref_cnt > 0 for i in used), "a block in use is free"
        free = pool.get_num_free_blocks()
        assert free + len(used) == pool.num_gpu_blocks - 1, "a block is lost"

    def _look_at_admissions(self, output: SchedulerOutput) -> None:
        """How many later prompts overtake a prompt, first come first served."""
        if self.shape.by_priority:
            return
        launch = getattr(getattr(output, "duet", None), "launch", None)
        for part in [output] + ([launch.output] if launch is not None else []):
            for request_id in part.preempted_req_ids or ():
                if (client := self.clients.get(request_id)) is not None:
                    # It starts anew, and stale output may keep it waiting.
                    client.admitted = True
            for new in part.scheduled_new_reqs:
                admitted = self.clients[new.req_id]
                admitted.admitted = True
                for client in self.clients.values():
                    if client.is_done or client.tokens or client.number >= admitted.number:
                        continue
                    if client.request.num_preemptions:
                        continue
                    assert client.admitted, "a prompt is started before an earlier one"
                    assert not client.request.is_prefill_chunk, "a partial prompt is overtaken"

    def drain(self) -> None:
        """Serve all requests to their end; nothing may be left then."""
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        for _ in range(MOST_STEPS):
            if not self.has_work() and not self._aborts:
                break
            self.step()
        else:
            raise AssertionError("it does not come to an end")
        for request_id, client in self.clients.items():
            assert client.is_done, f"{request_id} was never answered"
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not self.scheduler.requests and not self.device.in_flight
        assert not self.device.row_of and len(self.device.free_rows) == self.shape.max_num_seqs
