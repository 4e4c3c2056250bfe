# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine loop in virtual time, around a real scheduler object.

The loop is that of ``EngineCore.step_with_batch_queue`` under asynchronous scheduling:
up to two steps are queued, so a step is scheduled while the one before it runs, and
what arrives meanwhile waits for the next. Without asynchronous scheduling there is one
step at a time, and the GPU waits while the CPU works.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_duet.plan import JoinedPrefill, directive_of
from vllm_duet.sim.executor import Ran, SimulatedGpu
from vllm_duet.sim.traces import TraceRequest, prompts

QUEUE_SIZE = 2
"""Steps in flight under asynchronous scheduling (VllmConfig.max_concurrent_batches)."""

TOKEN = 0
"""Every made-up token. Prompts of trace requests that share nothing share no block either."""


@dataclass(frozen=True, slots=True)
class CpuCosts:
    """What the engine's thread takes, in ms, for a step and for each of its requests.

    The defaults are this project's measurement of stock vLLM on two CPU cores: about
    0.12, 0.40 and 1.7 ms to schedule 16, 64 and 256 requests, and two thirds of that to
    process their output. ``launch_ms`` is from the scheduler's output to the GPU's start.
    """

    schedule_ms: float = 0.02
    schedule_request_ms: float = 0.0065
    update_ms: float = 0.02
    update_request_ms: float = 0.005
    launch_ms: float = 0.3


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """What the API server's one thread takes before a request is with the engine: HTTP and
    chat template for each request, and the tokenizer for each token of its prompt."""

    request_ms: float = 0.0
    token_us: float = 0.0


@dataclass(slots=True)
class RequestRecord:
    """One request as its client sees it; times in ms of the simulation."""

    request_id: str
    arrival_ms: float
    input_length: int
    output_length: int
    token_ms: list[float] = field(default_factory=list)


class Arrivals:
    """Requests as they reach the engine: sent by the trace's clock or, in a closed loop, by
    ``concurrency`` clients that send their next when an answer is complete; then one by one
    through the front end."""

    def __init__(
        self,
        records: Sequence[RequestRecord],
        requests: Iterable[Request],
        front_end: FrontEnd,
        concurrency: int | None,
    ) -> None:
        self._waiting = deque(records)
        self._requests = iter(requests)
        self._front_end = front_end
        self._free_ms = 0.0
        self._closed = concurrency is not None
        # When each is sent that has been sent or, by the trace, will be.
        self._sent_ms = (
            deque(record.arrival_ms for record in records)
            if concurrency is None
            else deque([0.0] * min(concurrency, len(records)))
        )

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next_ms(self) -> float:
        """When the next request reaches the engine; infinite while all clients wait."""
        if not self._sent_ms:
            return math.inf
        cost_ms = self._front_end.request_ms
        cost_ms += 1e-3 * self._front_end.token_us * self._waiting[0].input_length
        return max(self._sent_ms[0], self._free_ms) + cost_ms

    def until(self, now_ms: float) -> Iterator[Request]:
        """Those that have reached the engine by now."""
        while self._waiting and (at_ms := self.next_ms()) <= now_ms:
            self._free_ms = at_ms
            self._waiting.popleft().arrival_ms = self._sent_ms.popleft()
            yield next(self._requests)

    def finished(self, now_ms: float) -> None:
        """An answer is complete."""
        if self._closed and len(self._sent_ms) < len(self._waiting):
            self._sent_ms.append(now_ms)


class SimulatedClock:
    """Virtual time, in the form that DuetScheduler reads: seconds, by calling it."""

    def __init__(self) -> None:
        self.ms = 0.0

    def __call__(self) -> float:
        return self.ms / 1e3


def made_up_output(output: SchedulerOutput, scheduler: Scheduler) -> ModelRunnerOutput:
    """One token for every request whose prompt this step completes.

    To be asked right after the step was scheduled: it reads the requests' state.
    """
    requests, ids = scheduler.requests, list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=[[] if requests[i].is_prefill_chunk else [TOKEN] for i in ids],
    )


class SimulatedEngine:
    """One engine: a real scheduler, a simulated GPU, and the loop between them."""

    def __init__(
        self,
        scheduler: Scheduler,
        gpu: SimulatedGpu,
        clock: SimulatedClock,
        *,
        costs: CpuCosts | None = None,
        front_end: FrontEnd | None = None,
        queue_size: int = QUEUE_SIZE,
        join_after_lookahead: bool = False,
    ) -> None:
        """``queue_size``: 1 without asynchronous scheduling. ``join_after_lookahead``: a
        prefill joins after as many decode steps as its plan foresaw, as in the paper, and
        not by event."""
        self.scheduler = scheduler
        self.gpu = gpu
        self.clock = clock
        self.num_preempted = 0
        self._costs = costs or CpuCosts()
        self._front_end = front_end or FrontEnd()
        self._queue_size = queue_size
        self._join_after_lookahead = join_after_lookahead
        self._queue: deque[tuple[SchedulerOutput, ModelRunnerOutput, Ran]] = deque()
        self._prefill_results: dict[int, ModelRunnerOutput] = {}

    def run(
        self,
        trace: Sequence[TraceRequest],
        on_finished: Callable[[RequestRecord], None] = lambda _: None,
        concurrency: int | None = None,
    ) -> list[RequestRecord]:
        """Serve all requests of a trace; returns them in its order.

        They arrive when the trace says or, with ``concurrency``, in a closed loop of as
        many clients, as from ``vllm bench serve --max-concurrency``.
        """
        records = [
            RequestRecord(f"r{i}", r.arrival_ms, r.input_length, r.output_length)
            for i, r in enumerate(trace)
        ]
        by_id = {record.request_id: record for record in records}
        arrivals = Arrivals(records, self._requests(trace), self._front_end, concurrency)
        while arrivals or self._queue or self.scheduler.has_requests():
            if arrivals and not self._queue and not self.scheduler.has_requests():
                self.clock.ms = max(self.clock.ms, arrivals.next_ms())
            for request in arrivals.until(self.clock.ms):
                self.scheduler.add_request(request)
            for request_id, count, finished in self._step():
                record = by_id[request_id]
                record.token_ms += [self.clock.ms] * count
                if finished:
                    arrivals.finished(self.clock.ms)
                    on_finished(record)
        return records

    def _requests(self, trace: Sequence[TraceRequest]) -> Iterator[Request]:
        init_none_hash(sha256)
        block_hasher = get_request_block_hasher(self.scheduler.hash_block_size, sha256)
        for i, (request, tokens) in enumerate(zip(trace, prompts(trace), strict=True)):
            yield Request(
                request_id=f"r{i}",
                prompt_token_ids=tokens,
                sampling_params=SamplingParams(max_tokens=request.output_length, ignore_eos=True),
                pooling_params=None,
                arrival_time=request.arrival_ms / 1e3,
                block_hasher=block_hasher,
            )

    def _step(self) -> list[tuple[str, int, bool]]:
        """One turn of the loop; returns (request, new tokens, finished) of its outputs."""
        scheduler = self.scheduler
        if len(self._queue) < self._queue_size and scheduler.has_requests():
            output = scheduler.schedule()
            num_requests = len(output.num_scheduled_tokens)
            self.num_preempted += len(output.preempted_req_ids or ())
            self.clock.ms += (
                self._costs.schedule_ms + num_requests * self._costs.schedule_request_ms
            )
            self._queue.append((output, *self._launch(output)))
            if len(self._queue) < self._queue_size:
                return []
        output, result, ran = self._queue.popleft()
        num_requests = len(output.num_scheduled_tokens)
        self.clock.ms = max(self.clock.ms, ran.end_ms)
        # Clients get the tokens when the scheduler has processed them.
        self.clock.ms += self._costs.update_ms + num_requests * self._costs.update_request_ms
        outputs = scheduler.update_from_output(output, result)
        return [
            (item.request_id, len(item.new_token_ids), item.finish_reason is not None)
            for item in itertools.chain.from_iterable(o.outputs for o in outputs.values())
        ]

    def _launch(self, output: SchedulerOutput) -> tuple[ModelRunnerOutput, Ran]:
        result = made_up_output(output, self.scheduler)
        directive = directive_of(output)
        join_after = None
        if directive is not None and directive.launch is not None:
            launch = directive.launch
            self._prefill_results[launch.launch_id] = made_up_output(launch.output, self.scheduler)
            if self._join_after_lookahead:
                join_after = self.scheduler.plan_in_flight.lookahead
        ran = self.gpu.run(output, self.clock.ms + self._costs.launch_ms, join_after)
        if ran.joined is not None:
            launch_id = ran.joined.launch_id
            result.duet = JoinedPrefill(
                launch_id,
                self._prefill_results.pop(launch_id),
                prefill_busy_ms=ran.prefill_busy_ms,
            )
        # The engine's thread launches an eager prefill kernel by kernel.
        self.clock.ms += ran.launch_cpu_ms
        return result, ran
