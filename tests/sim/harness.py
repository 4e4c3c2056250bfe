# SPDX-License-Identifier: Apache-2.0
"""What the simulator's tests are made of. Without noise and CPU costs, times are arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_duet.plan import Join, PrefillLaunch, StepDirective
from vllm_duet.roofline import GpuProfile, ModelShape, Roofline
from vllm_duet.sim.engine import CpuCosts, RequestRecord, SimulatedEngine
from vllm_duet.sim.executor import Disturbances, GroundTruth, Interval
from vllm_duet.sim.simulation import BLOCK_SIZE, Options, Simulation

MODEL = Path(__file__).parents[2] / "eval" / "models" / "qwen3-8b"
QUIET = Disturbances(noise=0.0)
NO_COSTS = CpuCosts(0.0, 0.0, 0.0, 0.0, 0.0)


@cache
def roofline() -> Roofline:
    shape = ModelShape.from_hf_config(json.loads((MODEL / "config.json").read_text()))
    return Roofline(shape, GpuProfile.load("h100-sxm"))


@cache
def ground_truth(disturbances: Disturbances = QUIET) -> GroundTruth:
    return GroundTruth(roofline(), disturbances)


# Steps as a scheduler hands them out


def step(
    decodes: Sequence[int] = (),
    prefills: Sequence[tuple[int, int]] = (),
    directive: StepDirective | None = None,
) -> SchedulerOutput:
    """A step of decodes by context length and of prefills by (query, context) length."""
    cached: list[tuple[str, int, int, int]] = [
        (f"d{i}", 1, context, 1) for i, context in enumerate(decodes)
    ]
    new: list[NewRequestData] = []
    for i, (query, context) in enumerate(prefills):
        if context:
            cached.append((f"p{i}", query, context, 0))
        else:
            new.append(NewRequestData(f"p{i}", [0] * query, [], None, None, ([],), 0, None))
    tokens = {name: query for name, query, _, _ in cached}
    tokens |= {f"p{i}": query for i, (query, _) in enumerate(prefills)}
    output = SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=CachedRequestData(
            req_ids=[name for name, _, _, _ in cached],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(cached),
            num_computed_tokens=[context for _, _, context, _ in cached],
            num_output_tokens=[outputs for _, _, _, outputs in cached],
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        num_common_prefix_blocks=[],
        finished_req_ids=set(),
        free_encoder_mm_hashes=[],
    )
    if directive is not None:
        output.duet = directive
    return output


def launch(
    decodes: Sequence[int],
    prefills: Sequence[tuple[int, int]],
    decode_sms: int,
    launch_id: int = 0,
) -> SchedulerOutput:
    """A decode step that leaves the prefills in flight, on all the other SMs.

    From the second launch on, the step also takes an earlier one along if it is done.
    """
    prefill_sms = roofline().profile.num_sms - decode_sms
    started = PrefillLaunch(launch_id, step(prefills=prefills), decode_sms, prefill_sms)
    join = Join.IF_DONE if launch_id else None
    return step(decodes, directive=StepDirective(started, join, decode_sms))


def beside(decodes: Sequence[int], decode_sms: int) -> SchedulerOutput:
    """A decode step that takes the prefill along if it is done."""
    return step(decodes, directive=StepDirective(join=Join.IF_DONE, decode_sms=decode_sms))


def wait(decode_sms: int) -> SchedulerOutput:
    return step(directive=StepDirective(join=Join.WAIT, decode_sms=decode_sms))


# Whole simulations


@dataclass(frozen=True)
class Started:
    """An engine, and the free KV blocks it started with."""

    engine: SimulatedEngine
    free_blocks: int


class Simulated(Simulation):
    """A Simulation with ``kv_cache_tokens`` of KV cache that remembers its engines."""

    def __init__(self, options: Options, kv_cache_tokens: int | None) -> None:
        super().__init__(options)
        if kv_cache_tokens is not None:
            self.kv_cache_tokens = kv_cache_tokens
            # vLLM keeps one block for itself.
            self.max_model_len = min(self.max_model_len, kv_cache_tokens - BLOCK_SIZE)
        self.started: list[Started] = []

    def engine(self, **kwargs: Any) -> SimulatedEngine:
        engine = super().engine(**kwargs)
        self.started.append(Started(engine, free_blocks(engine)))
        return engine


def simulation(scheduler: str, *, kv_cache_tokens: int | None = None, **options: Any) -> Simulated:
    """By default without noise and CPU costs, and what the roofline says is true."""
    defaults: dict[str, Any] = dict(
        disturbances=QUIET, costs=NO_COSTS, max_num_batched_tokens=512, truth="roofline"
    )
    return Simulated(Options(MODEL, scheduler=scheduler, **(defaults | options)), kv_cache_tokens)


def free_blocks(engine: SimulatedEngine) -> int:
    return engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def gaps(record: RequestRecord) -> list[float]:
    return [b - a for a, b in zip(record.token_ms, record.token_ms[1:], strict=False)]


def token_times(records: Sequence[RequestRecord]) -> list[list[float]]:
    return [record.token_ms for record in records]


def of_lane(intervals: Sequence[Interval], lane: str) -> list[Interval]:
    return [interval for interval in intervals if interval.lane == lane]
