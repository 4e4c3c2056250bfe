# SPDX-License-Identifier: Apache-2.0
"""What can be simulated: vllm-duet, its ablations, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from random import Random
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_duet.in_flight import InFlightPrefill
from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import (
    IDLE,
    FixedModePolicy,
    ForecastPolicy,
    IntArray,
    Load,
    Policy,
    PolicyLimits,
    sm_groups,
    validate_decode_sms,
)
from vllm_duet.roofline import (
    BatchSummary,
    GpuProfile,
    ModelShape,
    Roofline,
    StepTimeCorrection,
)
from vllm_duet.scheduler import DuetScheduler
from vllm_duet.sim.engine import SimulatedClock
from vllm_duet.support import LIMITS, deciding_blockers

PolicyFactory = Callable[[Roofline, PolicyLimits, StepTimeCorrection], Policy]


@dataclass(frozen=True, slots=True)
class System:
    """One way to run the decisions of DuetScheduler.

    Without a policy it is ``stock``: vLLM's own scheduler, or a subclass of it.
    """

    summary: str
    policy: PolicyFactory | None
    stock: type[AsyncScheduler] = AsyncScheduler
    event_join: bool = True
    contention: bool = True
    follows: bool = True


class SimulatedDuetScheduler(DuetScheduler):
    """DuetScheduler with a policy that is given, on a GPU that can be split if the model can.

    ``has_lanes``: whether the GPU's SMs can be divided, and that pays.
    """

    def __init__(
        self,
        *args: Any,
        policy: Callable[[StepTimeCorrection], Policy],
        clock: SimulatedClock,
        follows: bool = True,
        has_lanes: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._blockers = [
            limit.feature
            for limit in LIMITS
            if limit.about == "model" and limit.applies(self.vllm_config, self.kv_cache_config)
        ]
        if not has_lanes:
            self._blockers.append("no lanes")
        correction = StepTimeCorrection()
        decides = not deciding_blockers(self.vllm_config)
        self._decide_by(policy(correction) if decides else None, correction, clock)
        self._follows = follows

    def _plan_to_follow(self, prefill: InFlightPrefill) -> DuetPlan | None:
        return super()._plan_to_follow(prefill) if self._follows else None

    @property
    def plan_in_flight(self) -> DuetPlan:
        """The plan of the prefill launched last."""
        return self._in_flight[-1].plan


class NoContention(Roofline):
    """Forecasts two lanes as if each had the memory bus to itself, as the paper does."""

    def plan_ms(
        self, decode: BatchSummary, prefill: BatchSummary, decode_sms: IntArray
    ) -> tuple[float, float, float, list[float], list[float]]:
        forecast = super().plan_ms(decode, prefill, decode_sms)
        if not decode_sms.size:
            return forecast
        whole = forecast[:3]
        prefill_sms = self.profile.num_sms - decode_sms
        lanes = self.step_ms(decode, decode_sms), self.step_ms(prefill, prefill_sms)
        return *whole, np.asarray(lanes[0]).tolist(), np.asarray(lanes[1]).tolist()


class PaperPolicy:
    """Algorithm 1 of DuetServe (arXiv 2511.04791).

    A mixed step that is forecast to keep the bound stays; otherwise, of the decode
    lanes that keep it, the one with the most tokens a second over
    k = ceil(prefill time / decode time) decode steps and the prefill. Where none keeps
    it, the one with the shortest decode step.
    """

    def __init__(self, roofline: Roofline, limits: PolicyLimits, _: StepTimeCorrection) -> None:
        self._lanes = np.array(sm_groups(roofline.profile))
        self._num_sms = roofline.profile.num_sms
        self._roofline, self._bound_ms = roofline, limits.tbt_slo_ms

    def decide(
        self,
        decode_context_lens: Sequence[int],
        prefill_query_lens: Sequence[int],
        prefill_context_lens: Sequence[int],
        *,
        can_split: bool,
        can_cap: bool = True,
        load: Load = IDLE,
        lane_in_use: int | None = None,
    ) -> DuetPlan:
        decode = self._roofline.decode_summary(decode_context_lens)
        prefill = self._roofline.prefill_summary(prefill_query_lens, prefill_context_lens)
        mixed_ms, _, _, steps_ms, prefills_ms = self._roofline.plan_ms(decode, prefill, self._lanes)
        if mixed_ms <= self._bound_ms or not can_split:
            return DuetPlan(Mode.AGGREGATED, "keeps the bound", tbt_ms=mixed_ms)
        tokens = sum(prefill_query_lens)

        def rank(lane: int) -> tuple[float, float]:
            step_ms, prefill_ms = steps_ms[lane], prefills_ms[lane]
            if step_ms > self._bound_ms:
                return 0.0, -step_ms
            steps = ceil(prefill_ms / step_ms)
            return (steps * len(decode_context_lens) + tokens) / max(
                steps * step_ms, prefill_ms
            ), 0.0

        lane = max(range(self._lanes.size), key=rank)
        step_ms, prefill_ms = steps_ms[lane], prefills_ms[lane]
        decode_sms = int(self._lanes[lane])
        return DuetPlan(
            Mode.SPLIT,
            "breaks the bound",
            decode_sms=decode_sms,
            prefill_sms=self._num_sms - decode_sms,
            lookahead=ceil(prefill_ms / step_ms),
            tbt_ms=step_ms,
            prefill_ms=prefill_ms,
        )


class Uncapped(ForecastPolicy):
    """Without CAPPED: the prefill of a step is whole."""

    def chunk_sizes(self, prefill_tokens: int) -> IntArray:
        return np.array([prefill_tokens])


class CountsTokens(ForecastPolicy):
    """The objective is tokens a second."""

    def decode_price(
        self, num_decodes: int, prefill_tokens: int, mixed_ms: float, *_: Any
    ) -> float:
        return mixed_ms * num_decodes / (num_decodes + prefill_tokens)


class CountsAlone(ForecastPolicy):
    """A decode step is worth what it costs alone, whatever the load."""

    def decode_price(self, *args: Any) -> float:
        *_, decode_ms, _ = args
        return float(decode_ms)


class CountsAdded(ForecastPolicy):
    """A decode step is worth what it adds to a mixed step, whatever the load."""

    def decode_price(self, *args: Any) -> float:
        *_, mixed_ms, prefill_ms, _, _ = args
        return float(mixed_ms - prefill_ms)


def _limited(**changes: Any) -> PolicyFactory:
    """ForecastPolicy with other limits."""

    def policy(
        roofline: Roofline, limits: PolicyLimits, correction: StepTimeCorrection
    ) -> ForecastPolicy:
        return ForecastPolicy(roofline, replace(limits, **changes), correction)

    return policy


def _uncorrected(roofline: Roofline, limits: PolicyLimits, _: StepTimeCorrection) -> ForecastPolicy:
    return ForecastPolicy(roofline, limits)


def _fixed_split(decode_sms: int | None = None) -> System:
    """Not told how many: the SM group nearest to 30 %."""

    def policy(roofline: Roofline, *_: Any) -> FixedModePolicy:
        profile = roofline.profile
        step = profile.sm_granularity
        sms = decode_sms or round(0.3 * profile.num_sms / step) * step
        validate_decode_sms(profile, [sms])
        return FixedModePolicy(Mode.SPLIT, sms, profile.num_sms - sms, 0)

    return System("always split, N SMs for decode, 30 % if N is not given", policy)


def _prefill_cap(tokens: int = 512) -> System:
    def policy(*_: Any) -> FixedModePolicy:
        return FixedModePolicy(Mode.CAPPED, 0, 0, tokens)

    return System("stock with at most N prefill tokens beside decodes; N is 512", policy)


def _prefill_interval(steps: int = 4) -> System:
    class PrefillAtIntervals(AsyncScheduler):
        """Beside decodes, prefill only at each ``steps``-th step (vLLM's pull request 56848)."""

        def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
            # Else vLLM's own throttling ends as soon as prompts queue up.
            self.prefill_capacity_bound = False
            return super().schedule(throttle_prefills or self.current_step % steps != 0)

    summary = "stock with prefill beside decodes only at each N-th step; N is 4"
    return System(summary, None, PrefillAtIntervals)


_PARAMETRIC: dict[str, Callable[..., System]] = {
    "fixed-split": _fixed_split,
    "prefill-cap": _prefill_cap,
    "prefill-interval": _prefill_interval,
}


def system_named(name: str) -> System:
    """The system of that name; ``fixed-split:48`` is ``fixed-split`` with an N of 48.

    Raises:
        KeyError: there is none.
    """
    base, _, number = name.partition(":")
    if not number:
        return SYSTEMS[name]
    if not (number.isascii() and number.isdigit() and int(number)):
        raise KeyError(name)
    return _PARAMETRIC[base](int(number))


SYSTEMS = {
    "stock": System("vLLM's AsyncScheduler", None),
    "duet": System("DuetScheduler as it ships", ForecastPolicy),
    "paper": System(
        "DuetServe's Algorithm 1: join after k steps, no caps, no contention term",
        PaperPolicy,
        event_join=False,
        contention=False,
        follows=False,
    ),
    **{name: system() for name, system in _PARAMETRIC.items()},
    "disaggregated": System("stock, prefill and decode on a GPU each, counted per GPU", None),
    "duet-join-after-k": System(
        "duet, joined after k steps", ForecastPolicy, event_join=False, follows=False
    ),
    "duet-one-in-flight": System(
        "duet that never launches a prefill behind another", ForecastPolicy, follows=False
    ),
    "duet-counts-tokens": System("duet, objective tokens a second", CountsTokens),
    "duet-counts-alone": System("duet, a decode step worth one alone", CountsAlone),
    "duet-counts-added": System("duet, a decode step worth what it adds", CountsAdded),
    "duet-no-caps": System("duet without CAPPED", Uncapped),
    "duet-no-splits": System("duet without SPLIT", _limited(decode_sms=())),
    "duet-no-contention": System("duet, blind to contention", ForecastPolicy, contention=False),
    "duet-no-correction": System("duet without the online correction", _uncorrected),
    "duet-bound-only": System(
        "duet that splits only for the bound", _limited(split_for_throughput=False)
    ),
}


def forecaster(
    shape: ModelShape, profile: GpuProfile, system: System, error: float, seed: int
) -> Roofline:
    """The roofline the policy decides by: the profile, wrong by ``error``."""
    roofline = Roofline if system.contention else NoContention
    return roofline(shape, wrong_profile(profile, error, seed))


ERRING_RATES = (
    "gemm_fraction",
    "attention_fraction",
    "hbm_fraction",
    "attention_hbm_fraction",
    "sm_bytes_per_s",
)


def wrong_profile(profile: GpuProfile, error: float, seed: int) -> GpuProfile:
    """The profile with each rate too high or too low by ``error``, and fixed costs too low.

    Which of the two is drawn by ``seed`` for each rate, so forecasts are scaled, and
    skewed: prefill against decode, one SM count against another. The truth stays, so
    that what does not forecast is the same at every error.
    """
    random = Random(seed)
    factors = {name: (1 + error) ** random.choice((-1, 1)) for name in ERRING_RATES}
    changed = {name: getattr(profile, name) * factor for name, factor in factors.items()}
    overheads = ("gemm_overhead_us", "attention_overhead_us", "step_overhead_us")
    changed |= {name: getattr(profile, name) / (1 + error) for name in overheads}
    return replace(profile, **changed)
