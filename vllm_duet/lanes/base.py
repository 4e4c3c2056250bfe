# SPDX-License-Identifier: Apache-2.0
"""What a model runner needs of two lanes, whatever they are made of.

The runner prepares a prefill's inputs at its launch and hands the forward and
the sampling to the lane as one callable. From then on the device may run it at
any moment until the join, so nothing it reads or writes may change in between.

Where the callable runs on a thread of its own, it queues the forward beside the
decode steps that the caller queues. It takes ``exclusive`` for what it shares with
them; the forward context is one global that it needs from beginning to end, so
whoever else needs it calls ``InFlight.wait_until_queued`` first. Between its layers it
calls ``LanePair.give_way``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

T = TypeVar("T")


class LaneError(RuntimeError):
    """A lane that is not there, or no longer, in one sentence."""


class InFlight(ABC, Generic[T]):
    """One prefill between its launch and its join."""

    @abstractmethod
    def done(self) -> bool:
        """Whether ``result`` would return without waiting.

        Asked once by every decode step that runs beside the prefill.
        """

    def wait_until_queued(self) -> None:
        """Wait until the callable has returned, not until the device is done with it.

        Raises nothing of the callable's. A lane that runs it on the caller's thread has
        nothing to wait for.
        """

    @abstractmethod
    def result(self) -> T:
        """Wait for the prefill and return what its callable returned.

        Called once, on the thread that runs the decode steps. Raises what the
        callable raised.
        """

    @abstractmethod
    def busy_ms(self) -> float:
        """For how many milliseconds the lane was busy with it.

        Asked once the device is done with it; may be asked on any thread.
        """


class LanePair(ABC):
    """A decode lane and a prefill lane over the same weights and KV cache."""

    @abstractmethod
    def launch(self, prefill: Callable[[], T], prefill_sms: int) -> InFlight[T]:
        """Put ``prefill`` in flight on ``prefill_sms`` SMs, behind any that is already.

        Prefills run in the order of their launches, and ``result`` is asked in that
        order. Work the caller has queued before ``fork``, and within ``preparing``, is
        ordered before ``prefill``; without a ``fork`` since the last launch, all that it
        has queued.
        """

    def fork(self) -> None:
        """What is launched next need not wait for what the caller queues from here on."""

    def preparing(self) -> AbstractContextManager[None]:
        """Prepare the inputs of the next launch within the block.

        What it queues is done before decode steps that are queued after the block, and
        waits for no prefill in flight.
        """
        return nullcontext()

    @abstractmethod
    def decoding(self, decode_sms: int) -> AbstractContextManager[None]:
        """Run what the block queues on the decode lane of ``decode_sms`` SMs."""

    @abstractmethod
    def decode_busy_ms(self) -> float:
        """For how many milliseconds decode lanes were busy since this was last asked.

        What the device has not finished counts the next time.
        """

    def give_way(self) -> None:
        """Called by a prefill's callable between two layers, to let decode steps go first."""

    def is_usable(self) -> bool:
        """Whether the device goes on working, after a prefill has failed; waits for it."""
        return True

    def is_idle(self) -> bool:
        """Whether the device has done all that the lanes were given; never waits."""
        return True

    def exclusive(self) -> AbstractContextManager[object]:
        """Guard host state that both lanes use, while the block runs.

        A lane that runs the prefill's host side on the caller's thread needs
        no guard.
        """
        return nullcontext()

    def shutdown(self) -> None:
        """Release what the lanes hold. No prefill may be in flight."""
