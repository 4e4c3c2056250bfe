# SPDX-License-Identifier: Apache-2.0
"""CUDA green contexts: the SMs of one GPU in two groups, with streams for torch.

A green context is a view of the primary context, the one torch uses, that runs
its work on some of the SMs. Memory, modules and events are shared, so tensors
and kernels need nothing special on its streams. Each call here is one of
NVIDIA's driver API (https://docs.nvidia.com/cuda/cuda-driver-api/, "Green
Contexts"), whose rules decide the following.

* Two groups made from the whole device one by one overlap. Decode's group and
  prefill's are the group and the remainder of one cuDevSmResourceSplitByCount.
  The newer cuDevSmResourceSplit would need CUDA 13.1, and gains nothing for one
  group and a remainder that keeps every other SM.
* It is called without flags: a group is then made of SMs that are scheduled
  together, and runs thread block clusters. Ignoring that
  (IGNORE_SM_COSCHEDULING) would offer finer sizes, to which kernels with
  clusters (FlashAttention 3, CUTLASS) might not fit; asking for the largest
  clusters (MAX_POTENTIAL_CLUSTER_SIZE) would offer coarser ones. For the
  remainder the driver guarantees no cluster size.
* Which sizes it makes is asked of the driver by trying them, since that works
  with every driver and counts the SMs of this very device: a MIG slice has
  fewer, and some have SMs missing where a whole group would need them. The
  fields minSmPartitionSize and smCoscheduledAlignment came with CUDA 13.
* Under MPS, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE has to be unset or 100, or it
  decides in place of the groups (NVIDIA's developer forum, topic 316336).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

GREEN_CONTEXT_CUDA = (12, 5)
"""The first CUDA version with cuGreenCtxStreamCreate; the contexts came with 12.4."""

_NO_SUCH_GROUP = {"CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION", "CUDA_ERROR_INVALID_VALUE"}
_NO_SUCH_RESOURCE = {
    "CUDA_ERROR_INVALID_RESOURCE_TYPE",
    "CUDA_ERROR_INVALID_VALUE",
    "CUDA_ERROR_NOT_SUPPORTED",
}

_Undo = list[Callable[[], object]]
"""What takes back what was made, in the order in which it was made; empty once released."""


class GreenContextError(RuntimeError):
    """Why SM groups cannot be had or used, in one sentence; base of the errors here."""


class DriverCallError(GreenContextError):
    """The driver's ``function`` returned ``result``, the name of a CUresult."""

    def __init__(self, function: str, result: str) -> None:
        super().__init__(f"The CUDA driver's {function} failed: {result}.")
        self.function = function
        self.result = result


@dataclass(frozen=True, slots=True)
class SmLimits:
    """Which groups a device's driver makes of its ``num_sms`` SMs.

    From ``min_sms`` on, in steps of ``granularity``, up to ``max_sms``. ``None``:
    as far as ``num_sms`` goes.
    """

    num_sms: int
    min_sms: int
    granularity: int
    max_sms: int | None = None

    def splits(self) -> tuple[int, ...]:
        """Every size in SMs of a decode group that leaves prefill ``min_sms`` or more."""
        most = self.num_sms - self.min_sms
        if self.max_sms is not None:
            most = min(most, self.max_sms)
        return tuple(range(self.min_sms, most + 1, self.granularity))


def sm_limits(device: int = 0) -> SmLimits:
    """Ask the driver which groups it makes of the SMs of ``device``, torch's index of it.

    Creates nothing on the device.

    Raises:
        GreenContextError: no cuda-bindings, no driver or too old a one, no such
            device, or one of which the driver makes no groups.
    """
    return _Device(device).limits()


class SmGroup:
    """The ``num_sms`` SMs of one green context, as read back from it. Part of an SmSplit."""

    def __init__(self, device: _Device, resources: list[Any], undo: _Undo) -> None:
        driver = device.driver
        description = device.call("cuDevResourceGenerateDesc", resources, len(resources))
        # The default stream is of no use here, but CUDA 12 documents the flag as required.
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        self._green = device.call("cuGreenCtxCreate", description, device.handle, flags)
        undo.append(partial(device.call, "cuGreenCtxDestroy", self._green))
        self._context = int(device.call("cuCtxFromGreenCtx", self._green))
        sms = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        held = device.call("cuGreenCtxGetDevResource", self._green, sms)
        self.num_sms: int = held.sm.smCount
        self._device = device
        self._undo = undo
        self._streams: dict[int, torch.cuda.ExternalStream] = {}

    @property
    def context(self) -> int:
        """The CUcontext, as cuGraphKernelNodeGetParams shows it in a captured graph."""
        _refuse_if_released(self._undo)
        return self._context

    def stream(self, priority: int = 0) -> torch.cuda.ExternalStream:
        """The group's stream of ``priority``, made at the first call.

        A lower number is more urgent. It does not synchronise with the default
        stream, so order its work by events, as between any two streams.

        Raises:
            GreenContextError: the split has been released, or the driver made no stream.
        """
        _refuse_if_released(self._undo)
        if priority not in self._streams:
            call = self._device.call
            flags = self._device.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            stream = call("cuGreenCtxStreamCreate", self._green, flags, priority)
            self._undo.append(partial(call, "cuStreamDestroy", stream))
            self._undo.append(partial(call, "cuStreamSynchronize", stream))
            self._streams[priority] = _external_stream(int(stream), self._device.ordinal)
        return self._streams[priority]


class SmSplit:
    """One GPU's SMs in two disjoint groups: ``decode``, and ``prefill`` on all others.

    ``separate_work_queues`` says whether the driver was asked to keep the groups'
    launches in work queues of their own, so that a long prefill delays no decode
    launch. It does so where it can, and knows how to from CUDA 13.1 on.
    """

    def __init__(
        self,
        device: _Device,
        decode: SmGroup,
        prefill: SmGroup,
        separate_work_queues: bool,
        undo: _Undo,
    ) -> None:
        self.decode = decode
        self.prefill = prefill
        self.separate_work_queues = separate_work_queues
        self._device = device
        self._undo = undo

    @classmethod
    def create(
        cls,
        decode_sms: int,
        device: int = 0,
        *,
        separate_work_queues: bool = True,
        num_splits: int = 1,
    ) -> Self:
        """Split ``device``, torch's index of it, and give ``decode_sms`` of its SMs to decode.

        ``separate_work_queues=False`` leaves the work queues shared. ``num_splits`` is how
        many splits of the device will be there at once: their groups share its work queues.

        Raises:
            GreenContextError: what ``sm_limits`` raises; ``decode_sms`` is none of
                its ``splits()``; or the driver fails. Nothing is left behind then.
        """
        gpu = _Device(device)
        group, remainder = gpu.split_for(decode_sms)
        queues = gpu.separate_work_queues(2 * num_splits) if separate_work_queues else []
        undo: _Undo = []
        with _taken_back_on_failure(undo):
            with gpu.primary_context():
                decode = SmGroup(gpu, [group, *queues], undo)
                prefill = SmGroup(gpu, [remainder, *queues], undo)
            made = decode.num_sms, prefill.num_sms
            planned = decode_sms, min(remainder.sm.smCount, gpu.num_sms - decode_sms)
            if made != planned:
                raise GreenContextError(
                    f"The driver made groups of {made[0]} and {made[1]} SMs on device {device},"
                    f" where {planned[0]} and {planned[1]} of {gpu.num_sms} were planned."
                )
        return cls(gpu, decode, prefill, bool(queues), undo)

    def release(self) -> None:
        """Wait for both groups' streams, destroy them, then the contexts; again: nothing.

        CUDA graphs captured on the streams and tensors recorded on them must be
        gone before.

        Raises:
            GreenContextError: the first call that failed. The others were made all
                the same, unless it is the primary context that could not be had.
        """
        if self._undo:
            with self._device.primary_context():
                _take_back(self._undo)

    def __enter__(self) -> Self:
        _refuse_if_released(self._undo)
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class _Device:
    """A device, and the driver's answers about it, every one checked."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.driver = _driver()
        version = self.call("cuDriverGetVersion")  # 12040 is 12.4
        cuda = version // 1000, version % 1000 // 10
        if cuda < GREEN_CONTEXT_CUDA:
            raise GreenContextError(
                f"The NVIDIA driver is one of CUDA {_dotted(cuda)}, and green contexts with"
                f" streams need CUDA {_dotted(GREEN_CONTEXT_CUDA)}."
            )
        self.call("cuInit", 0)
        self.handle = self.call("cuDeviceGet", ordinal)
        sms = self.driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        self.sms = self.call("cuDeviceGetDevResource", self.handle, sms)
        self.num_sms: int = self.sms.sm.smCount

    def call(self, function: str, *arguments: Any) -> Any:
        """What the driver's ``function`` returns besides its CUresult."""
        try:
            result, *values = getattr(self.driver, function)(*arguments)
        except RuntimeError as error:
            # The bindings look up the library, then the function, at the first call.
            if function in str(error):
                raise GreenContextError(
                    f"The NVIDIA driver has no {function}, which green contexts need:"
                    f" install a driver of CUDA {_dotted(GREEN_CONTEXT_CUDA)} or newer."
                ) from error
            raise GreenContextError(
                "Green contexts need an NVIDIA driver, and its library libcuda was not found."
            ) from error
        if result:
            raise DriverCallError(function, result.name)
        return values[0] if len(values) == 1 else values

    def limits(self) -> SmLimits:
        sizes: list[int] = []
        at_least = 1
        while at_least <= self.num_sms and (split := self._split(at_least)):
            sizes.append(split[0].sm.smCount)
            at_least = sizes[-1] + 1
        if not sizes:
            raise GreenContextError(
                f"The driver makes no groups of the {self.num_sms} SMs of device {self.ordinal}."
            )
        step = sizes[1] - sizes[0] if len(sizes) > 1 else sizes[0]
        return SmLimits(self.num_sms, sizes[0], step, sizes[-1])

    def split_for(self, decode_sms: int) -> tuple[Any, Any]:
        """The SM resources of a decode group of ``decode_sms`` and of all other SMs."""
        limits = self.limits()
        sizes = limits.splits()
        if not sizes:
            raise GreenContextError(
                f"Device {self.ordinal} has {self.num_sms} SMs, too few for two groups of"
                f" {limits.min_sms} or more."
            )
        split = self._split(decode_sms) if decode_sms in sizes else None
        if split is None:
            nearest = [n for n in sizes if n < decode_sms][-1:]
            nearest += [n for n in sizes if n > decode_sms][:1]
            raise GreenContextError(
                f"Device {self.ordinal} cannot give {decode_sms} of its {self.num_sms} SMs to"
                f" decode: the nearest it can give is {' or '.join(map(str, nearest))}."
            )
        return split

    def separate_work_queues(self, num_contexts: int) -> list[Any]:
        """The resource by which each of ``num_contexts`` green contexts gets queues of its own.

        Empty where the bindings or the driver are older than it.
        """
        types = self.driver.CUdevResourceType
        if not hasattr(types, "CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG"):
            return []
        kind = types.CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG
        try:
            queues = self.call("cuDeviceGetDevResource", self.handle, kind)
        except DriverCallError as error:
            if error.result in _NO_SUCH_RESOURCE:
                return []
            raise
        config = queues.wqConfig
        scopes = self.driver.CUdevWorkqueueConfigScope
        config.sharingScope = scopes.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
        # The device's limit is all it has (CUDA_DEVICE_MAX_CONNECTIONS): two contexts
        # that both expected as many could not be kept apart.
        config.wqConcurrencyLimit = max(1, config.wqConcurrencyLimit // num_contexts)
        return [queues]

    @contextmanager
    def primary_context(self) -> Iterator[None]:
        """Keep the context that torch uses current on this thread, whichever thread it is.

        Streams are waited for and destroyed with a context current, as without one
        CUDA_ERROR_INVALID_CONTEXT is among the answers. A green context needs none to
        be made, and holds the primary one itself, but should not be what starts it.
        """
        undo: _Undo = []
        with _taken_back_on_failure(undo):
            context = self.call("cuDevicePrimaryCtxRetain", self.handle)
            undo.append(partial(self.call, "cuDevicePrimaryCtxRelease", self.handle))
            self.call("cuCtxPushCurrent", context)
            undo.append(partial(self.call, "cuCtxPopCurrent"))
            yield
        _take_back(undo)

    def _split(self, at_least: int) -> tuple[Any, Any] | None:
        # The group and the remainder, which are descriptions: contexts make them real.
        try:
            groups, count, remainder = self.call(
                "cuDevSmResourceSplitByCount", 1, self.sms, 0, at_least
            )
        except DriverCallError as error:
            if error.result in _NO_SUCH_GROUP:
                return None
            raise
        return (groups[0], remainder) if count else None


def _driver() -> Any:
    """NVIDIA's bindings of the driver, or what a test puts in their place."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GreenContextError(
            "Green contexts need cuda-bindings, which is not installed:"
            " pip install 'vllm-duet[cuda]'."
        ) from error
    return driver


def _external_stream(stream: int, device: int) -> torch.cuda.ExternalStream:
    """torch's view of a CUstream. Needs torch's CUDA build, and nothing else here does."""
    import torch

    return torch.cuda.ExternalStream(stream, device=device)


def _take_back(undo: _Undo) -> None:
    """Undo the last first, and everything, whatever fails; raise the first failure."""
    failure = None
    while undo:
        try:
            undo.pop()()
        except GreenContextError as error:
            failure = failure or error
    if failure is not None:
        raise failure


@contextmanager
def _taken_back_on_failure(undo: _Undo) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(GreenContextError):  # the failure that led here says more
            _take_back(undo)
        raise


def _refuse_if_released(undo: _Undo) -> None:
    if not undo:
        raise GreenContextError("This SM split has been released.")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
