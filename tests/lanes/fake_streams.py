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


class FakeEvent:
    """The point in a stream's queue where it was recorded; ``reached`` is the test's to set."""

    def __init__(self, operation: int) -> None:
        self.operation = operation
        self.reached = False

    def query(self) -> bool:
        return self.reached


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

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self.queue("record"))
        self.cuda.events.append(event)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.after[self.queue("wait")].append(event.operation)

    def wait_stream(self, other: FakeStream) -> None:
        if other.last is not None:
            self.cuda.after[self.queue("wait")].append(other.last)


class FakeCuda:
    def __init__(self) -> None:
        self.operations: list[str] = []
        self.after: dict[int, list[int]] = {}
        self.events: list[FakeEvent] = []
        self.lock = threading.Lock()
        self.default = FakeStream(self, "default")
        self.synchronized = 0
        self.devices: dict[str, object] = {}
        self._local = threading.local()

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

    def work(self, name: str) -> None:
        """Queue a kernel on the current stream of this thread."""
        self.current_stream(None).queue(name)

    def comes_before(self, first: str, second: str) -> bool:
        """Whether ``first`` has ended when ``second`` begins, in every order there is."""
        target, pending = self.operations.index(first), [self.operations.index(second)]
        seen = set(pending)
        while pending:
            for operation in self.after[pending.pop()]:
                if operation == target:
                    return True
                if operation not in seen:
                    seen.add(operation)
                    pending.append(operation)
        return False
