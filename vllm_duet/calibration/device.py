# SPDX-License-Identifier: Apache-2.0
"""What the measurements need of a GPU, and no more: tests put a simulated one in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_duet.calibration.work import Work


class CalibrationError(RuntimeError):
    """A measurement that cannot be made or must not be trusted, in one sentence."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The GPU, and what drives it. ``splits`` are the sizes a decode group may have, the
    remainder being the prefill group."""

    name: str
    num_sms: int
    min_sms: int
    sm_granularity: int
    splits: tuple[int, ...]
    memory_bytes: int
    driver: str
    cuda: str
    torch: str
    triton: str


class Lane(Protocol):
    """A stream, and the number of SMs its kernels run on."""

    @property
    def num_sms(self) -> int: ...


@dataclass(frozen=True)
class Lanes:
    """Both groups of one split; ``separate_work_queues`` is what the driver granted."""

    decode: Lane
    prefill: Lane
    separate_work_queues: bool


class Unit(Protocol):
    """Works made ready: compiled, checked against a reference and, mostly, captured."""

    @property
    def relative_error(self) -> float:
        """L2 norm of (result - reference) over that of the reference; the worst work's."""

    def launch(self, lane: Lane | None = None) -> None:
        """Queue it once, on ``lane`` in place of the lane it was prepared for."""


class Device(ABC):
    """One GPU. Queues nothing but what it is told to, and changes no device setting."""

    info: DeviceInfo

    @abstractmethod
    def whole(self) -> Lane:
        """A stream that may use every SM."""

    @abstractmethod
    def split(
        self, decode_sms: int, *, separate_work_queues: bool = True, decode_priority: int = 0
    ) -> AbstractContextManager[Lanes]:
        """Divide the SMs; the lanes end with the block, which must leave them idle."""

    @abstractmethod
    def prepare(
        self, works: Sequence[Work], lane: Lane, *, runs: int = 1, captured: bool = True
    ) -> Unit:
        """Make ``runs`` runs of the works one launch, as a CUDA graph if ``captured``.

        Raises:
            CalibrationError: a result is not the reference's.
        """

    @abstractmethod
    def mark(self, lane: Lane) -> Any:
        """A point in the lane's queue."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Block the CPU until the lane has come to ``mark``."""

    @abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Time between two marks that have been reached, of any lanes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the CPU until every lane is idle."""

    @abstractmethod
    def now_s(self) -> float:
        """The CPU's clock."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that nobody holds on the GPU."""

    @abstractmethod
    def sm_ids(self, unit: Unit) -> frozenset[int]:
        """Where the blocks of the last launch of an ``SmIds`` unit ran. Waits for it."""
