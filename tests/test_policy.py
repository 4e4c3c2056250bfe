# SPDX-License-Identifier: Apache-2.0
"""ForecastPolicy against brute force over Roofline.predict and predict_pair."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import pairwise
from math import ceil
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.policy import (
    IDLE,
    MIN_CHUNK_TOKENS,
    ForecastPolicy,
    Load,
    PolicyLimits,
    _tokens_per_pair,
    chunk_sizes,
    decode_sm_candidates,
    sm_groups,
    validate_decode_sms,
)
from vllm_duet.roofline import Batch, GpuProfile, ModelShape, Roofline, StepTimeCorrection

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
MISTRAL_7B = QWEN3_8B | {
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "sliding_window": 4096,
}
QWEN3_MOE = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
MODELS = {"qwen3-8b": QWEN3_8B, "mistral-7b": MISTRAL_7B, "qwen3-moe": QWEN3_MOE}


@cache
def roofline_of(model: str = "qwen3-8b", gpu: str = "h100-sxm") -> Roofline:
    return Roofline(ModelShape.from_hf_config(MODELS[model]), GpuProfile.load(gpu))


BUSY = Load(spare=0.2)
"""Decodes are what the GPU is short of time for."""

PROMPTS_SHORT = Load(spare=0.0, backlog=2.0)
"""Prompts are, and not all that wait fit into a step."""


@dataclass(frozen=True)
class Case:
    """A batch on a model and GPU."""

    roofline: Roofline
    decode_contexts: list[int]
    queries: list[int]
    contexts: list[int]
    load: Load = IDLE

    def decide(
        self,
        limits: PolicyLimits,
        correction: StepTimeCorrection | None = None,
        can_split: bool = True,
        lane_in_use: int | None = None,
    ) -> DuetPlan:
        policy = ForecastPolicy(self.roofline, limits, correction)
        return policy.decide(
            self.decode_contexts,
            self.queries,
            self.contexts,
            can_split=can_split,
            load=self.load,
            lane_in_use=lane_in_use,
        )

    @property
    def num_sms(self) -> int:
        return self.roofline.profile.num_sms

    @property
    def decode(self) -> Batch:
        return Batch([1] * len(self.decode_contexts), self.decode_contexts)

    @property
    def prefill(self) -> Batch:
        return Batch(self.queries, self.contexts)

    def chunk(self, tokens: int | None) -> list[tuple[int, int]]:
        """(query, context) of the first ``tokens`` tokens of the prefills."""
        left = sum(self.queries) if tokens is None else tokens
        chunk = []
        for query, context in zip(self.queries, self.contexts, strict=True):
            taken = min(query, left)
            left -= taken
            if taken:
                chunk.append((taken, context))
        return chunk

    def mixed_ms(self, tokens: int | None = None) -> float:
        chunk = self.chunk(tokens)
        # The roofline would take a prompt cut to one token for a decode.
        if any(query == 1 for query, _ in chunk):
            reject()
        batch = Batch(
            [1] * len(self.decode_contexts) + [query for query, _ in chunk],
            self.decode_contexts + [context for _, context in chunk],
        )
        return self.roofline.predict(batch, self.num_sms).ms

    def pair_ms(self, decode_sms: int) -> tuple[float, float]:
        pair = self.roofline.predict_pair(
            self.decode, self.prefill, decode_sms, self.num_sms - decode_sms
        )
        return pair.decode_ms, pair.prefill_ms

    def plans(self, lanes: Sequence[int], caps: Sequence[int] | None = None) -> Iterator[DuetPlan]:
        """Plans of every kind, with their TBT by brute force."""
        total = sum(self.queries)
        if caps is None:
            caps = [MIN_CHUNK_TOKENS, total // 7, total // 3, total // 2, total - total // 9]
        yield DuetPlan(Mode.AGGREGATED, "", tbt_ms=self.mixed_ms())
        for cap in caps:
            if MIN_CHUNK_TOKENS <= cap < total and all(q > 1 for q, _ in self.chunk(cap)):
                tbt_ms = self.mixed_ms(cap)
                yield DuetPlan(Mode.CAPPED, "", max_prefill_tokens=cap, tbt_ms=tbt_ms)
        for lane in lanes:
            yield DuetPlan(Mode.SPLIT, "", decode_sms=lane, tbt_ms=self.pair_ms(lane)[0])

    def tbt_ms(self, plan: DuetPlan) -> float:
        if plan.mode is Mode.SPLIT:
            return self.pair_ms(plan.decode_sms)[0]
        return self.mixed_ms(plan.max_prefill_tokens)

    @property
    def full(self) -> float:
        """How far prompts wait for room in the KV cache."""
        return min(max((self.load.kv_usage - 0.8) / 0.15, 0), 1)

    @property
    def queue(self) -> float:
        """How far they queue for steps to come, and not for that."""
        return min(max(self.load.backlog / 2 - 1, 0), 1) * (1 - self.full)

    def speedup(self, plan: DuetPlan) -> float:
        """speedup() of a plan, by brute force."""
        alone_ms = self.roofline.predict(self.prefill, self.num_sms).ms
        added_ms = self.mixed_ms() - alone_ms
        decode_alone_ms = self.roofline.predict(self.decode, self.num_sms).ms
        load = self.load
        weight = min(max((0.5 - load.spare) / 0.2, 0), 1) * min(max(2 - 2 * load.backlog, 0), 1)
        weight = max(weight, self.full)
        decode_ms = (1 - self.queue) * (added_ms + weight * (decode_alone_ms - added_ms))
        prefill_price_ms = self.mixed_ms() - decode_ms
        if plan.mode is Mode.SPLIT:
            step_ms, prefill_ms = self.pair_ms(plan.decode_sms)
            steps = ceil(prefill_ms / step_ms) + 1
            return (steps * decode_ms + prefill_price_ms) / (steps * step_ms)
        share = self._work(plan.max_prefill_tokens) / self._work(None)
        return (decode_ms + share * prefill_price_ms) / self.mixed_ms(plan.max_prefill_tokens)

    def _work(self, tokens: int | None) -> float:
        pair = _tokens_per_pair(self.roofline)
        return sum(q + pair * q * (c + (q + 1) / 2) for q, c in self.chunk(tokens))


CASES = st.builds(
    lambda model, gpu, decodes, prefills, spare, backlog, kv_usage: Case(
        roofline_of(model, gpu),
        decodes,
        [q for q, _ in prefills],
        [c for _, c in prefills],
        Load(spare, backlog=backlog, kv_usage=kv_usage),
    ),
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(GpuProfile.names()),
    st.lists(st.integers(0, 20_000), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(2, 8000), st.integers(0, 30_000)), min_size=1, max_size=4),
    st.floats(0, 1),
    st.one_of(st.floats(0, 2), st.floats(2, 6)),
    st.floats(0, 1),
)
BOUNDS = st.one_of(st.floats(1, 60), st.floats(1, 1000))


class FixedCorrection(StepTimeCorrection):
    """The same factor and guard for every kind of step."""

    def __init__(self, factor: float, guard: float = 1.0) -> None:
        super().__init__()
        self._factor, self._guard = factor, guard

    def factor(self, kind: str, default: float = 1.0) -> float:
        return self._factor

    def guard(self, kind: str) -> float:
        return self._guard


# Any batch


@given(CASES, BOUNDS, st.booleans(), st.booleans(), st.floats(0, 0.2))
def test_the_bound_is_kept_when_any_plan_keeps_it(
    case: Case, bound_ms: float, can_split: bool, for_throughput: bool, margin: float
) -> None:
    lanes = decode_sm_candidates(case.roofline.profile) if can_split else ()
    best_ms = min(plan.tbt_ms for plan in case.plans(lanes))
    limits = PolicyLimits(bound_ms, split_for_throughput=for_throughput, throughput_margin=margin)
    plan = case.decide(limits, can_split=can_split)
    allowed_ms = bound_ms if best_ms <= bound_ms else best_ms * (1 + margin)
    # A measured factor can make a few tokens more look faster, and a size in between best.
    assert case.tbt_ms(plan) <= allowed_ms * 1.01


@given(CASES, BOUNDS, st.booleans())
def test_a_plan_is_well_formed_and_carries_the_forecast(
    case: Case, bound_ms: float, can_split: bool
) -> None:
    profile, total = case.roofline.profile, sum(case.queries)
    plan = case.decide(PolicyLimits(bound_ms, max_lookahead=3), can_split=can_split)
    assert plan.tokens_per_s > 0
    assert plan.reason
    if plan.mode is Mode.SPLIT:
        assert can_split
        assert plan.decode_sms % profile.sm_granularity == 0
        assert min(plan.decode_sms, plan.prefill_sms) >= profile.min_sms
        assert plan.decode_sms + plan.prefill_sms <= profile.num_sms
        assert 1 <= plan.lookahead <= 3
        assert plan.max_prefill_tokens is None
        assert (plan.tbt_ms, plan.prefill_ms) == pytest.approx(case.pair_ms(plan.decode_sms))
        return
    assert (plan.decode_sms, plan.prefill_sms, plan.lookahead) == (0, 0, 0)
    if plan.mode is Mode.CAPPED:
        assert plan.max_prefill_tokens is not None
        assert min(MIN_CHUNK_TOKENS, total - 1) <= plan.max_prefill_tokens < total
    else:
        assert plan.max_prefill_tokens is None
    assert plan.tbt_ms == plan.prefill_ms == pytest.approx(case.tbt_ms(plan))


@given(CASES, BOUNDS)
def test_no_plan_that_keeps_the_bound_is_faster(case: Case, bound_ms: float) -> None:
    lanes = decode_sm_candidates(case.roofline.profile)
    limits = PolicyLimits(bound_ms, throughput_margin=0.0)
    chosen, mixed = case.decide(limits), case.decide(limits, can_split=False)
    rivals = [plan for plan in case.plans(lanes, caps=()) if plan.tbt_ms <= bound_ms]
    if mixed.tbt_ms <= bound_ms:
        rivals.append(mixed)
    for plan in rivals:
        assert case.speedup(chosen) >= case.speedup(plan) * (1 - 1e-9)


@given(CASES, BOUNDS)
def test_a_prefill_is_cut_as_if_decodes_were_never_alone(case: Case, bound_ms: float) -> None:
    chosen = case.decide(PolicyLimits(bound_ms, throughput_margin=0.0), can_split=False)
    busy = replace(case, load=PROMPTS_SHORT._replace(backlog=2 + 2 * case.queue))
    caps = chunk_sizes(sum(case.queries)).tolist()[::5]
    for plan in case.plans((), caps=caps):
        if plan.tbt_ms <= bound_ms < case.mixed_ms():
            assert busy.speedup(chosen) >= busy.speedup(plan) * (1 - 1e-9)


def test_prompts_that_queue_go_before_what_decodes_gain() -> None:
    """Of plans that keep the bound the one that serves prompts soonest; unless it is the KV cache
    that they wait for."""
    batch = roofline_of(), [1150] * 150, [1000] * 8, [0] * 8

    def decided(**load: float) -> DuetPlan:
        return Case(*batch, Load(0.0, **load)).decide(PolicyLimits(100.0))

    assert decided(backlog=1.0).mode is Mode.SPLIT
    queued = decided(backlog=4.0, kv_usage=0.4)
    assert queued.mode is Mode.CAPPED
    rates = {
        plan: (plan.max_prefill_tokens or 8000) / Case(*batch).tbt_ms(plan)
        for plan in Case(*batch).plans((), caps=chunk_sizes(8000).tolist())
        if plan.tbt_ms <= 100
    }
    fastest = max(rates.values())
    assert (queued.max_prefill_tokens or 0) / queued.tbt_ms > fastest / 1.05
    assert decided(backlog=4.0, kv_usage=0.95).mode is Mode.SPLIT


@given(CASES, BOUNDS, st.floats(0, 0.5))
def test_leaving_a_mixed_step_that_fits_gains_the_margin(
    case: Case, bound_ms: float, margin: float
) -> None:
    assume(case.mixed_ms() <= bound_ms)
    plan = case.decide(PolicyLimits(bound_ms, throughput_margin=margin))
    if plan.mode is not Mode.AGGREGATED:
        assert case.speedup(plan) >= (1 + margin) * (1 - 1e-9)


@given(CASES, BOUNDS, st.floats(1, 4))
def test_a_looser_bound_never_hurts(case: Case, bound_ms: float, looser: float) -> None:
    """Where decodes are never alone, as which caps are chosen."""
    case = replace(case, load=PROMPTS_SHORT)
    tight = case.decide(PolicyLimits(bound_ms, throughput_margin=0.0))
    assume(case.tbt_ms(tight) <= bound_ms)
    loose = case.decide(PolicyLimits(bound_ms * looser, throughput_margin=0.0))
    assert case.tbt_ms(loose) <= bound_ms * looser * (1 + 1e-9)
    if case.mixed_ms() > bound_ms * looser:  # else there is no search for a faster cap
        assert case.speedup(loose) >= case.speedup(tight) * (1 - 1e-9)


@given(CASES, BOUNDS, st.integers(1, 5000))
def test_longer_contexts_never_make_a_mixed_step_fit(
    case: Case, bound_ms: float, more: int
) -> None:
    limits = PolicyLimits(bound_ms, split_for_throughput=False, throughput_margin=0.0)
    longer = replace(case, decode_contexts=[c + more for c in case.decode_contexts])
    if longer.mixed_ms() <= bound_ms:
        assert case.decide(limits).mode is Mode.AGGREGATED


@given(CASES, BOUNDS)
def test_without_splitting_for_throughput_a_step_that_fits_stays(
    case: Case, bound_ms: float
) -> None:
    plan = case.decide(PolicyLimits(bound_ms, split_for_throughput=False))
    if case.mixed_ms() <= bound_ms * (1 - 1e-9):
        assert plan.mode is Mode.AGGREGATED


@given(CASES, BOUNDS)
def test_the_same_batch_gets_the_same_plan(case: Case, bound_ms: float) -> None:
    policy = ForecastPolicy(case.roofline, PolicyLimits(bound_ms))
    lens = (case.decode_contexts, case.queries, case.contexts)
    assert policy.decide(*lens, can_split=True) == policy.decide(*lens, can_split=True)


@given(CASES, BOUNDS)
def test_a_gpu_twice_as_slow_is_a_bound_half_as_long(case: Case, bound_ms: float) -> None:
    slow = case.decide(PolicyLimits(bound_ms), FixedCorrection(2.0))
    half = case.decide(PolicyLimits(bound_ms / 2))
    as_fast = replace(
        slow,
        tokens_per_s=2 * slow.tokens_per_s,
        whole_step_ms=slow.whole_step_ms / 2,
        whole_prefill_ms=slow.whole_prefill_ms / 2,
    )
    assert as_fast == half


@given(CASES, BOUNDS)
def test_the_guard_tightens_the_bound_and_nothing_else(case: Case, bound_ms: float) -> None:
    guarded = case.decide(PolicyLimits(bound_ms), FixedCorrection(1.0, guard=2.0))
    assert guarded == case.decide(PolicyLimits(bound_ms / 2))


@given(CASES, BOUNDS)
def test_where_many_short_answers_join_late_the_bound_holds_for_two_steps(
    case: Case, bound_ms: float
) -> None:
    often = replace(case, load=case.load._replace(late=0.1))
    plan = often.decide(PolicyLimits(bound_ms))
    in_reach = min(case.mixed_ms(MIN_CHUNK_TOKENS), case.mixed_ms()) <= bound_ms
    if plan.mode is Mode.SPLIT and in_reach:
        assert 2 * plan.tbt_ms <= bound_ms
    rare = replace(case, load=case.load._replace(late=0.001))
    assert rare.decide(PolicyLimits(bound_ms)) == case.decide(PolicyLimits(bound_ms))


@given(CASES, BOUNDS, st.sampled_from([0.0, 0.1]))
def test_a_plan_says_whether_who_joins_is_late(case: Case, bound_ms: float, late: float) -> None:
    plan = replace(case, load=case.load._replace(late=late)).decide(PolicyLimits(bound_ms))
    assert plan.joins_late == (plan.mode is Mode.SPLIT and 2 * plan.tbt_ms > bound_ms)


@given(CASES, BOUNDS, st.floats(0, 1))
def test_who_waits_since_a_join_finds_the_rest_of_the_bound(
    case: Case, bound_ms: float, share: float
) -> None:
    waited = replace(case, load=case.load._replace(waited_ms=share * bound_ms))
    plan, before = waited.decide(PolicyLimits(bound_ms)), case.decide(PolicyLimits(bound_ms))
    # The wait cuts the step, and does not change whether it is split.
    assert (plan.mode is Mode.SPLIT) == (before.mode is Mode.SPLIT)
    if plan.mode is not Mode.SPLIT:
        left = PolicyLimits((1 - share) * bound_ms) if share < 1 else PolicyLimits(0.0)
        assert plan == case.decide(left, can_split=False)


@given(CASES, BOUNDS)
def test_where_a_cap_is_too_late_there_is_none(case: Case, bound_ms: float) -> None:
    policy = ForecastPolicy(case.roofline, PolicyLimits(bound_ms))
    batch = case.decode_contexts, case.queries, case.contexts
    plan = policy.decide(*batch, can_split=True, can_cap=False, load=case.load)
    assert plan.mode is not Mode.CAPPED
    least_ms = min(p.tbt_ms for p in case.plans(policy.decode_sms, caps=()))
    assert case.tbt_ms(plan) <= max(bound_ms, 1.05 * least_ms) * (1 + 1e-9)


def test_a_decode_step_is_worth_what_it_was_measured_to_take() -> None:
    """Mixed steps and decodes alone may be forecast wrong by different factors."""
    case = Case(roofline_of(), [4300] * 80, [4000], [0], BUSY)
    limits, correction = PolicyLimits(1000.0), StepTimeCorrection()
    decode_ms = case.decide(limits).decode_ms
    assert decode_ms == pytest.approx(case.roofline.predict(case.decode, case.num_sms).ms)
    assert case.decide(limits, correction).mode is Mode.SPLIT
    for _ in range(50):
        correction.observe(decode_ms, 0.5 * decode_ms, "decode_only")
        correction.observe(1.0, 1.0, "aggregated")
    assert case.decide(limits, correction).mode is Mode.AGGREGATED


# One token left of a prompt


def test_one_token_left_of_a_prompt_is_prefill() -> None:
    roofline = roofline_of()
    for queries, contexts in (([1], [500]), ([1, 1, 3000], [500, 0, 0])):
        case = Case(roofline, [900] * 8, queries, contexts)
        for bound_ms in (0.1, 10.0, 1000.0):
            plan = case.decide(PolicyLimits(bound_ms))
            assert plan.max_prefill_tokens is None or plan.max_prefill_tokens >= 1
            assert plan.tbt_ms > 0


# Qwen3-8B on an H100


def test_a_long_prompt_that_breaks_the_bound_does_not_run_mixed() -> None:
    budget, bound_ms = 8192, 50.0
    case = Case(roofline_of(), [1000] * 64, [budget - 64], [0])
    assert case.mixed_ms() > bound_ms
    plan = case.decide(PolicyLimits(bound_ms))
    assert plan.mode is not Mode.AGGREGATED
    assert case.tbt_ms(plan) <= bound_ms
    capped = case.decide(PolicyLimits(bound_ms), can_split=False)
    assert capped.mode is Mode.CAPPED
    assert capped.max_prefill_tokens is not None
    # As large as the bound allows: half as much again would break it.
    assert case.mixed_ms(capped.max_prefill_tokens * 3 // 2) > bound_ms


def test_heavy_decode_splits_for_throughput_and_light_decode_does_not() -> None:
    bound_ms = 1000.0
    heavy = Case(roofline_of(), [4300] * 80, [8192 - 80], [0], BUSY)
    light = Case(roofline_of(), [2000] * 8, [8192 - 8], [0])
    for case in (heavy, light):
        assert case.mixed_ms() < bound_ms
    assert heavy.decide(PolicyLimits(bound_ms)).mode is Mode.SPLIT
    assert heavy.decide(PolicyLimits(bound_ms)).lookahead > 1
    assert light.decide(PolicyLimits(bound_ms)).mode is Mode.AGGREGATED


@pytest.mark.parametrize("load", [PROMPTS_SHORT, Load(spare=0.6)])
def test_short_prompts_stay_mixed_where_they_are_all_that_waits_or_nothing_does(
    load: Load,
) -> None:
    case = Case(roofline_of(), [1400] * 150, [4000], [0], BUSY)
    assert case.decide(PolicyLimits(1000.0)).mode is Mode.SPLIT
    assert replace(case, load=load).decide(PolicyLimits(1000.0)).mode is Mode.AGGREGATED
    # Where the KV cache is full, prompts wait for decodes to end.
    full = replace(case, load=load._replace(kv_usage=0.95))
    assert full.decide(PolicyLimits(1000.0)).mode is Mode.SPLIT


def test_a_prefill_that_follows_has_the_lane_of_the_one_in_flight() -> None:
    case = Case(roofline_of(), [4300] * 80, [4000], [0], BUSY)
    limits = PolicyLimits(100.0)
    for lane in decode_sm_candidates(case.roofline.profile):
        plan = case.decide(limits, lane_in_use=lane)
        if plan.mode is Mode.SPLIT:
            assert plan.decode_sms == lane
            assert plan.tbt_ms == pytest.approx(case.pair_ms(lane)[0])
    assert case.decide(limits, lane_in_use=56).mode is Mode.SPLIT
    assert case.decide(PolicyLimits(5.0), lane_in_use=56).mode is not Mode.SPLIT


def test_a_lane_that_is_out_of_use_is_in_no_plan() -> None:
    case = Case(roofline_of(), [4300] * 80, [8192 - 80], [0], BUSY)
    batch = case.decode_contexts, case.queries, case.contexts
    policy = ForecastPolicy(case.roofline, PolicyLimits(100.0, decode_sms=(48, 56)))

    def lane_of(**kwargs: int) -> int:
        return policy.decide(*batch, can_split=True, load=case.load, **kwargs).decode_sms

    best = lane_of()
    assert best and lane_of(lane_in_use=best) == best
    others = [sms for sms in policy.decode_sms if sms != best]
    policy.use_lanes(others)
    assert lane_of() in others
    assert lane_of(lane_in_use=best) == 0  # nor behind the prefill that is still on it
    policy.use_lanes([])
    assert lane_of() == 0
    policy.use_lanes(policy.decode_sms)
    assert lane_of() == best


def test_a_split_says_what_its_work_would_cost_without() -> None:
    case = Case(roofline_of(), [4300] * 80, [8192 - 80], [0], BUSY)
    plan = case.decide(PolicyLimits(1000.0))
    step_ms, prefill_ms = case.pair_ms(plan.decode_sms)
    # Of a mixed step that keeps the bound it is the price, and adds up to its time.
    assert plan.whole_step_ms + plan.whole_prefill_ms == pytest.approx(case.mixed_ms())
    steps = ceil(prefill_ms / step_ms) + 1
    work_ms = steps * plan.whole_step_ms + plan.whole_prefill_ms
    assert work_ms / (steps * step_ms) == pytest.approx(case.speedup(plan))
    # Where the mixed step breaks the bound, the rival is a capped one.
    limits = PolicyLimits(60.0)
    bound, capped = case.decide(limits), case.decide(limits, can_split=False)
    assert (bound.mode, capped.mode) == (Mode.SPLIT, Mode.CAPPED)
    rival_ms = case.mixed_ms() / case.speedup(capped)
    assert bound.whole_step_ms + bound.whole_prefill_ms == pytest.approx(rival_ms)


def test_a_prefill_that_follows_waits_for_no_join() -> None:
    """One decode step's worth of prefill pays only behind another."""
    case = Case(roofline_of(), [4300] * 80, [1000], [0], BUSY)
    lane = 48
    step_ms, prefill_ms = case.pair_ms(lane)
    assert prefill_ms < 1.5 * step_ms
    limits = PolicyLimits(1000.0, decode_sms=(lane,))
    assert case.decide(limits).mode is Mode.AGGREGATED
    assert case.decide(limits, lane_in_use=lane).mode is Mode.SPLIT


def test_a_split_has_to_beat_the_margin() -> None:
    case = Case(roofline_of(), [4300] * 80, [8192 - 80], [0], BUSY)
    gain = case.speedup(case.decide(PolicyLimits(1000.0))) - 1
    assert gain > 0.05
    bolder, shyer = (PolicyLimits(1000.0, throughput_margin=gain + x) for x in (-0.01, 0.01))
    assert case.decide(bolder).mode is Mode.SPLIT
    assert case.decide(shyer).mode is Mode.AGGREGATED


def test_a_bound_that_decode_breaks_by_itself_leaves_the_prefill_moving() -> None:
    case = Case(roofline_of(), [4000] * 80, [4000], [0])
    limits = PolicyLimits(1.0)
    plan = case.decide(limits)
    assert plan.mode is Mode.CAPPED
    assert plan.max_prefill_tokens is not None
    assert plan.max_prefill_tokens >= MIN_CHUNK_TOKENS
    assert plan.tbt_ms <= (1 + limits.throughput_margin) * case.mixed_ms(MIN_CHUNK_TOKENS)


def test_steps_slower_than_forecast_shrink_the_chunk() -> None:
    case = Case(roofline_of(), [1000] * 64, [8000], [0])
    correction = StepTimeCorrection()
    caps = []
    for _ in range(3):
        plan = case.decide(PolicyLimits(50.0), correction, can_split=False)
        assert plan.max_prefill_tokens is not None
        caps.append(plan.max_prefill_tokens)
        for _ in range(50):
            correction.observe(plan.tbt_ms, 1.5 * plan.tbt_ms, "aggregated")
    assert caps[1] < caps[0]
    assert caps[1] == caps[2]


def test_drafts_leave_a_prompt_less_of_the_bound() -> None:
    case = Case(roofline_of(), [1000] * 128, [8000], [0])
    plans = [case.decide(PolicyLimits(50.0, decode_tokens=n), can_split=False) for n in (1, 4)]
    caps = [plan.max_prefill_tokens for plan in plans]
    assert caps[0] is not None and caps[1] is not None
    assert MIN_CHUNK_TOKENS < caps[1] < caps[0]
    assert all(plan.tbt_ms <= 50.0 for plan in plans)


# Decode lanes


@pytest.mark.parametrize("name", GpuProfile.names())
def test_candidates_suit_every_shipped_gpu(name: str) -> None:
    profile = GpuProfile.load(name)
    lanes = decode_sm_candidates(profile)
    assert 2 <= len(lanes) <= 5
    assert validate_decode_sms(profile, lanes) == lanes
    bandwidth = profile.bandwidth_fractions()
    assert bandwidth[lanes[0]] >= 0.25
    # No lane leaves decode and prefill together a larger part of the GPU than the largest.
    both = [bandwidth[sms] - sms / profile.num_sms for sms in sm_groups(profile)]
    assert bandwidth[lanes[-1]] - lanes[-1] / profile.num_sms == pytest.approx(max(both))


@given(
    st.integers(1, 200), st.integers(1, 16), st.integers(1, 16), st.floats(1e9, 1e12),
    st.integers(1, 8),
)  # fmt: skip
def test_candidates_suit_any_gpu(
    num_sms: int, granularity: int, min_sms: int, sm_bytes_per_s: float, max_candidates: int
) -> None:
    profile = replace(
        GpuProfile.load("h100-sxm"),
        num_sms=num_sms,
        sm_granularity=granularity,
        min_sms=min_sms,
        sm_bytes_per_s=sm_bytes_per_s,
    )
    lanes = decode_sm_candidates(profile, max_candidates)
    assert len(lanes) <= max_candidates
    assert validate_decode_sms(profile, lanes) == lanes


def test_a_gpu_too_small_to_split_never_does() -> None:
    profile = replace(GpuProfile.load("h100-sxm"), num_sms=12)
    roofline = Roofline(ModelShape.from_hf_config(QWEN3_8B), profile)
    assert decode_sm_candidates(profile) == ()
    for bound_ms in (1.0, 1000.0, 100_000.0):
        plan = Case(roofline, [500] * 8, [4000], [0]).decide(PolicyLimits(bound_ms))
        assert plan.mode is not Mode.SPLIT


@pytest.mark.parametrize("decode_sms", [(12,), (16, 20), (0,), (-8,), (128,), (136,)])
def test_decode_sms_that_are_no_group_are_an_error(decode_sms: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8 from 8 to 120 on h100-sxm, not"):
        ForecastPolicy(roofline_of(), PolicyLimits(decode_sms=decode_sms))


def test_given_decode_sms_are_the_only_lanes() -> None:
    policy = ForecastPolicy(roofline_of(), PolicyLimits(decode_sms=(48, 16, 48)))
    assert policy.decode_sms == (16, 48)
    plan = policy.decide([4300] * 80, [8192 - 80], [0], can_split=True)
    assert plan.decode_sms in (16, 48)


@given(st.integers(1, 100_000))
def test_chunk_sizes_rise_to_the_whole_prefill_in_small_steps(tokens: int) -> None:
    sizes = chunk_sizes(tokens).tolist()
    assert sizes[0] == min(MIN_CHUNK_TOKENS, tokens)
    assert sizes[-1] == tokens
    for smaller, larger in pairwise(sizes):
        assert 0 < larger - smaller <= max(tokens / 64 + MIN_CHUNK_TOKENS, smaller)


def test_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_duet.policy; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    assert run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_plan_holds_plain_numbers() -> None:
    for bound_ms in (20.0, 50.0, 1000.0):
        plan = Case(roofline_of(), [4300] * 80, [8000], [0]).decide(PolicyLimits(bound_ms))
        assert {type(value) for value in astuple(plan)} <= {Mode, str, int, float, bool, type(None)}
