# SPDX-License-Identifier: Apache-2.0
"""The simulated GPU: how long each step takes, and what overlaps what.

The policy under test forecasts with a Roofline of its own. The ground truth here is what
was measured of the model's operators (measured.py); where nothing was, it starts from the
same operator terms as the policy. It adds what the policy does not know of: the CPU's
launches, CUDA graph padding, lost time inside SM groups, more interference between lanes
than shared bandwidth explains, and noise.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Literal

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_duet.plan import Join, PrefillLaunch, batch_of, directive_of
from vllm_duet.roofline import BatchSummary, Roofline
from vllm_duet.roofline.operators import Kind

if TYPE_CHECKING:  # needs pandas
    from vllm_duet.sim.measured import MeasuredSteps

LaneName = Literal["gpu", "decode", "prefill"]


@dataclass(frozen=True, slots=True)
class Disturbances:
    """What the ground truth has beyond a roofline. All are assumptions until measured.

    ``noise`` is the standard deviation of the logarithm of a step's time.
    ``interference`` multiplies the delay that the lanes' demands for bandwidth cause,
    and ``shared`` is what either loses beside the other whatever the demands, to L2 and
    power. ``group_loss`` is what a lane loses to kernels that size their grids for the
    whole GPU. ``launch_us`` is the CPU time to launch one kernel, for steps without
    full CUDA graphs; ``piecewise_tokens`` is the largest step whose kernels between the
    attentions are graphs (vLLM's largest capture size).
    """

    noise: float = 0.03
    interference: float = 1.25
    shared: float = 0.03
    group_loss: float = 0.03
    launch_us: float = 4.0
    piecewise_tokens: int = 512


GRAPH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""The decode batch sizes that vLLM captures; a batch is padded to the next."""


@dataclass(frozen=True, slots=True)
class Work:
    """A batch: what the roofline takes of it, and its time alone on the whole GPU in ms."""

    summary: BatchSummary
    whole_ms: float


class GroundTruth:
    """Times in ms of steps, without noise. Batches are lengths, as in ``plan.batch_of``.

    On the whole GPU a step takes what ``measured`` says, and by how much fewer SMs or a
    neighbour slow it is the roofline's ratio. Without ``measured`` all is the roofline's.
    Decodes are padded to the next of ``graph_sizes``. ``includes_host``: the roofline's times of
    whole steps are of steps that the host has launched, so that launching costs nothing more.
    """

    def __init__(
        self,
        roofline: Roofline,
        disturbances: Disturbances,
        measured: MeasuredSteps | None = None,
        *,
        graph_sizes: Sequence[int] = GRAPH_SIZES,
        includes_host: bool = False,
    ) -> None:
        self.roofline = roofline
        self.graph_sizes = graph_sizes
        self.includes_host = includes_host
        self.measured = measured
        self.num_sms = roofline.profile.num_sms
        self.disturbances = disturbances
        kernels = sum(op.repeats for op in roofline.operators if op.kind is not Kind.STEP)
        self._eager_ms = 1e-3 * disturbances.launch_us * kernels
        # One attention and one graph for all between two of them, a layer.
        self._piecewise_ms = 2e-3 * disturbances.launch_us * roofline.shape.num_layers

    def decode(self, context_lens: Sequence[int]) -> Work:
        """A decode step as its CUDA graph runs it: padded."""
        count = len(context_lens)
        at = bisect_left(self.graph_sizes, count)
        padded = self.graph_sizes[at] if at < len(self.graph_sizes) else count
        summary = replace(self.roofline.decode_summary(context_lens), decode_tokens=padded)
        return self._work(summary, context_lens, [], [], padding=padded - count)

    def prefill(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Work:
        summary = self.roofline.prefill_summary(query_lens, context_lens)
        return self._work(summary, [], query_lens, context_lens)

    def step_ms(
        self,
        decode_context_lens: Sequence[int],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
    ) -> float:
        """One step on the whole GPU: decodes, prefills, or both mixed."""
        if not query_lens:
            return self.decode(decode_context_lens).whole_ms
        summary = self.roofline.decode_summary(decode_context_lens) + self.roofline.prefill_summary(
            query_lens, context_lens
        )
        work = self._work(summary, decode_context_lens, query_lens, context_lens)
        if self.includes_host:
            return work.whole_ms
        tokens = len(decode_context_lens) + sum(query_lens)
        return max(work.whole_ms, self.launch_ms(tokens))

    def _work(
        self,
        summary: BatchSummary,
        decode_context_lens: Sequence[int],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        padding: int = 0,
    ) -> Work:
        if self.measured is None:
            return Work(summary, float(self.roofline.step_ms(summary, self.num_sms)))
        ms = self.measured.step_ms(decode_context_lens, query_lens, context_lens, padding)
        return Work(summary, ms)

    def launch_ms(self, tokens: int) -> float:
        """CPU time to launch a step that is no full CUDA graph."""
        small = tokens <= self.disturbances.piecewise_tokens
        return self._piecewise_ms if small else self._eager_ms

    def lane_ms(self, work: Work, num_sms: int) -> float:
        """One batch alone on ``num_sms`` SMs."""
        if num_sms == self.num_sms:
            return work.whole_ms
        alone_ms = float(self.roofline.step_ms(work.summary, num_sms))
        return alone_ms * self._factor(work) * (1 + self.disturbances.group_loss)

    def pair_ms(
        self, decode: Work, prefill: Work, decode_sms: int, prefill_sms: int
    ) -> tuple[float, float]:
        """Both batches for as long as they run beside each other."""
        d = self.disturbances
        beside = self.roofline.pair_ms(decode.summary, prefill.summary, decode_sms, prefill_sms)
        lanes = ((decode, decode_sms), (prefill, prefill_sms))
        slowed = []
        for (work, sms), beside_ms in zip(lanes, beside, strict=True):
            alone_ms = self.roofline.step_ms(work.summary, sms)
            ms = float(alone_ms * (1 + d.shared) + d.interference * (beside_ms - alone_ms))
            slowed.append(ms * self._factor(work) * (1 + d.group_loss))
        return slowed[0], slowed[1]

    def _factor(self, work: Work) -> float:
        """How much slower than the roofline's the truth is."""
        if self.measured is None:
            return 1.0
        return work.whole_ms / float(self.roofline.step_ms(work.summary, self.num_sms))


@dataclass(slots=True)
class Interval:
    """What a lane did, for steps.jsonl and the timeline; times in ms."""

    lane: LaneName
    mode: str
    start_ms: float
    end_ms: float
    decodes: int
    prefill_tokens: int
    sms: int


@dataclass(slots=True)
class _InFlight:
    """A prefill in flight; ``left`` is the part of it that is not computed at ``at_ms``."""

    launch: PrefillLaunch
    work: Work
    alone_ms: float
    noise: float
    interval: Interval
    at_ms: float
    join_after: int | None
    left: float = 1.0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that was given to the GPU: when it ends, and which prefill it brings back, with
    how long that was computed."""

    end_ms: float
    joined: PrefillLaunch | None = None
    prefill_busy_ms: float = 0.0
    launch_cpu_ms: float = 0.0


class SimulatedGpu:
    """Runs SchedulerOutputs in order, in virtual time."""

    def __init__(self, truth: GroundTruth, seed: int) -> None:
        self.truth = truth
        self.intervals: list[Interval] = []
        self._random = Random(seed)
        self._free_at = 0.0
        self._prefills: deque[_InFlight] = deque()

    def run(self, output: SchedulerOutput, now_ms: float, join_after: int | None = None) -> Ran:
        """Queue a step at ``now_ms``; it starts when the step before it has ended.

        A prefill it launches starts with it, or when the one in flight has ended.

        A prefill may join at the first step that finds it done or, with
        ``join_after``, after that many decode steps and not before.
        """
        start = max(now_ms, self._free_at)
        decodes, query_lens, context_lens = batch_of(output)
        directive = directive_of(output)
        if directive is None:
            return self._whole(start, decodes, query_lens, context_lens)
        launch_ms = 0.0
        if directive.launch is not None:
            launch_ms = self._launch(directive.launch, start, join_after)
        end = self._decode(start, decodes, directive.decode_sms) if decodes else start
        joins = directive.join is not None or join_after is not None
        ran = self._join(end, wait=directive.join is Join.WAIT) if joins else Ran(end)
        return replace(ran, launch_cpu_ms=launch_ms)

    def _noise(self) -> float:
        return math.exp(self._random.gauss(0.0, self.truth.disturbances.noise))

    def _whole(
        self, start: float, decodes: list[int], query_lens: list[int], context_lens: list[int]
    ) -> Ran:
        if not decodes and not query_lens:
            return Ran(start)
        end = start + self.truth.step_ms(decodes, query_lens, context_lens) * self._noise()
        mode = "mixed" if decodes and query_lens else "decode_only" if decodes else "prefill_only"
        self.intervals.append(
            Interval("gpu", mode, start, end, len(decodes), sum(query_lens), self.truth.num_sms)
        )
        self._free_at = end
        return Ran(end)

    def _launch(self, launch: PrefillLaunch, start: float, join_after: int | None) -> float:
        _, query_lens, context_lens = batch_of(launch.output)
        tokens, sms = sum(query_lens), launch.prefill_sms
        work = self.truth.prefill(query_lens, context_lens)
        interval = Interval("prefill", "split", start, start, 0, tokens, sms)
        launch_ms = self.truth.launch_ms(tokens)
        self._prefills.append(
            _InFlight(
                launch,
                work,
                max(self.truth.lane_ms(work, sms), launch_ms),
                self._noise(),
                interval,
                start,
                join_after,
            )
        )
        self.intervals.append(interval)
        return launch_ms

    def _decode(self, start: float, decodes: list[int], sms: int) -> float:
        """A decode step on its lane, beside the prefills for as long as they last."""
        work = self.truth.decode(decodes)
        noise = self._noise()
        alone_ms = self.truth.lane_ms(work, sms) * noise
        now, left = start, 1.0
        for prefill in self._prefills:
            self._prefill_alone_until(prefill, now)
            if prefill.left <= 0:
                continue
            decode_ms, prefill_ms = self.truth.pair_ms(
                work, prefill.work, sms, prefill.launch.prefill_sms
            )
            decode_ms *= noise
            prefill_ms = max(prefill_ms, prefill.alone_ms) * prefill.noise
            together = min(left * decode_ms, prefill.left * prefill_ms)
            done = together == prefill.left * prefill_ms
            prefill.left = 0.0 if done else prefill.left - together / prefill_ms
            left -= together / decode_ms
            now += together
            prefill.at_ms = now
            self._start_next(prefill)
            if not done:
                left = 0.0
                break
        end = now + max(left, 0.0) * alone_ms
        self.intervals.append(Interval("decode", "split", start, end, len(decodes), 0, sms))
        self._free_at = end
        return end

    def _prefill_alone_until(self, prefill: _InFlight, now: float) -> None:
        if prefill.left > 0 and now > prefill.at_ms:
            alone_ms = prefill.alone_ms * prefill.noise
            done = prefill.at_ms + prefill.left * alone_ms
            prefill.left = max(0.0, prefill.left - (now - prefill.at_ms) / alone_ms)
            prefill.at_ms = min(now, done)
            self._start_next(prefill)

    def _start_next(self, prefill: _InFlight) -> None:
        """Where ``prefill`` has just ended, the one behind it begins."""
        prefill.interval.end_ms = prefill.at_ms
        behind = self._prefills.index(prefill) + 1
        if prefill.left <= 0 and behind < len(self._prefills):
            follower = self._prefills[behind]
            follower.at_ms = follower.interval.start_ms = max(follower.at_ms, prefill.at_ms)

    def _join(self, end: float, wait: bool) -> Ran:
        if not self._prefills:
            return Ran(end)
        prefill = self._prefills[0]
        prefill.steps += 1
        if prefill.join_after is not None and not wait:
            if prefill.steps < prefill.join_after:
                return Ran(end)
            wait = True
        if wait:
            self._prefill_alone_until(prefill, math.inf)
            end = max(end, prefill.at_ms)
        elif prefill.left > 0:
            return Ran(end)
        self._prefills.popleft()
        self._free_at = max(self._free_at, end)
        interval = prefill.interval
        return Ran(end, prefill.launch, interval.end_ms - interval.start_ms)
