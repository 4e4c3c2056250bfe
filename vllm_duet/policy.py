# SPDX-License-Identifier: Apache-2.0
"""Which of AGGREGATED, CAPPED and SPLIT a step should be.

Policies are pure: numbers of the batch in, a DuetPlan out. They import neither
torch nor vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from operator import attrgetter
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.roofline import GpuProfile, Roofline, StepTimeCorrection
from vllm_duet.roofline.kernels import njit

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

AGGREGATED_STEP: Final = "aggregated"
DECODE_ONLY: Final = "decode_only"
DECODE_LANE: Final = "decode_lane"
PREFILL_LANE: Final = "prefill_lane"
"""The kinds of step that StepTimeCorrection tells apart; a CAPPED step is aggregated."""

MIN_CHUNK_TOKENS: Final = 16
"""The least prefill of a CAPPED step, so that a prompt always progresses."""

SPARE_SHARES: Final = (0.3, 0.5)
"""Where the GPU keeps up with its prompts for more than the second share of the time, what is
gained by a split is time to idle, and what is lost is time to first token."""

BACKLOG_SHARES: Final = (0.5, 1.0)
"""Where the prompts that wait fill more than the second share of a step, they are what the GPU is
short of time for."""

QUEUE_STEPS: Final = (2.0, 4.0)
"""Where the prompts that wait fill more steps than the second, who arrives waits for all of them,
while tokens come sooner than they have to: a decode step is worth nothing then."""

KV_SHARES: Final = (0.8, 0.95)
"""Where more than the second share of the KV cache is in use, prompts wait for decodes to end."""

LATE_SHARE: Final = 0.004
"""The part of all requests that may break the bound by their second token, which comes late after
a join: one in a hundred may, and steps that take longer than forecast need their part too."""

JOIN_STEPS: Final = 2
"""Decode steps for which a request that joins waits for its second token: a join is seen when a
step ends, and asynchronous scheduling has queued one more by then."""

NUM_CHUNK_SIZES: Final = 64
"""A cap is chosen to within this part of the prefill."""


class Load(NamedTuple):
    """What the GPU is short of.

    ``spare`` is the share of the last seconds in which it kept up with its prompts: it had nothing
    to do, or decodes alone while no prompt waited. ``late`` is the share of the last requests that
    joined by a plan that ``joins_late`` and had a short answer, of which one late token decides
    the 99th percentile. ``backlog`` is how many steps the prompts that wait could fill, as far as
    the KV cache has room for them, and ``kv_usage`` the share of it that is in use. ``waited_ms``:
    for how long requests that have just joined will have waited for their second token when the
    step begins.
    """

    spare: float
    late: float = 0.0
    backlog: float = 0.0
    kv_usage: float = 0.0
    waited_ms: float = 0.0


IDLE: Final = Load(1.0)
"""Nothing has run yet."""


def _rising(value: float, shares: tuple[float, float]) -> float:
    """0 up to the first of ``shares``, 1 from the second on, linear in between."""
    low, high = shares
    return min(1.0, max(0.0, (value - low) / (high - low)))


class Policy(Protocol):
    """Decides one step that has both decode and prefill work."""

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
        """Decide for the batch vLLM would run.

        ``decode_context_lens`` [num_decodes] and ``prefill_context_lens``
        [num_prefills] are tokens already in the KV cache; the decodes compute
        one token each, the prefills ``prefill_query_lens`` [num_prefills].
        None of them is empty. With ``can_split`` false the plan is never SPLIT, with
        ``can_cap`` false never CAPPED.
        ``load`` is what the GPU was busy with lately. ``lane_in_use`` is the SM count of
        the decode lane while another prefill is in flight: a SPLIT then has the same
        lane, and follows it.
        """


class FixedModePolicy:
    """The same mode at every step, whatever the forecast: for tests and baselines.

    ``decode_sms`` and ``prefill_sms`` are the groups of a SPLIT,
    ``max_prefill_tokens`` the cap of a CAPPED step.
    """

    def __init__(
        self, mode: Mode, decode_sms: int, prefill_sms: int, max_prefill_tokens: int
    ) -> None:
        self._plan = DuetPlan(
            mode,
            reason=f"mode is set to {mode}",
            decode_sms=decode_sms if mode is Mode.SPLIT else 0,
            prefill_sms=prefill_sms if mode is Mode.SPLIT else 0,
            max_prefill_tokens=max_prefill_tokens if mode is Mode.CAPPED else None,
        )

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
        if self._plan.mode is Mode.SPLIT and not can_split:
            return DuetPlan(Mode.AGGREGATED, reason="this batch cannot be split")
        return self._plan


class RandomPolicy:
    """A plan drawn from a seeded generator at every step: for tests.

    Correct output must not depend on the plan, so any draw has to give the
    tokens that stock vLLM gives.
    """

    def __init__(self, seed: int, decode_sms: Sequence[int], num_sms: int) -> None:
        self._random = random.Random(seed)
        self._decode_sms = decode_sms
        self._num_sms = num_sms

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
        modes = [Mode.AGGREGATED] + [Mode.CAPPED] * can_cap + [Mode.SPLIT] * 2 * can_split
        mode = self._random.choice(modes)
        if mode is Mode.AGGREGATED:
            return DuetPlan(mode, reason="random")
        cap = self._random.randint(1, max(1, sum(prefill_query_lens)))
        if mode is Mode.CAPPED:
            return DuetPlan(mode, reason="random", max_prefill_tokens=cap)
        decode_sms = self._random.choice(self._decode_sms)
        return DuetPlan(
            mode,
            reason="random",
            decode_sms=decode_sms,
            prefill_sms=self._num_sms - decode_sms,
            max_prefill_tokens=self._random.choice([None, cap]),
        )


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """What ForecastPolicy keeps to; DuetConfig has the same options, and checks them.

    ``tbt_slo_ms`` bounds the time between tokens. ``decode_sms`` are the SM counts
    that the decode lane may have; None: :func:`decode_sm_candidates`.
    ``max_lookahead`` limits the plan's lookahead. ``split_for_throughput`` false
    is the paper's trigger: a mixed step that keeps the bound stays as it is.
    ``throughput_margin`` is how much faster than a simpler plan a plan has to be. It
    pays for what the forecast leaves out, launch and join, and keeps near-ties
    from alternating. ``decode_tokens`` is how many tokens a decode computes in a step: more than
    one with speculative decoding.
    """

    tbt_slo_ms: float = 100.0
    decode_sms: tuple[int, ...] | None = None
    max_lookahead: int = 8
    split_for_throughput: bool = True
    throughput_margin: float = 0.05
    decode_tokens: int = 1


def decode_sm_candidates(profile: GpuProfile, max_candidates: int = 3) -> tuple[int, ...]:
    """SM counts for the decode lane, ascending; empty where the GPU is too small to split.

    Decode is bound by bandwidth, which saturates early (design.md, "Roofline, in
    short"). The least lane reaches a quarter of it: with less, every decode step
    takes over four times as long. Of the largest the two lanes together do most: there an
    SM more gives decode as large a part of the bandwidth as it takes from prefill of the SMs.
    As step times go with 1/S, the counts between grow by a constant ratio.
    """
    step, bandwidth = profile.sm_granularity, profile.bandwidth_fractions()
    groups = np.array(sm_groups(profile))
    quarter = int(np.argmax(bandwidth >= 0.25))
    first = -(-max(profile.min_sms, quarter) // step)
    if not groups.size or first * step > groups[-1]:
        return ()
    last = max(first, int(groups[np.argmax(bandwidth[groups] - groups / profile.num_sms)]) // step)
    steps = np.geomspace(first, last, max_candidates).round().astype(int)
    return tuple(step * n for n in sorted(set(steps.tolist())))


def sm_groups(profile: GpuProfile) -> range:
    """The SM counts that a decode lane can have and leave a group for prefill."""
    step = profile.sm_granularity
    least = -(-profile.min_sms // step) * step
    return range(least, profile.num_sms - profile.min_sms + 1, step)


def validate_decode_sms(profile: GpuProfile, decode_sms: Sequence[int]) -> tuple[int, ...]:
    """``decode_sms`` ascending, each once.

    Raises:
        ValueError: a count that is no SM group of the GPU, or leaves none for prefill.
    """
    groups = sm_groups(profile)
    for sms in decode_sms:
        if sms not in groups:
            most = (profile.num_sms - profile.min_sms) // groups.step * groups.step
            raise ValueError(
                f"decode_sms must be multiples of {groups.step} from {groups.start} to {most}"
                f" on {profile.name}, not {sms}."
            )
    return tuple(sorted(set(decode_sms)))


def decode_lanes(profile: GpuProfile, decode_sms: Sequence[int] | None) -> tuple[int, ...]:
    """The SM counts of the decode lanes that there are: ``decode_sms``, or the candidates.

    Raises:
        ValueError: ``decode_sms`` do not suit the GPU.
    """
    if decode_sms is None:
        return decode_sm_candidates(profile)
    return validate_decode_sms(profile, decode_sms)


@njit
def chunk_sizes(prefill_tokens: int) -> IntArray:
    """Chunks of a prefill to choose from, in tokens, ascending: doubling from
    MIN_CHUNK_TOKENS at first, then in equal steps, and last all of it."""
    grain = -(-prefill_tokens // (NUM_CHUNK_SIZES * MIN_CHUNK_TOKENS)) * MIN_CHUNK_TOKENS
    sizes = np.empty(NUM_CHUNK_SIZES + 64, dtype=np.int64)
    count, size = 0, MIN_CHUNK_TOKENS
    while size < prefill_tokens:
        sizes[count] = size
        count += 1
        size = min(2 * size, grain) if size < grain else size + grain
    sizes[count] = prefill_tokens
    return sizes[: count + 1]


def speedup(decode_steps: float, decode_ms: float, prefill_ms: float, wall_ms: float) -> float:
    """How much faster plans do their work than vLLM's mixed batches would.

    A plan completes ``decode_steps`` decode steps and some prefill within
    ``wall_ms``. ``decode_ms`` and ``prefill_ms`` are the prices of a decode step and of
    that prefill; those of a mixed step add up to its time, so AGGREGATED is 1.

    Why not tokens per second: a decode token costs many times a prefill token, so
    prefill would always win.
    """
    return (decode_steps * decode_ms + prefill_ms) / wall_ms


_compiled_speedup: Final = njit(speedup)


def _mixed_speedup(decode_ms: float, whole_ms: float, part: float, wall_ms: float) -> float:
    """Of a mixed step that does ``part`` of the prefill; -inf where that is none, as no step keeps
    the bound. Decodes have the price ``decode_ms``, and the whole step ``whole_ms``."""
    return speedup(1.0, decode_ms, part * (whole_ms - decode_ms), wall_ms) if part else -inf


class _Split(NamedTuple):
    """A split by one decode lane. Plain floats: with so few of them, loops are
    faster than arrays, and this is on the scheduling path.

    ``tbt_ms`` and ``prefill_ms`` are the roofline's; ``guarded_ms`` is the TBT to hold
    against the bound. Within ``wall_ms`` it completes ``steps`` decode steps and the
    prefill.
    """

    decode_sms: int
    tbt_ms: float
    prefill_ms: float
    guarded_ms: float
    steps: float
    wall_ms: float
    speedup: float


@njit
def _choose_cap(
    forecast_ms: FloatArray,
    tokens: FloatArray,
    pairs: FloatArray,
    tokens_per_pair: float,
    factor: float,
    guard: float,
    added_ms: float,
    prefill_ms: float,
    bound_ms: float,
    splits_ms: float,
    must_beat: float,
) -> tuple[int, float, float]:
    """The mixed step to compare splits with: its index, its part of the prefill, and the bound.

    ``forecast_ms``, ``tokens`` and ``pairs`` are [N], by size of the chunk; the last is
    the whole prefill. Of its work a chunk does tokens + ``tokens_per_pair`` pairs, in
    proportion. ``splits_ms`` is the smallest TBT of a split, guard included, which matters where
    nothing keeps the bound. The part is 0 where no chunk does.

    ``added_ms`` and ``prefill_ms`` are the prices of :func:`speedup` between chunks: there a
    decode step is worth what it adds to a mixed step, or less. At a higher price those chunks win
    that cost next to nothing beside reading the weights, and prompts crawl.
    """
    last = forecast_ms.size - 1
    work = tokens + tokens_per_pair * pairs
    lowest_ms = min(splits_ms, forecast_ms.min() * factor * guard)
    if lowest_ms > bound_ms:
        bound_ms = lowest_ms * must_beat
    best, best_speedup, found = last, -np.inf, -np.inf
    for n in range(last + 1):
        wall_ms = forecast_ms[n] * factor
        if wall_ms * guard <= bound_ms:
            found = _compiled_speedup(1.0, added_ms, prefill_ms * work[n] / work[last], wall_ms)
            if found > best_speedup:
                best, best_speedup = n, found
    if best_speedup == -np.inf:
        return best, 0.0, bound_ms
    if forecast_ms[last] * factor * guard <= bound_ms and best_speedup <= must_beat * found:
        best = last
    return best, work[best] / work[last], bound_ms


class ForecastPolicy:
    """The fastest plan, by forecast, of those that keep the bound on the TBT.

    Source: DuetServe's Algorithm 1 (arXiv 2511.04791) and design.md, "Where it goes
    beyond the paper". For every decode lane, k = ceil(prefill time / decode time)
    decode steps run until the prefill joins. AGGREGATED, and where it breaks the bound
    CAPPED at any chunk, compete with the splits by :func:`speedup`; of plans closer
    than the margin, AGGREGATED goes before CAPPED before SPLIT.

    A time is compared with the bound as forecast * factor * guard of the
    ``correction``, and with other times as forecast * factor. In the plan it is the
    forecast itself, since that is what ``StepTimeCorrection.observe`` wants.

    When nothing keeps the bound, the smallest TBT in reach, plus the margin, takes
    its place. That is mostly a small chunk: prompts progress slowly until decodes
    have finished. The margin is there because a decode that breaks the bound by
    itself gains nothing from a prefill that all but stands still.
    """

    def __init__(
        self,
        roofline: Roofline,
        limits: PolicyLimits,
        correction: StepTimeCorrection | None = None,
    ) -> None:
        """
        Raises:
            ValueError: ``limits.decode_sms`` do not suit the GPU.
        """
        profile = roofline.profile
        self.decode_sms = decode_lanes(profile, limits.decode_sms)
        self._lane_sms = np.array(self.decode_sms, dtype=np.int64)
        self._num_sms = profile.num_sms
        self._roofline = roofline
        self._limits = limits
        self._correction = correction
        self._tokens_per_pair = _tokens_per_pair(roofline)
        # Compiles all that a decision calls now, not while requests wait: no bound
        # above an hour lets this prefill pass whole.
        self.decide([0], [1 << 28], [0], can_split=True)

    def use_lanes(self, decode_sms: Sequence[int]) -> None:
        """Split by these alone of ``self.decode_sms`` from now on, also behind a prefill."""
        self._lane_sms = np.array(decode_sms, dtype=np.int64)

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
        batch = (decode_context_lens, prefill_query_lens, prefill_context_lens)
        bound_ms = self._limits.tbt_slo_ms
        plan = self._plan(*batch, bound_ms, can_split, can_cap, load, lane_in_use)
        if load.waited_ms and plan.mode is not Mode.SPLIT:
            # For those who have waited it is to be shorter. Whether to split is about more
            # than this step, and not decided by that.
            plan = self._plan(*batch, bound_ms - load.waited_ms, False, can_cap, load, None)
        return plan

    def _plan(
        self,
        decode_context_lens: Sequence[int],
        prefill_query_lens: Sequence[int],
        prefill_context_lens: Sequence[int],
        within_ms: float,
        can_split: bool,
        can_cap: bool,
        load: Load,
        lane_in_use: int | None,
    ) -> DuetPlan:
        """The plan that keeps a TBT ``within_ms``, or as :meth:`decide` says."""
        limits = self._limits
        bound_ms, must_beat = within_ms, 1 + limits.throughput_margin
        num_decodes, prefill_tokens = len(decode_context_lens), sum(prefill_query_lens)
        decode = self._roofline.decode_summary(decode_context_lens, limits.decode_tokens)
        prefill = self._roofline.prefill_summary(prefill_query_lens, prefill_context_lens)
        lanes = self._lane_sms if can_split else _NO_LANES
        if lane_in_use is not None:
            lanes = lanes[lanes == lane_in_use]
        mixed_ms, prefill_ms, decode_ms, step_ms, until_done_ms = self._roofline.plan_ms(
            decode, prefill, lanes
        )
        factor, guard = self._correct(AGGREGATED_STEP)
        whole_ms = mixed_ms * factor
        alone = 1.0 if self._correction is None else self._correction.factor(DECODE_ONLY, factor)
        full_price = self.decode_price(
            num_decodes, prefill_tokens, whole_ms, prefill_ms * factor, decode_ms * alone, load
        )
        worth = self.decode_worth(load)
        decode_price = worth * full_price
        steps_between = JOIN_STEPS if load.late > LATE_SHARE else 1
        splits = self._splits(
            lanes,
            step_ms,
            until_done_ms,
            decode_price,
            whole_ms - decode_price,
            follows=bool(lane_in_use),
            steps_between=steps_between,
        )

        reason = _KEEPS_BOUND
        cap, part, tbt_ms = prefill_tokens, 1.0, mixed_ms
        if whole_ms * guard <= bound_ms:
            # Nothing to cut for: AGGREGATED, unless a split is faster.
            if not limits.split_for_throughput:
                splits = []
        else:
            sizes = self.chunk_sizes(prefill_tokens) if can_cap else np.array([prefill_tokens])
            chunks_ms, chunk_tokens, pairs = self._roofline.capped_ms(
                decode, prefill_query_lens, prefill_context_lens, sizes
            )
            added_ms = worth * factor * (mixed_ms - prefill_ms)
            chunk, part, bound_ms = _choose_cap(
                chunks_ms,
                chunk_tokens,
                pairs,
                self._tokens_per_pair,
                factor,
                guard,
                added_ms,
                whole_ms - added_ms,
                within_ms,
                min([split.guarded_ms for split in splits], default=np.inf),
                must_beat,
            )
            if bound_ms > within_ms:
                reason = _OUT_OF_REACH
            cap, tbt_ms = int(sizes[chunk]), float(chunks_ms[chunk])
        keeping = [split for split in splits if split.guarded_ms <= bound_ms]
        split = max(keeping, key=_speedup_of, default=None)
        best_mixed = _mixed_speedup(decode_price, whole_ms, part, tbt_ms * factor)
        if split is not None and split.speedup > must_beat * best_mixed:
            tokens = split.steps * num_decodes + prefill_tokens
            # What it saves is told at the full price. Where no other plan keeps the bound, nothing
            # is known of that.
            mixed = _mixed_speedup(full_price, whole_ms, part, tbt_ms * factor)
            whole_step_ms, whole_prefill_ms = (
                max(0.0, price / mixed) for price in (full_price, whole_ms - full_price)
            )
            return DuetPlan(
                Mode.SPLIT,
                reason,
                decode_sms=split.decode_sms,
                prefill_sms=self._num_sms - split.decode_sms,
                lookahead=min(ceil(split.steps), limits.max_lookahead),
                tbt_ms=split.tbt_ms,
                prefill_ms=split.prefill_ms,
                tokens_per_s=1e3 * tokens / split.wall_ms,
                decode_ms=decode_ms,
                whole_step_ms=whole_step_ms,
                whole_prefill_ms=whole_prefill_ms,
                joins_late=JOIN_STEPS * split.guarded_ms > steps_between * limits.tbt_slo_ms,
            )
        whole = cap == prefill_tokens
        return DuetPlan(
            Mode.AGGREGATED if whole else Mode.CAPPED,
            reason,
            max_prefill_tokens=None if whole else cap,
            tbt_ms=tbt_ms,
            prefill_ms=tbt_ms,
            tokens_per_s=1e3 * (num_decodes + cap) / (tbt_ms * factor),
            decode_ms=decode_ms,
        )

    def decode_price(
        self,
        num_decodes: int,
        prefill_tokens: int,
        mixed_ms: float,
        prefill_ms: float,
        decode_ms: float,
        load: Load,
    ) -> float:
        """What a decode step is worth to :func:`speedup`, in ms of the mixed step.

        The times are of the mixed step, and of its prefill and its decodes alone. A decode
        step is worth what it would cost otherwise. While the prompts that wait do not fill a
        step, or where the KV cache is so full that they wait for decodes to end, that is a
        step alone. Where prompts are what the GPU is short of time for, it is what decodes add
        to a mixed step: most of a step alone is reading the weights when decodes are few,
        which beside a prefill they get for nothing. Where the GPU keeps up easily, that
        is right too: prompts are then served soonest.
        """
        weight = (1 - _rising(load.spare, SPARE_SHARES)) * (
            1 - _rising(load.backlog, BACKLOG_SHARES)
        )
        weight = max(weight, _rising(load.kv_usage, KV_SHARES))
        return weight * decode_ms + (1 - weight) * (mixed_ms - prefill_ms)

    def decode_worth(self, load: Load) -> float:
        """The part of its price that a decode step counts for.

        All of it, until prompts queue for steps to come: those are then to be served as fast as
        the bound allows. Not where they wait for room in the KV cache, which decodes make.
        """
        return 1 - _rising(load.backlog, QUEUE_STEPS) * (1 - _rising(load.kv_usage, KV_SHARES))

    def chunk_sizes(self, prefill_tokens: int) -> IntArray:
        """The chunks that a CAPPED step may have; the last is the whole prefill."""
        return chunk_sizes(prefill_tokens)

    def _splits(
        self,
        lanes: IntArray,
        step_ms: Sequence[float],
        until_done_ms: Sequence[float],
        decode_ms: float,
        prefill_ms: float,
        *,
        follows: bool,
        steps_between: int,
    ) -> list[_Split]:
        """Splits by decode lane, at the prices of :func:`speedup`.

        The bound has to hold for ``steps_between`` decode steps.
        """
        factor, guard = self._correct(DECODE_LANE)
        prefill_factor, _ = self._correct(PREFILL_LANE)
        splits = []
        forecasts = zip(lanes.tolist(), step_ms, until_done_ms, strict=True)
        for decode_sms, tbt_ms, done_ms in forecasts:
            lane_ms = tbt_ms * factor
            steps = done_ms * prefill_factor / lane_ms
            if not follows:
                # It joins at the end of the decode step in which it is done, and by then
                # asynchronous scheduling has queued one more.
                steps = ceil(steps) + 1
            wall_ms = steps * lane_ms
            rated = speedup(steps, decode_ms, prefill_ms, wall_ms)
            guarded_ms = lane_ms * guard * steps_between
            splits.append(_Split(decode_sms, tbt_ms, done_ms, guarded_ms, steps, wall_ms, rated))
        return splits

    def _correct(self, kind: str) -> tuple[float, float]:
        if self._correction is None:
            return 1.0, 1.0
        return self._correction.factor(kind), self._correction.guard(kind)


_speedup_of: Final = attrgetter("speedup")

_NO_LANES: Final = np.empty(0, dtype=np.int64)

_KEEPS_BOUND: Final = "the fastest that keeps the bound"
_OUT_OF_REACH: Final = "nothing keeps the bound: close to the smallest TBT"


def _tokens_per_pair(roofline: Roofline) -> float:
    """What one (query, key) pair of a long prefill costs on all SMs, in prefill tokens.

    From the roofline's time of 8192 tokens with and without as many before them.
    """
    length = 8192
    chunk = roofline.prefill_chunk_summary(length, np.array([0, length]))
    first_ms, later_ms = np.asarray(roofline.step_ms(chunk, roofline.profile.num_sms)).tolist()
    pair_ms = (later_ms - first_ms) / length**2
    token_ms = first_ms / length - pair_ms * (length + 1) / 2
    return float(max(0.0, pair_ms / max(token_ms, 1e-12)))
