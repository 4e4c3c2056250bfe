# SPDX-License-Identifier: Apache-2.0
"""Stands in for torch.cuda: streams that run nothing, and remember who waits for whom.

A stream runs its operations in order, an event is one of them, and waiting for an event
puts an edge between two streams. What must come before what is then a question of
reachability, and holds for every order in which a device might run the queues.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lanes.fake_driver import FakeDriver

from vllm_duet.lanes import cuda as cuda_lanes
from vllm_duet.lanes import green_context


def fake_gpu(patch: pytest.MonkeyPatch, at_once: bool = False) -> tuple[FakeCuda, FakeDriver]:
    """Have the CUDA lanes take this for a GPU of 132 SMs."""
    cuda, driver = FakeCuda(at_once), FakeDriver(132, 8, 8)
    patch.setattr(cuda_lanes, "cuda", cuda)
    patch.setattr(green_context, "_driver", lambda: driver)
    patch.setattr(green_context, "_external_stream", lambda *_: FakeStream(cuda, "green"))
    return cuda, driver


class FakeEvent:
    """The point in a stream's queue where it was recorded.

    ``reached`` and ``at_ms`` are the test's to set.
    """

    def __init__(self, reached: bool = False, enable_timing: bool = False) -> None:
        self.operation = -1
        self.reached = reached
        self.has_time = enable_timing
        self.at_ms = 0.0

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.has_time and later.has_time and self.reached and later.reached
        return later.at_ms - self.at_ms


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.last: int | None = None

    def queue(self, what: str) -> int:
        with self.cuda.lock:
            operation = len(self.cuda.operations)
            self.cuda.operations.append(what)
            self.cuda.after[operation] = [] if self.last is None else [self.last]
            self.last = operation
        return operation

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or self.cuda.Event()
        event.operation = self.queue("record")
        self.cuda.events.append(event)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.after[self.queue("wait")].append(event.operation)


class FakeCuda:
    """With ``at_once``, what is queued has run as soon as it is queued."""

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.operations: list[str] = []
        self.after: dict[int, list[int]] = {}
        self.events: list[FakeEvent] = []
        self.lock = threading.Lock()
        self.default = FakeStream(self, "default")
        self.synchronized = 0
        self.fault: Exception | None = None
        self.devices: dict[str, object] = {}
        self._local = threading.local()

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self.at_once, enable_timing)

    def Stream(self, device: object) -> FakeStream:
        return FakeStream(self, "made")

    def current_stream(self, device: object) -> FakeStream:
        stream: FakeStream = getattr(self._local, "stream", self.default)
        return stream

    def current_device(self) -> int:
        return 0

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream(None)
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def set_device(self, device: object) -> None:
        self.devices[threading.current_thread().name] = device

    def synchronize(self, device: object) -> None:
        self.synchronized += 1
        if self.fault is not None:
            raise self.fault

    def work(self, name: str) -> None:
        """Queue a kernel on the current stream of this thread."""
        self.current_stream(None).queue(name)

    def comes_before(self, first: str, second: str) -> bool:
        """Whether ``first`` has ended when ``second`` begins, in every order there is."""
        return self.operations.index(first) in self.before(self.operations.index(second))

    def before(self, operation: int) -> set[int]:
        """What has ended when ``operation`` begins."""
        pending, seen = [operation], set[int]()
        while pending:
            new = set(self.after[pending.pop()]) - seen
            seen |= new
            pending += new
        return seen
