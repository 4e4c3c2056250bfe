# SPDX-License-Identifier: Apache-2.0
"""Both lanes on one device queue: the in-flight protocol without a GPU.

A GPU may run a launched prefill at any moment between its launch and its join.
A lane that always ran it at once would hide every KV block, request row or
input buffer given away too soon, so the moment is a setting:

* ``early``: at the launch;
* ``late``: at the join, after every decode step beside it;
* ``threaded``: on a second thread, between any two decode steps;
* ``interleaved``: a layer at a time, one between any two decode steps.

However soon it has run, the result counts as done only after ``hold_steps``
decode steps, so that steps beside a prefill in flight always occur.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

from vllm_duet.lanes.base import InFlight, LanePair

T = TypeVar("T")
Timing = Literal["early", "late", "threaded", "interleaved"]


class SerialLanePair(LanePair):
    """Lanes for a device that runs one thing at a time.

    ``timing`` is when a prefill runs, ``hold_steps`` how many decode steps its
    result is held back.
    """

    def __init__(self, timing: Timing = "late", hold_steps: int = 2) -> None:
        self.timing = timing
        self.hold_steps = hold_steps
        self._lock = threading.RLock()
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="duet-prefill")
            if timing in ("threaded", "interleaved")
            else None
        )
        self._interleaved: list[_Interleaved[Any]] = []
        self._decode_busy_ms = 0.0

    def launch(self, prefill: Callable[[], T], prefill_sms: int) -> InFlight[T]:
        if self._thread is None:
            return (_Late if self.timing == "late" else _Early)(prefill, self.hold_steps)
        if self.timing == "threaded":
            return _Threaded(prefill, self.hold_steps, self._thread, self._lock)
        launched = _Interleaved(prefill, self.hold_steps, self._thread)
        self._interleaved = [p for p in self._interleaved if not p.has_ended] + [launched]
        return launched

    def give_way(self) -> None:
        running = next((p for p in self._interleaved if not p.has_ended), None)
        if running is not None:
            running.pause()

    @contextmanager
    def decoding(self, decode_sms: int) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._decode_busy_ms += 1e3 * (time.perf_counter() - began)

    def decode_busy_ms(self) -> float:
        busy_ms, self._decode_busy_ms = self._decode_busy_ms, 0.0
        return busy_ms

    def exclusive(self) -> AbstractContextManager[object]:
        return self._lock

    def shutdown(self) -> None:
        for prefill in self._interleaved:
            prefill.run_to_the_end()
        if self._thread is not None:
            self._thread.shutdown(wait=True)


class _Held(InFlight[T]):
    """Counts the decode steps that it is held back for, and the time that it runs."""

    def __init__(self, prefill: Callable[[], T], hold_steps: int) -> None:
        self._prefill = prefill
        self._held_for = hold_steps
        self._busy_ms = 0.0

    def done(self) -> bool:
        self._held_for -= 1
        return self._held_for < 0 and self._has_run()

    def _has_run(self) -> bool:
        return True

    def _run(self) -> T:
        began = time.perf_counter()
        try:
            return self._prefill()
        finally:
            self._busy_ms += 1e3 * (time.perf_counter() - began)

    def busy_ms(self) -> float:
        return self._busy_ms


class _Late(_Held[T]):
    def result(self) -> T:
        return self._run()


class _Started(_Held[T]):
    """One that is run before its result is asked for; ``_outcome`` is what came of it."""

    _outcome: Future[T]

    def _has_run(self) -> bool:
        return self._outcome.done()

    def result(self) -> T:
        return self._outcome.result()


class _Early(_Started[T]):
    def __init__(self, prefill: Callable[[], T], hold_steps: int) -> None:
        super().__init__(prefill, hold_steps)
        self._outcome = Future()
        try:
            self._outcome.set_result(self._run())
        except Exception as error:
            self._outcome.set_exception(error)


class _Threaded(_Started[T]):
    def __init__(
        self,
        prefill: Callable[[], T],
        hold_steps: int,
        thread: ThreadPoolExecutor,
        lock: AbstractContextManager[object],
    ) -> None:
        super().__init__(prefill, hold_steps)
        self._lock = lock
        self._outcome = thread.submit(self._run_exclusively)

    def _run_exclusively(self) -> T:
        # The forward context is one global, and without CUDA graphs the decode
        # lane needs it too: whole steps take turns.
        with self._lock:
            return self._run()


class _Interleaved(_Started[T]):
    """On a thread that runs only while the caller waits for it: until the next layer.

    Decode steps then find every global as the middle of a prefill leaves it.
    """

    def __init__(
        self, prefill: Callable[[], T], hold_steps: int, thread: ThreadPoolExecutor
    ) -> None:
        super().__init__(prefill, hold_steps)
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._pauses, self.has_ended = True, False
        self._outcome = thread.submit(self._run_in_turn)

    def _run_in_turn(self) -> T:
        self._go.acquire()
        try:
            return self._run()
        finally:
            self.has_ended = True
            self._paused.release()

    def pause(self) -> None:
        if self._pauses:
            began = time.perf_counter()
            self._paused.release()
            self._go.acquire()
            self._busy_ms -= 1e3 * (time.perf_counter() - began)

    def done(self) -> bool:
        if not self.has_ended:
            self._go.release()
            self._paused.acquire()
        return super().done()

    def _has_run(self) -> bool:
        return self.has_ended

    def run_to_the_end(self) -> None:
        self._pauses = False
        self._go.release()

    def result(self) -> T:
        self.run_to_the_end()
        return super().result()
