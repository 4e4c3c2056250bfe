# SPDX-License-Identifier: Apache-2.0
"""A Device without a GPU: queues in virtual time, at the speed a profile says."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from vllm_duet.calibration.command import planned_device
from vllm_duet.calibration.device import CalibrationError, Device, Lanes
from vllm_duet.calibration.work import Work, predicted_ms, predicted_pair_ms
from vllm_duet.roofline import GpuProfile

LAUNCH_S, REPLAY_S, PREPARE_S = 4e-6, 8e-6, 5e-3
CONTEXT_BYTES, GRAPH_BYTES = 20 * 2**20, 2**20

TRUTH = replace(
    GpuProfile.load("h100-sxm"),
    gemm_fraction=0.78,
    unoverlapped=0.5,
    wave_fraction=0.12,
    gemm_overhead_us=5.0,
    hbm_fraction=0.88,
    attention_hbm_fraction=0.7,
    rowwise_overhead_us=1.6,
    compute_curve=((8, 0.07), (64, 0.55), (100, 0.85), (132, 1.0)),
    bandwidth_curve=((8, 0.12), (24, 0.4), (64, 0.9), (132, 1.0)),
    contention=1.6,
    factors={},
)
"""A GPU that differs from the shipped profile in everything that is fitted."""


@dataclass(eq=False)
class SimulatedLane:
    num_sms: int
    phase: str
    sm_ids: frozenset[int]
    queue: list[Any] = field(default_factory=list)
    alive: bool = True


@dataclass(eq=False)
class Mark:
    submitted_ms: float
    at_ms: float | None = None


@dataclass(eq=False)
class Item:
    submitted_ms: float
    works: tuple[Work, ...]
    lane: SimulatedLane  # where it runs: its speed
    left_ms: float


class SimulatedUnit:
    relative_error = 0.002

    def __init__(
        self, device: SimulatedDevice, works: Sequence[Work], lane: SimulatedLane, runs: int
    ) -> None:
        self.device, self.works, self.lane, self.runs = device, tuple(works), lane, runs
        self.captured = False
        self.ran_on: frozenset[int] = frozenset()

    def launch(self, lane: SimulatedLane | None = None) -> None:
        queue_of = lane or self.lane
        runs_on = self.lane if self.captured and self.device.captured_stays else queue_of
        assert queue_of.alive and runs_on.alive, "launched on a lane that has been released"
        self.ran_on = runs_on.sm_ids
        count = self.runs * len(self.works)
        self.device.cpu_s += REPLAY_S if self.captured else LAUNCH_S * count
        alone_ms = self.runs * self.device.alone_ms(self.works, runs_on.num_sms)
        noise = self.device.random.lognormal(0, self.device.noise) if self.device.noise else 1.0
        item = Item(1e3 * self.device.cpu_s, self.works, runs_on, alone_ms * noise)
        queue_of.queue.append(item)


class SimulatedDevice(Device):
    """Two lanes slow each other as ``truth`` says; each launch varies by ``noise``.

    ``turns`` makes a GPU that runs one lane at a time, and ``broken`` one on which the
    work of that name is computed wrongly.
    """

    def __init__(
        self,
        truth: GpuProfile = TRUTH,
        noise: float = 0.0,
        *,
        captured_stays: bool = True,
        turns: str | None = None,
        broken: str | None = None,
    ) -> None:
        self.truth, self.noise = truth, noise
        self.captured_stays, self.turns, self.broken = captured_stays, turns, broken
        self.info = planned_device()
        self.random = np.random.default_rng(3)
        self.cpu_s = self.gpu_ms = 0.0
        everything = frozenset(range(truth.num_sms))
        self._whole = SimulatedLane(truth.num_sms, "decode", everything)
        self.lanes = [self._whole]
        self.open = 0
        self.units: weakref.WeakSet[SimulatedUnit] = weakref.WeakSet()
        self._slower: dict[Any, tuple[float, float]] = {}
        self.alone_ms = cache(partial(predicted_ms, truth))

    def whole(self) -> SimulatedLane:
        return self._whole

    @contextmanager
    def split(
        self, decode_sms: int, *, separate_work_queues: bool = True, decode_priority: int = 0
    ) -> Iterator[Lanes]:
        assert decode_sms in self.info.splits
        self.cpu_s += 3e-3
        numbers = range(self.truth.num_sms)
        decode = SimulatedLane(decode_sms, "decode", frozenset(numbers[:decode_sms]))
        rest = frozenset(numbers[decode_sms:])
        prefill = SimulatedLane(len(rest), "prefill", rest)
        self.lanes += [decode, prefill]
        self.open += 1
        yield Lanes(decode, prefill, separate_work_queues)
        self.synchronize()
        captured = [u for u in self.units if u.captured and u.lane in (decode, prefill)]
        assert not captured, "a graph outlives the context it was captured in"
        self.open -= 1
        for lane in (decode, prefill):
            lane.alive = False
            self.lanes.remove(lane)

    def prepare(
        self, works: Sequence[Work], lane: Any, *, runs: int = 1, captured: bool = True
    ) -> SimulatedUnit:
        for work in works:
            if work.name == self.broken:
                raise CalibrationError(f"{work} is wrong on {lane.num_sms} SMs")
        self.synchronize()
        self.cpu_s += PREPARE_S
        unit = SimulatedUnit(self, works, lane, runs)
        unit.captured = captured
        self.units.add(unit)
        return unit

    def mark(self, lane: Any) -> Mark:
        assert lane.alive
        mark = Mark(1e3 * self.cpu_s)
        lane.queue.append(mark)
        return mark

    def wait(self, mark: Mark) -> None:
        self._run_until(mark)
        self.cpu_s = max(self.cpu_s, 1e-3 * self.gpu_ms)

    def elapsed_ms(self, start: Mark, end: Mark) -> float:
        assert start.at_ms is not None and end.at_ms is not None, "asked before it was reached"
        return end.at_ms - start.at_ms

    def synchronize(self) -> None:
        self._run_until(None)
        self.cpu_s = max(self.cpu_s, 1e-3 * self.gpu_ms)

    def now_s(self) -> float:
        return self.cpu_s

    def free_bytes(self) -> int:
        graphs = sum(unit.captured for unit in self.units)
        held = 2 * self.open * CONTEXT_BYTES + graphs * GRAPH_BYTES
        return self.info.memory_bytes - held

    def sm_ids(self, unit: Any) -> frozenset[int]:
        self.synchronize()
        found: frozenset[int] = unit.ran_on
        return found

    def _run_until(self, mark: Mark | None) -> None:
        while mark is None or mark.at_ms is None:
            heads = [lane.queue[0] for lane in self.lanes if lane.queue]
            if not heads:
                assert mark is None
                return
            if all(head.submitted_ms > self.gpu_ms for head in heads):
                self.gpu_ms = min(head.submitted_ms for head in heads)
            ready = [head for head in heads if head.submitted_ms <= self.gpu_ms]
            if reached := [head for head in ready if isinstance(head, Mark)]:
                for head in reached:
                    head.at_ms = self.gpu_ms
                    self._pop(head)
                continue
            running = ready
            if self.turns:
                # "fifo": in the order of launching; "decode first": all of decode's queue.
                key = (lambda head: head.submitted_ms) if self.turns == "fifo" else lambda _: 0
                running = [min(ready, key=key)]
            slower = self._slowed(running)
            steps = [item.left_ms * slow for item, slow in zip(running, slower, strict=True)]
            steps += [head.submitted_ms - self.gpu_ms for head in heads if head not in ready]
            step = min(steps)
            self.gpu_ms += step
            for item, slow in zip(running, slower, strict=True):
                item.left_ms -= step / slow
                if item.left_ms <= 1e-9:
                    self._pop(item)

    def _pop(self, head: Any) -> None:
        for lane in self.lanes:
            if lane.queue and lane.queue[0] is head:
                lane.queue.pop(0)

    def _slowed(self, running: Sequence[Item]) -> Sequence[float]:
        by_phase = {item.lane.phase: item for item in running}
        if len(running) != 2 or len(by_phase) != 2:
            return [1.0] * len(running)
        decode, prefill = by_phase["decode"], by_phase["prefill"]
        sizes = decode.lane.num_sms, prefill.lane.num_sms
        key = decode.works, prefill.works, sizes
        if key not in self._slower:
            beside = predicted_pair_ms(self.truth, decode.works, prefill.works, *sizes)
            self._slower[key] = (
                beside[0] / self.alone_ms(decode.works, sizes[0]),
                beside[1] / self.alone_ms(prefill.works, sizes[1]),
            )
        return [self._slower[key][item.lane.phase == "prefill"] for item in running]
