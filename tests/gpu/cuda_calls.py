# SPDX-License-Identifier: Apache-2.0
"""CUDA's runtime and driver by ctypes, for programs on the fake GPU: every call checked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from ctypes import byref, c_int, c_uint, c_void_p

from fake_gpu import HOST_FUNCTION, FakeGpu

DEFAULT, NON_BLOCKING = 0, 1
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
NOT_READY, NOT_PERMITTED = 600, 800


class CudaError(RuntimeError):
    def __init__(self, function: str, error: int) -> None:
        super().__init__(f"{function} returned {error}")
        self.error = error


class Cuda:
    """Handles are plain integers, 0 the legacy default stream."""

    def __init__(self) -> None:
        self.gpu = FakeGpu()
        self.library = self.gpu.library
        self._kept: list[object] = []  # ctypes' functions must outlive the queue

    def call(self, function: str, *arguments: object) -> None:
        if error := getattr(self.library, function)(*arguments):
            raise CudaError(function, error)

    def _made(self, function: str, *arguments: object) -> int:
        handle = c_void_p()
        self.call(function, byref(handle), *arguments)
        return handle.value or 0

    # -------------------------------------------------------------- memory

    def malloc(self, num_bytes: int) -> int:
        return self._made("cudaMalloc", ctypes.c_size_t(num_bytes))

    def pinned(self, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
        address = self._made("cudaMallocHost", ctypes.c_size_t(num_bytes))
        return (ctypes.c_char * num_bytes).from_address(address)

    def free(self, address: int) -> None:
        self.call("cudaFree", c_void_p(address))

    def copy(self, to: object, source: object, num_bytes: int, stream: int = 0) -> None:
        self.call(
            "cudaMemcpyAsync",
            _address(to),
            _address(source),
            ctypes.c_size_t(num_bytes),
            4,  # cudaMemcpyDefault
            c_void_p(stream),
        )

    def read(self, address: int, num_bytes: int) -> bytes:
        """What is in the device's memory now, without asking the device."""
        return ctypes.string_at(address, num_bytes)

    # -------------------------------------------------------------- streams and events

    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self._made("cudaStreamCreateWithFlags", c_uint(flags))

    def event(self) -> int:
        return self._made("cudaEventCreateWithFlags", c_uint(2))  # without timing

    def record(self, event: int, stream: int) -> None:
        self.call("cudaEventRecord", c_void_p(event), c_void_p(stream))

    def wait(self, stream: int, event: int) -> None:
        self.call("cudaStreamWaitEvent", c_void_p(stream), c_void_p(event), c_uint(0))

    def is_done(self, event: int) -> bool:
        error = self.library.cudaEventQuery(c_void_p(event))
        if error not in (0, NOT_READY):
            raise CudaError("cudaEventQuery", error)
        return error == 0

    def host(self, stream: int, function: Callable[[], object]) -> None:
        """Queue a call of ``function`` on the stream."""
        called = HOST_FUNCTION(lambda _: function() and None)
        self._kept.append(called)
        self.call("cudaLaunchHostFunc", c_void_p(stream), called, None)

    def sync(self, stream: int | None = None) -> None:
        if stream is None:
            self.call("cudaDeviceSynchronize")
        else:
            self.call("cudaStreamSynchronize", c_void_p(stream))

    # -------------------------------------------------------------- graphs

    @contextmanager
    def capture(self, stream: int, mode: int = 0):
        """The graph's handle is appended to what is yielded. ``mode`` 0 is global."""
        graph: list[int] = []
        self.call("cudaStreamBeginCapture", c_void_p(stream), c_int(mode))
        try:
            yield graph
        finally:
            graph.append(self.end_capture(stream))

    def end_capture(self, stream: int) -> int:
        out = c_void_p()
        self.call("cudaStreamEndCapture", c_void_p(stream), byref(out))
        return out.value or 0

    def instantiate(self, graph: int) -> int:
        return self._made("cudaGraphInstantiate", c_void_p(graph), ctypes.c_ulonglong(0))

    def launch(self, executable: int, stream: int) -> None:
        self.call("cudaGraphLaunch", c_void_p(executable), c_void_p(stream))


def _address(memory: object) -> object:
    return c_void_p(memory) if isinstance(memory, int) else memory


def comes_before(log: Sequence[str], first: str, second: str) -> bool:
    return log.index(first) < log.index(second)
