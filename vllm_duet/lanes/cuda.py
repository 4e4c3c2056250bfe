# SPDX-License-Identifier: Apache-2.0
"""Both lanes at once on one GPU: streams of green contexts, and a thread for the prefill.

Who waits for whom, on the device:

* a decode lane for the caller's stream when a block of ``decoding`` begins, and the
  caller's stream for the lane when it ends; also for the last ``preparing``;
* ``preparing``, on a stream that may use every SM, for the ``fork``: the prefill
  prepared within a decode step starts beside that step and not after it;
* a prefill for its ``preparing`` and for the prefill before it;
* the caller's stream for the prefill when its result is taken.

Who keeps what alive: torch's allocator gives a freed tensor's memory to the next that
is made on the same stream, whatever other streams still read it. What a prefill reads
was made in ``preparing``, so it is referenced until the result has been taken; what is
prepared after that comes after the prefill on the device, by way of the caller's stream.
What the prefill makes, it makes on its own stream, where the next one follows it; its
result is recorded for the caller's stream, which reads it while the next one may already run.

How busy a lane was, events on its stream tell, before and after what it was given. Those of
decode steps are used again and again: making an event can wait for the context's lock, which
a thread that launches kernels holds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import cuda

from vllm_duet.lanes.base import InFlight, LaneError, LanePair
from vllm_duet.lanes.green_context import SmSplit

T = TypeVar("T")

DECODE_PRIORITY = -1
"""More urgent than a prefill's 0, where the two wait for something that SMs do not divide."""


class CudaLanePair(LanePair):
    """Lanes for each of ``splits``, by the SM count of the decode lane, on ``device``.

    Owns the splits. ``decode_streams`` are for capturing CUDA graphs. With ``slices`` a
    prefill is launched in slices, between two launches of decode steps.
    """

    def __init__(
        self, splits: Mapping[int, SmSplit], device: torch.device, slices: bool = False
    ) -> None:
        self._splits = list(splits.values())
        self._device = device
        self.decode_streams = {
            sms: split.decode.stream(DECODE_PRIORITY) for sms, split in splits.items()
        }
        self._prefill_streams = {s.prefill.num_sms: s.prefill.stream() for s in self._splits}
        self._prepare_stream = cuda.Stream(device)
        self._lock = threading.RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duet-prefill")
        self._slices = slices
        self._decoded: deque[_Span] = deque()
        self._from_caller: Any = cuda.Event()
        self._spare_events: list[Any] = []
        self._forked: Any = None
        self._prepared: Any = None  # the last time; decode steps wait for it
        self._ready: Any = None  # until the launch that it was for
        self._last_prefill: Any = None
        self._started: Future[Any] | None = None

    @property
    def prefill_sms(self) -> set[int]:
        """The SM counts of the prefill lanes."""
        return set(self._prefill_streams)

    @classmethod
    def create(
        cls, decode_sms: Sequence[int], device: torch.device, slices: bool = False
    ) -> CudaLanePair:
        """Split the SMs of ``device`` in every way of ``decode_sms``.

        Raises:
            GreenContextError: one of them cannot be had. Nothing is left behind then.
        """
        index = device.index if device.index is not None else cuda.current_device()
        with ExitStack() as undo:
            splits = {}
            for sms in decode_sms:
                split = SmSplit.create(sms, index, num_splits=len(decode_sms))
                splits[sms] = undo.enter_context(split)
            pair = cls(splits, device, slices)
            undo.pop_all()
        return pair

    @contextmanager
    def decoding(self, decode_sms: int) -> Iterator[None]:
        if decode_sms not in self.decode_streams:
            raise LaneError(f"There is no decode lane of {decode_sms} SMs.")
        lane, caller = self.decode_streams[decode_sms], cuda.current_stream(self._device)
        # A wait is for what was recorded last before it, so one event serves every step.
        caller.record_event(self._from_caller)
        lane.wait_event(self._from_caller)
        if self._prepared is not None:
            lane.wait_event(self._prepared)
        began = self._timed_event(lane)
        try:
            with cuda.stream(lane):
                yield
        except Exception as error:
            error.add_note(f"In the decode lane of {decode_sms} SMs.")
            raise
        finally:
            ended = self._timed_event(lane)
            self._decoded.append(_Span(began, ended))
            caller.wait_event(ended)

    def _timed_event(self, stream: Any) -> Any:
        event = self._spare_events.pop() if self._spare_events else cuda.Event(enable_timing=True)
        return stream.record_event(event)

    def decode_busy_ms(self) -> float:
        busy_ms = 0.0
        while self._decoded and self._decoded[0].end.query():
            span = self._decoded.popleft()
            busy_ms += span.ms()
            self._spare_events += span
        return busy_ms

    def fork(self) -> None:
        self._forked = cuda.current_stream(self._device).record_event()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        self._prepare_stream.wait_event(self._take_fork())
        try:
            with cuda.stream(self._prepare_stream):
                yield
        finally:
            self._prepared = self._prepare_stream.record_event()
        self._ready = self._prepared

    def _take_fork(self) -> Any:
        """The event of the last ``fork`` that nothing has been launched from, or of now."""
        forked, self._forked = self._forked, None
        return forked or cuda.current_stream(self._device).record_event()

    def launch(self, prefill: Callable[[], T], prefill_sms: int) -> InFlight[T]:
        if prefill_sms not in self._prefill_streams:
            raise LaneError(f"There is no prefill lane of {prefill_sms} SMs.")
        ready, self._ready = self._ready, None
        started = self._thread.submit(self._run, prefill, prefill_sms, ready or self._take_fork())
        self._started = started
        return _Launched(prefill, started, self._device)

    def _run(self, prefill: Callable[[], T], prefill_sms: int, ready: Any) -> _Queued[T]:
        """On the thread: queue the prefill."""
        cuda.set_device(self._device)
        lane = self._prefill_streams[prefill_sms]
        lane.wait_event(ready)
        if self._last_prefill is not None:
            lane.wait_event(self._last_prefill)
        outcome: Future[T] = Future()
        began = lane.record_event(cuda.Event(enable_timing=True))
        try:
            with cuda.stream(lane):
                outcome.set_result(prefill())
        except Exception as error:
            error.add_note(f"In the prefill lane of {prefill_sms} SMs.")
            outcome.set_exception(error)
        # What was queued before a failure runs all the same.
        self._last_prefill = lane.record_event(cuda.Event(enable_timing=True))
        return _Queued(outcome, _Span(began, self._last_prefill))

    def give_way(self) -> None:
        if self._slices:
            # Decode steps hold it while they are launched: this thread would compete with
            # them for the interpreter.
            with self._lock:
                pass

    def is_usable(self) -> bool:
        try:
            cuda.synchronize(self._device)
        except Exception:
            return False  # a fault of a kernel; CUDA reports it from now on
        return True

    def is_idle(self) -> bool:
        streams = [*self.decode_streams.values(), *self._prefill_streams.values()]
        if self._started is not None and not self._started.done():
            return False
        return all(stream.query() for stream in [*streams, self._prepare_stream])

    def exclusive(self) -> AbstractContextManager[object]:
        # Never held while a callable runs: it takes it itself, for what it shares. What
        # waits for it in give_way relies on that, too.
        return self._lock

    def shutdown(self) -> None:
        self._thread.shutdown(wait=True)
        splits, self._splits = self._splits, []
        self.decode_streams, self._prefill_streams = {}, {}
        if splits:
            cuda.synchronize(self._device)
        # Whoever keeps this object should not keep events with it.
        self._decoded.clear()
        self._spare_events.clear()
        self._from_caller = self._forked = self._prepared = self._ready = self._last_prefill = None
        self._started = None
        with ExitStack() as release:
            for split in splits:
                release.callback(split.release)


class _Span(NamedTuple):
    """Two events on one stream."""

    begin: Any
    end: Any

    def ms(self) -> float:
        return float(self.begin.elapsed_time(self.end))


@dataclass(frozen=True, slots=True)
class _Queued(Generic[T]):
    """What the callable returned or raised, and when the device was busy with it."""

    outcome: Future[T]
    busy: _Span


class _Launched(InFlight[T]):
    def __init__(
        self, prefill: Callable[[], T], started: Future[_Queued[T]], device: torch.device
    ) -> None:
        self._prefill: Callable[[], T] | None = prefill
        self._started = started
        self._device = device

    def done(self) -> bool:
        # An exception here is that of a device that is gone: for result() to raise.
        return self._started.done() and (
            self._started.exception() is not None or bool(self._started.result().busy.end.query())
        )

    def wait_until_queued(self) -> None:
        wait([self._started])

    def result(self) -> T:
        queued, caller = self._started.result(), cuda.current_stream(self._device)
        caller.wait_event(queued.busy.end)
        self._prefill = None
        outcome = queued.outcome.result()
        if isinstance(outcome, torch.Tensor) and outcome.is_cuda:
            outcome.record_stream(caller)
        return outcome

    def busy_ms(self) -> float:
        busy = self._started.result().busy
        busy.end.synchronize()  # its sampled tokens are there, what comes after may not be
        return busy.ms()
