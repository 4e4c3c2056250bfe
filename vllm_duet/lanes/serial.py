# SPDX-License-Identifier: Apache-2.0
"""Both lanes on one device queue: the in-flight protocol without a GPU.

A GPU may run a launched prefill at any moment between its launch and its join.
A lane that always ran it at once would hide every KV block, request row or
input buffer given away too soon, so the moment is a setting:

* ``early``: at the launch;
* ``late``: at the join, after every decode step beside it;
* ``threaded``: on a second thread, between any two decode steps.

However soon it has run, the result counts as done only after ``hold_steps``
decode steps, so that steps beside a prefill in flight always occur.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

from vllm_duet.lanes.base import InFlight, LanePair

T = TypeVar("T")
Timing = Literal["early", "late", "threaded"]


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
            if timing == "threaded"
            else None
        )

    def launch(self, prefill: Callable[[], T], prefill_sms: int) -> InFlight[T]:
        if self.timing == "late":
            return _Late(prefill, self.hold_steps)
        if self._thread is not None:
            return _Started(self._thread.submit(self._run_exclusively, prefill), self.hold_steps)
        started: Future[T] = Future()
        try:
            started.set_result(prefill())
        except Exception as error:
            started.set_exception(error)
        return _Started(started, self.hold_steps)

    def _run_exclusively(self, prefill: Callable[[], T]) -> T:
        # The forward context is one global, and without CUDA graphs the decode
        # lane needs it too: whole steps take turns.
        with self._lock:
            return prefill()

    def decoding(self, decode_sms: int) -> AbstractContextManager[None]:
        return nullcontext()

    def exclusive(self) -> AbstractContextManager[object]:
        return self._lock

    def shutdown(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)


class _Held(InFlight[T]):
    def __init__(self, hold_steps: int) -> None:
        self._held_for = hold_steps

    def done(self) -> bool:
        self._held_for -= 1
        return self._held_for < 0 and self._has_run()

    def _has_run(self) -> bool:
        return True


class _Late(_Held[T]):
    def __init__(self, prefill: Callable[[], T], hold_steps: int) -> None:
        super().__init__(hold_steps)
        self._prefill = prefill

    def result(self) -> T:
        return self._prefill()


class _Started(_Held[T]):
    def __init__(self, future: Future[T], hold_steps: int) -> None:
        super().__init__(hold_steps)
        self._future = future

    def _has_run(self) -> bool:
        return self._future.done()

    def result(self) -> T:
        return self._future.result()
