# SPDX-License-Identifier: Apache-2.0
"""The CUDA lanes over streams that remember who waits for whom, and a real second thread."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes.fake_streams import FakeStream, fake_gpu

from vllm_duet.lanes.cuda import CudaLanePair, LaneError
from vllm_duet.lanes.green_context import GreenContextError

DEVICE = torch.device("cuda", 0)
LANES = (16, 32)


class Rig:
    """The lanes of a fake GPU of 132 SMs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cuda, self.driver = fake_gpu(patch)
        self.pair = CudaLanePair.create(LANES, DEVICE)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch)
    yield rig
    rig.pair.shutdown()


# Who waits for whom


@dataclass
class Story:
    """Steps as the runner makes them, and what must come before what."""

    rig: Rig
    required: list[tuple[str, str]] = field(default_factory=list)
    beside: list[tuple[str, str]] = field(default_factory=list)
    in_flight: list[tuple[int, Any]] = field(default_factory=list)
    count: int = 0
    last_on_caller: str | None = None
    last_prepared: str | None = None
    last_prefill: str | None = None

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what} {self.count}"

    def caller_works(self) -> str:
        name = self.name("caller")
        self.rig.cuda.work(name)
        if self.last_on_caller:
            self.required.append((self.last_on_caller, name))
        self.last_on_caller = name
        return name

    def decodes(self, sms: int) -> str:
        name = self.name("decode")
        with self.rig.pair.decoding(sms):
            self.rig.cuda.work(name)
        self.required += [(x, name) for x in (self.last_on_caller, self.last_prepared) if x]
        self.last_on_caller = name  # the caller's stream goes on after it
        return name

    def launches(self, sms: int, forks: bool) -> None:
        before = self.caller_works()
        if forks:
            self.rig.pair.fork()
        decode = self.decodes(sms)
        prepared, prefill = self.name("prepare"), self.name("prefill")
        with self.rig.pair.preparing():
            self.rig.cuda.work(prepared)
        launched = self.rig.pair.launch(lambda: self.rig.cuda.work(prefill), 132 - sms)
        self.required += [(before, prepared), (prepared, prefill)]
        if forks:
            self.beside += [(decode, prepared), (decode, prefill)]
        else:
            self.required.append((decode, prefill))
        if self.last_prefill:
            self.required.append((self.last_prefill, prefill))
        # Behind one in flight, it is prepared at once; vLLM's buffers last a few steps.
        self.beside += [(earlier, prepared) for _, (earlier, _) in self.in_flight]
        self.last_prepared, self.last_prefill = prepared, prefill
        self.in_flight.append((len(self.in_flight), (prefill, launched)))

    def decodes_beside(self, sms: int) -> None:
        decode = self.decodes(sms)
        self.beside += [(prefill, decode) for _, (prefill, _) in self.in_flight]

    def joins(self) -> None:
        _, (prefill, launched) = self.in_flight.pop(0)
        launched.result()
        self.required.append((prefill, self.caller_works()))

    def broken(self) -> list[tuple[str, str]]:
        comes_before = self.rig.cuda.comes_before
        return [
            *(pair for pair in self.required if not comes_before(*pair)),
            *(pair for pair in self.beside if comes_before(*pair)),
        ]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["launch", "launch and fork", "beside", "join", "caller"]),
        st.sampled_from(LANES),
    ),
    max_size=14,
)


def tell(rig: Rig, steps: list[tuple[str, int]]) -> Story:
    story = Story(rig)
    for what, sms in steps:
        if what == "beside":
            story.decodes_beside(sms)
        elif what == "join":
            if story.in_flight:
                story.joins()
        elif what == "caller":
            story.caller_works()
        elif len(story.in_flight) < 2:
            story.launches(sms, forks=what == "launch and fork")
    while story.in_flight:
        story.joins()
    return story


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_everything_waits_for_what_it_needs_and_for_nothing_else(steps: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        rig = Rig(patch)
        assert tell(rig, steps).broken() == []
        rig.pair.shutdown()


WHOLE = [
    ("launch and fork", 16),
    ("beside", 16),
    ("launch and fork", 32),
    ("beside", 32),
    ("join", 0),
    ("launch", 16),
    ("beside", 32),
]


def test_a_wait_left_out_is_noticed() -> None:
    """Each of them in turn: the story breaks without it."""
    stock, total = FakeStream.wait_event, 0

    def run(left_out: int | None) -> int:
        nonlocal total
        calls = 0

        def counted(stream: FakeStream, other: Any) -> None:
            nonlocal calls
            if calls != left_out:
                stock(stream, other)
            calls += 1

        with pytest.MonkeyPatch.context() as patch:
            rig = Rig(patch)
            patch.setattr(FakeStream, "wait_event", counted)
            story = tell(rig, WHOLE)
            rig.pair.shutdown()
            total = calls
            return len(story.broken())

    assert run(None) == 0
    needed = [run(number) for number in range(total)]
    # Some orders are given twice, by way of another stream.
    assert sum(broken > 0 for broken in needed) >= len(needed) // 2
    assert any(needed)


# The second thread


def test_decode_steps_are_queued_while_a_prefill_is(rig: Rig) -> None:
    going, may_end = threading.Event(), threading.Event()

    def prefill() -> str:
        going.set()
        assert may_end.wait(60)
        with rig.pair.exclusive():
            rig.cuda.work("prefill")
        return "its result"

    launched = rig.pair.launch(prefill, 116)
    assert going.wait(60)
    with rig.pair.exclusive(), rig.pair.decoding(16):
        rig.cuda.work("decode")
    assert not launched.done()
    may_end.set()
    launched.wait_until_queued()
    assert not launched.done()  # queued, and not yet run
    rig.cuda.events[-1].reached = True
    assert launched.done()
    assert launched.result() == "its result"
    assert not rig.cuda.comes_before("decode", "prefill")
    assert list(rig.cuda.devices.values()) == [DEVICE]


def test_prefills_run_in_the_order_of_their_launches(rig: Rig) -> None:
    names = [f"prefill {n}" for n in range(5)]
    launched = [
        rig.pair.launch(lambda name=name: rig.cuda.work(name), 132 - LANES[n % 2])
        for n, name in enumerate(names)
    ]
    for one in launched:
        one.result()
    for first, second in pairwise(names):
        assert rig.cuda.comes_before(first, second)


def test_what_a_prefill_reads_lives_until_its_result_is_taken(rig: Rig) -> None:
    class Tensor:
        pass

    tensor = Tensor()
    launched = rig.pair.launch(lambda tensor=tensor: None, 116)
    alive = weakref.ref(tensor)
    del tensor
    launched.wait_until_queued()
    # Something else for the thread, which would hold its last callable itself.
    rig.pair.launch(lambda: None, 116).wait_until_queued()
    gc.collect()
    assert alive() is not None
    launched.result()
    gc.collect()
    assert alive() is None


# Failures


def test_a_failure_names_its_lane_and_the_next_prefill_runs(rig: Rig) -> None:
    def fails() -> None:
        rig.cuda.work("half of it")
        raise torch.OutOfMemoryError("no room")

    failed = rig.pair.launch(fails, 100)
    later = rig.pair.launch(lambda: rig.cuda.work("later"), 116)
    failed.wait_until_queued()
    with pytest.raises(torch.OutOfMemoryError, match="no room") as raised:
        failed.result()
    assert raised.value.__notes__ == ["In the prefill lane of 100 SMs."]
    rig.cuda.work("after it")
    later.result()
    # Nothing that it queued is still running when its memory is given away.
    assert rig.cuda.comes_before("half of it", "after it")
    assert rig.cuda.comes_before("half of it", "later")


def test_a_step_that_fails_gives_the_stream_back(rig: Rig) -> None:
    for block in (rig.pair.decoding(16), rig.pair.preparing()):
        with pytest.raises(ZeroDivisionError), block:
            raise ZeroDivisionError
        assert rig.cuda.current_stream(DEVICE) is rig.cuda.default
    launched = rig.pair.launch(lambda: rig.cuda.work("prefill"), 116)
    launched.result()


def test_lanes_that_are_not_there(rig: Rig) -> None:
    no_decode_lane = pytest.raises(LaneError, match=r"^There is no decode lane of 24 SMs\.$")
    with no_decode_lane, rig.pair.decoding(24):
        pass
    with pytest.raises(LaneError, match=r"^There is no prefill lane of 108 SMs\.$"):
        rig.pair.launch(lambda: None, 108)


def test_a_decode_step_that_fails_names_its_lane(rig: Rig) -> None:
    with pytest.raises(ZeroDivisionError) as raised, rig.pair.decoding(32):
        raise ZeroDivisionError
    assert raised.value.__notes__ == ["In the decode lane of 32 SMs."]


@pytest.mark.parametrize("fault", [None, RuntimeError("CUDA error: an illegal memory access")])
def test_a_fault_of_the_device_is_found_out(rig: Rig, fault: Exception | None) -> None:
    rig.cuda.fault = fault
    assert rig.pair.is_usable() == (fault is None)
    rig.cuda.fault = None


# How busy the lanes are


def test_a_prefill_was_busy_from_when_it_could_begin(rig: Rig) -> None:
    earlier = rig.pair.launch(lambda: None, 100)
    earlier.wait_until_queued()
    launched = rig.pair.launch(lambda: rig.cuda.work("prefill"), 116)
    launched.result()
    _, earlier_end, begin, end = [event for event in rig.cuda.events if event.has_time]
    begin.at_ms, end.at_ms, begin.reached = 10.0, 47.5, True
    assert launched.busy_ms() == 37.5
    # The time that it waited for the one before does not count.
    assert earlier_end.operation in rig.cuda.before(begin.operation)
    assert begin.operation < rig.cuda.operations.index("prefill") < end.operation


def test_decode_steps_count_when_they_have_run_and_once(rig: Rig) -> None:
    for sms, begin_ms, end_ms in ((16, 5.0, 12.0), (32, 20.0, 26.0), (16, 30.0, 39.0)):
        with rig.pair.decoding(sms):
            rig.cuda.work("decode")
        begin, end = [event for event in rig.cuda.events if event.has_time][-2:]
        begin.at_ms, end.at_ms = begin_ms, end_ms
    timed = [event for event in rig.cuda.events if event.has_time]
    assert rig.pair.decode_busy_ms() == 0
    for event in timed[:4]:
        event.reached = True
    assert rig.pair.decode_busy_ms() == 7 + 6
    assert rig.pair.decode_busy_ms() == 0
    for event in timed:
        event.reached = True
    assert rig.pair.decode_busy_ms() == 9


# Slices


@pytest.mark.parametrize("slices", [True, False])
def test_slices_are_launched_between_decode_steps(rig: Rig, slices: bool) -> None:
    pair = CudaLanePair({}, DEVICE, slices)
    pair._prefill_streams = dict(rig.pair._prefill_streams)
    first_layer, may_go_on, second_layer = (threading.Event() for _ in range(3))

    def prefill() -> None:
        rig.cuda.work("first layer")
        first_layer.set()
        assert may_go_on.wait(60)
        pair.give_way()
        rig.cuda.work("second layer")
        second_layer.set()

    launched = pair.launch(prefill, 116)
    assert first_layer.wait(60)
    with pair.exclusive():
        may_go_on.set()
        # Without slices the prefill goes on while a decode step is launched.
        assert second_layer.wait(0.2 if slices else 60) != slices
        rig.cuda.work("decode")
    launched.wait_until_queued()
    decode, layer = map(rig.cuda.operations.index, ("decode", "second layer"))
    assert (decode < layer) == slices
    pair.shutdown()


# The splits


def test_decode_streams_are_the_more_urgent(rig: Rig) -> None:
    assert sorted(rig.pair.decode_streams) == list(LANES)
    assert rig.pair.prefill_sms == {132 - sms for sms in LANES}
    made = [(len(s.context.sm_ids), s.priority) for s in rig.driver.streams.values()]
    assert sorted(made) == [(16, -1), (32, -1), (100, 0), (116, 0)]


def test_shutdown_lets_a_prefill_end_and_releases_the_sms(rig: Rig) -> None:
    ended = threading.Event()
    rig.pair.launch(ended.set, 116)
    rig.pair.shutdown()
    assert ended.is_set()
    assert not rig.driver.alive and rig.cuda.synchronized == 1
    rig.pair.shutdown()
    assert rig.cuda.synchronized == 1
    with pytest.raises(LaneError):
        rig.pair.launch(lambda: None, 116)


def test_a_split_that_cannot_be_had_leaves_nothing_behind(rig: Rig) -> None:
    rig.pair.shutdown()
    with pytest.raises(GreenContextError, match="cannot give 20 of its 132 SMs"):
        CudaLanePair.create([16, 20], DEVICE)
    assert not rig.driver.alive
