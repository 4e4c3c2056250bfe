# SPDX-License-Identifier: Apache-2.0
"""What a model runner needs of two lanes, whatever they are made of.

The runner prepares a prefill's inputs at its launch and hands the forward and
the sampling to the lane as one callable. From then on the device may run it at
any moment until the join, so nothing it reads or writes may change in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

T = TypeVar("T")


class InFlight(ABC, Generic[T]):
    """One prefill between its launch and its join."""

    @abstractmethod
    def done(self) -> bool:
        """Whether ``result`` would return without waiting.

        Asked once by every decode step that runs beside the prefill.
        """

    @abstractmethod
    def result(self) -> T:
        """Wait for the prefill and return what its callable returned.

        Called once, on the thread that runs the decode steps. Raises what the
        callable raised.
        """


class LanePair(ABC):
    """A decode lane and a prefill lane over the same weights and KV cache."""

    @abstractmethod
    def launch(self, prefill: Callable[[], T], prefill_sms: int) -> InFlight[T]:
        """Put ``prefill`` in flight on ``prefill_sms`` SMs, behind any that is already.

        Prefills run in the order of their launches, and ``result`` is asked in that
        order. Work the caller has queued before is ordered before ``prefill``.
        """

    @abstractmethod
    def decoding(self, decode_sms: int) -> AbstractContextManager[None]:
        """Run what the block queues on the decode lane of ``decode_sms`` SMs."""

    def exclusive(self) -> AbstractContextManager[object]:
        """Guard host state that both lanes use, while the block runs.

        A lane that runs the prefill's host side on the caller's thread needs
        no guard.
        """
        return nullcontext()

    def shutdown(self) -> None:
        """Release what the lanes hold. No prefill may be in flight."""
