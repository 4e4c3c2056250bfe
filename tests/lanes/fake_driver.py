# SPDX-License-Identifier: Apache-2.0
"""The part of cuda.bindings.driver that green contexts need, on a device of our making.

It answers as NVIDIA's driver API is documented to: a CUresult, then the values. Its
groups hold SM ids, so that a test can see what two contexts share. test_green_context.py
compares names, enum values, arguments and numbers of values with the real bindings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from itertools import count
from typing import Any


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915
    CUDA_ERROR_STREAM_DETACHED = 917
    CUDA_ERROR_UNKNOWN = 999


class CUdevResourceType(IntEnum):
    CU_DEV_RESOURCE_TYPE_INVALID = 0
    CU_DEV_RESOURCE_TYPE_SM = 1
    CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG = 1000


class TypesBefore13_1(IntEnum):
    """CUdevResourceType in bindings that know no work queues."""

    CU_DEV_RESOURCE_TYPE_INVALID = 0
    CU_DEV_RESOURCE_TYPE_SM = 1


class CUdevWorkqueueConfigScope(IntEnum):
    CU_WORKQUEUE_SCOPE_DEVICE_CTX = 0
    CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED = 1


class CUgreenCtxCreate_flags(IntEnum):
    CU_GREEN_CTX_NONE = 0
    CU_GREEN_CTX_DEFAULT_STREAM = 1


class CUstream_flags(IntEnum):
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


ENUMS = [
    CUresult,
    CUdevResourceType,
    CUdevWorkqueueConfigScope,
    CUgreenCtxCreate_flags,
    CUstream_flags,
]


class Handle:
    """Opaque, as the bindings' are: not an int, but with one inside."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __int__(self) -> int:
        return self._address


@dataclass
class SmResource:
    ids: frozenset[int] = frozenset()

    @property
    def smCount(self) -> int:
        return len(self.ids)


@dataclass
class WorkqueueConfig:
    wqConcurrencyLimit: int = 0
    sharingScope: CUdevWorkqueueConfigScope = (
        CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_DEVICE_CTX
    )


@dataclass
class CUdevResource:
    type: int = CUdevResourceType.CU_DEV_RESOURCE_TYPE_INVALID
    sm: SmResource = field(default_factory=SmResource)
    wqConfig: WorkqueueConfig = field(default_factory=WorkqueueConfig)


@dataclass
class GreenContext:
    sm_ids: frozenset[int]
    work_queues: WorkqueueConfig | None
    destroyed: bool = False


@dataclass
class Stream:
    context: GreenContext
    priority: int
    destroyed: bool = False


class Refusal(Exception):
    def __init__(self, result: CUresult) -> None:
        self.result = result


class FakeDriver:
    """A driver of CUDA ``version`` with ``num_devices`` equal devices.

    Groups have ``min_sms`` SMs or ``granularity`` more, and so on, out of the first
    ``grouped_sms`` SMs; the others have no full group of neighbours and end up in
    remainders. A group that cannot be made is answered with ``no_group``, or with
    none of the groups asked for where that is ``CUDA_SUCCESS``. ``no_resource`` is the
    answer of a driver without work queues. ``without`` lacks the functions named.
    """

    CUresult = CUresult
    CUdevWorkqueueConfigScope = CUdevWorkqueueConfigScope
    CUgreenCtxCreate_flags = CUgreenCtxCreate_flags
    CUstream_flags = CUstream_flags

    def __init__(
        self,
        num_sms: int = 132,
        min_sms: int = 8,
        granularity: int = 8,
        *,
        grouped_sms: int | None = None,
        num_devices: int = 1,
        version: int = 13010,
        without: Iterable[str] = (),
        no_function: str = "function {} is not found",
        no_group: CUresult = CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION,
        no_resource: CUresult = CUresult.CUDA_SUCCESS,
        resource_types: type[IntEnum] = CUdevResourceType,
    ) -> None:
        self.CUdevResourceType = resource_types
        self.num_sms = num_sms
        self.min_sms = min_sms
        self.granularity = granularity
        self.grouped_sms = num_sms if grouped_sms is None else grouped_sms
        self.num_devices = num_devices
        self.version = version
        self.without = set(without)
        self.no_function = no_function
        self.no_group = no_group
        self.no_resource = no_resource
        self.calls: list[tuple[str, int]] = []
        """Every call's function, and how many calls of it that made."""
        self.failures: dict[tuple[str, int], CUresult] = {}
        """What to answer instead, by function and number of the call."""
        self.returned: dict[str, set[int]] = {}
        """How many values each function has returned, its CUresult among them."""
        self.contexts: dict[int, GreenContext] = {}
        self.streams: dict[int, Stream] = {}
        self.primary_retained = 0
        self.current: list[int] = []
        """Contexts current on the calling thread, the top one last."""
        self._initialized = False
        self._made = Counter[str]()
        self._addresses = count(0x1000, 0x10)
        self._primary = next(self._addresses)

    @property
    def alive(self) -> list[str]:
        """What has been made or taken and not been given back."""
        alive = [f"green context {a:#x}" for a, c in self.contexts.items() if not c.destroyed]
        alive += [f"stream {a:#x}" for a, s in self.streams.items() if not s.destroyed]
        alive += ["primary context"] * self.primary_retained
        return alive + ["current context"] * len(self.current)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return (
            partial(self._answer, name, value)
            if name.startswith("cu") and name[2].isupper()
            else value
        )

    def _answer(self, name: str, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        if name in self.without:
            raise RuntimeError(self.no_function.format(name))
        self._made[name] += 1
        call = name, self._made[name]
        self.calls.append(call)
        try:
            if call in self.failures:
                raise Refusal(self.failures[call])
            if not self._initialized and name not in ("cuInit", "cuDriverGetVersion"):
                raise Refusal(CUresult.CUDA_ERROR_NOT_INITIALIZED)
            values = function(*arguments)
        except Refusal as refusal:
            return refusal.result, None
        self.returned.setdefault(name, set()).add(1 + len(values))
        return CUresult.CUDA_SUCCESS, *values

    def cuDriverGetVersion(self) -> tuple[int]:
        return (self.version,)

    def cuInit(self, flags: int) -> tuple[()]:
        _require(flags == 0, CUresult.CUDA_ERROR_INVALID_VALUE)
        _require(self.num_devices > 0, CUresult.CUDA_ERROR_NO_DEVICE)
        self._initialized = True
        return ()

    def cuDeviceGet(self, ordinal: int) -> tuple[Handle]:
        _require(0 <= ordinal < self.num_devices, CUresult.CUDA_ERROR_INVALID_DEVICE)
        return (Handle(ordinal),)

    def cuDeviceGetDevResource(self, device: Handle, kind: int) -> tuple[CUdevResource]:
        self._check_device(device)
        if kind == CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM:
            return (CUdevResource(kind, SmResource(frozenset(range(self.num_sms)))),)
        _require(self.no_resource == CUresult.CUDA_SUCCESS, self.no_resource)
        return (CUdevResource(kind, wqConfig=WorkqueueConfig(wqConcurrencyLimit=8)),)

    def cuDevSmResourceSplitByCount(
        self, num_groups: int, resource: CUdevResource, flags: int, min_count: int
    ) -> tuple[list[CUdevResource], int, CUdevResource]:
        # Flags would change min_sms and granularity, to what is documented nowhere.
        _require(flags == 0 and num_groups > 0, CUresult.CUDA_ERROR_INVALID_VALUE)
        _require(0 <= min_count <= resource.sm.smCount, CUresult.CUDA_ERROR_INVALID_VALUE)
        _require(
            resource.sm.smCount == self.num_sms,  # a result cannot be split again
            CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION,
        )
        steps = -(-max(min_count, self.min_sms) // self.granularity)
        size = steps * self.granularity
        made = min(num_groups, self.grouped_sms // size)
        _require(made > 0 or self.no_group == CUresult.CUDA_SUCCESS, self.no_group)
        groups = [
            _sm_resource(range(group * size, (group + 1) * size) if group < made else ())
            for group in range(num_groups)
        ]
        return groups, made, _sm_resource(range(made * size, self.num_sms))

    def cuDevResourceGenerateDesc(
        self, resources: list[CUdevResource], num_resources: int
    ) -> tuple[list[CUdevResource]]:
        _require(len(resources) == num_resources > 0, CUresult.CUDA_ERROR_INVALID_VALUE)
        kinds = Counter(resource.type for resource in resources)
        _require(
            CUdevResourceType.CU_DEV_RESOURCE_TYPE_INVALID not in kinds,
            CUresult.CUDA_ERROR_INVALID_RESOURCE_TYPE,
        )
        _require(
            kinds[CUdevResourceType.CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG] <= 1,
            CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION,
        )
        return (deepcopy(resources),)

    def cuGreenCtxCreate(
        self, description: list[CUdevResource], device: Handle, flags: int
    ) -> tuple[Handle]:
        self._check_device(device)
        # Documented as required before CUDA 13.
        _require(
            flags == CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM,
            CUresult.CUDA_ERROR_INVALID_VALUE,
        )
        queues = [
            resource.wqConfig
            for resource in description
            if resource.type == CUdevResourceType.CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG
        ]
        sm_ids = frozenset[int]().union(*(resource.sm.ids for resource in description))
        handle = Handle(next(self._addresses))
        self.contexts[int(handle)] = GreenContext(sm_ids, queues[0] if queues else None)
        return (handle,)

    def cuGreenCtxDestroy(self, context: Handle) -> tuple[()]:
        self._context(context).destroyed = True
        return ()

    def cuCtxFromGreenCtx(self, context: Handle) -> tuple[Handle]:
        self._context(context)
        return (Handle(int(context) + 1),)

    def cuGreenCtxGetDevResource(self, context: Handle, kind: int) -> tuple[CUdevResource]:
        _require(
            kind == CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM,
            CUresult.CUDA_ERROR_INVALID_RESOURCE_TYPE,
        )
        return (_sm_resource(self._context(context).sm_ids),)

    def cuGreenCtxStreamCreate(self, context: Handle, flags: int, priority: int) -> tuple[Handle]:
        _require(flags == CUstream_flags.CU_STREAM_NON_BLOCKING, CUresult.CUDA_ERROR_INVALID_VALUE)
        handle = Handle(next(self._addresses))
        self.streams[int(handle)] = Stream(self._context(context), priority)
        return (handle,)

    def cuStreamSynchronize(self, stream: Handle) -> tuple[()]:
        _require(not self._stream(stream).context.destroyed, CUresult.CUDA_ERROR_STREAM_DETACHED)
        return ()

    def cuStreamDestroy(self, stream: Handle) -> tuple[()]:
        self._stream(stream).destroyed = True
        return ()

    def cuDevicePrimaryCtxRetain(self, device: Handle) -> tuple[Handle]:
        self._check_device(device)
        self.primary_retained += 1
        return (Handle(self._primary),)

    def cuDevicePrimaryCtxRelease(self, device: Handle) -> tuple[()]:
        self._check_device(device)
        _require(self.primary_retained > 0, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.primary_retained -= 1
        return ()

    def cuCtxPushCurrent(self, context: Handle) -> tuple[()]:
        _require(
            int(context) == self._primary and self.primary_retained > 0,
            CUresult.CUDA_ERROR_INVALID_CONTEXT,
        )
        self.current.append(int(context))
        return ()

    def cuCtxPopCurrent(self) -> tuple[Handle]:
        _require(bool(self.current), CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return (Handle(self.current.pop()),)

    def _check_device(self, device: Handle) -> None:
        _require(int(device) < self.num_devices, CUresult.CUDA_ERROR_INVALID_DEVICE)

    def _context(self, handle: Handle) -> GreenContext:
        _require(int(handle) in self.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        context = self.contexts[int(handle)]
        _require(not context.destroyed, CUresult.CUDA_ERROR_CONTEXT_IS_DESTROYED)
        return context

    def _stream(self, handle: Handle) -> Stream:
        # Stricter than it may have to be: nothing is documented for threads without one.
        _require(bool(self.current), CUresult.CUDA_ERROR_INVALID_CONTEXT)
        _require(int(handle) in self.streams, CUresult.CUDA_ERROR_INVALID_HANDLE)
        stream = self.streams[int(handle)]
        _require(not stream.destroyed, CUresult.CUDA_ERROR_INVALID_HANDLE)
        return stream


def _require(holds: bool, otherwise: CUresult) -> None:
    if not holds:
        raise Refusal(otherwise)


def _sm_resource(ids: Iterable[int]) -> CUdevResource:
    sm = SmResource(frozenset(ids))
    kinds = CUdevResourceType
    kind = kinds.CU_DEV_RESOURCE_TYPE_SM if sm.ids else kinds.CU_DEV_RESOURCE_TYPE_INVALID
    return CUdevResource(kind, sm)
