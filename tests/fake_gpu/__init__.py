# SPDX-License-Identifier: Apache-2.0
"""A GPU that is not there, for tests: see README.md.

``environment`` gives what any command needs to run on it. ``FakeGpu`` talks to it from within
such a process. Neither imports torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.13",
    "libcublasLt.so.13",
    "libcublas.so.13",
    "libnvidia-ml.so.1",
)

ANY_STREAM, NO_GREEN_CONTEXT = -1, 0
"""Groups for ``fail_launch`` and ``break_device``, beside the number of SMs of one."""


def environment(
    venv: Path,
    library: Path,
    *,
    base: Mapping[str, str] | None = None,
    order: str | None = None,
    trace: Path | None = None,
    reports: Path | None = None,
    faults: Path | None = None,
    sms: int | None = None,
    driver: int | None = None,
    work_queues: bool = True,
    memory_gb: float | None = None,
    kernel_us: float | None = None,
    strict: bool = False,
    backtrace: bool = False,
    summary: bool = False,
) -> dict[str, str]:
    """The variables for a command to run on the fake GPU that build.py put into ``library``.

    ``venv`` has vLLM's CUDA build; its ``bin`` comes first on PATH. ``base``: what to add to, as
    a rule this process's own. The options are README.md's table; None leaves the default.
    """
    library = library.resolve()
    variables = dict(os.environ if base is None else base)
    variables = {k: v for k, v in variables.items() if not k.startswith("FAKECUDA_")}
    options: dict[str, object] = {
        "ORDER": order,
        "TRACE": trace,
        "REPORTS": reports,
        "FAULTS": faults,
        "SMS": sms,
        "DRIVER": driver,
        "NO_WORK_QUEUES": None if work_queues else 1,
        "MEMORY_GB": memory_gb,
        "KERNEL_US": kernel_us,
        "STRICT": 1 if strict else None,
        "BACKTRACE": 1 if backtrace else None,
        "SUMMARY": 1 if summary else None,
    }
    variables |= {f"FAKECUDA_{k}": str(v) for k, v in options.items() if v is not None}
    variables |= {
        "PATH": f"{venv / 'bin'}{os.pathsep}{variables.get('PATH', os.defpath)}",
        "LD_PRELOAD": " ".join(str(library / name) for name in LIBRARIES),
        "TRITON_LIBCUDA_PATH": str(library),
        "TRITON_CACHE_DIR": str(library / "triton_cache"),
        "VLLM_CACHE_ROOT": str(library / "vllm_cache"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # FlashInfer's sampler compiles with whatever nvcc it finds.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    return variables


class SmGroup(NamedTuple):
    """``count`` SMs from ``first`` on. ``green``: the green context's number, 0 for none."""

    first: int
    count: int
    green: int


class FakeGpu:
    """The fake GPU that this process runs on (LD_PRELOAD), from within."""

    def __init__(self) -> None:
        self.library = library = ctypes.CDLL("libcuda.so.1")
        integer, pointer = ctypes.c_long, ctypes.c_void_p
        library.fakecuda_count.restype = integer
        library.fakecuda_count.argtypes = [ctypes.c_char_p]
        library.fakecuda_report.restype = ctypes.c_char_p
        library.fakecuda_report.argtypes = [integer]
        library.fakecuda_fail_malloc.argtypes = [integer, integer]
        library.fakecuda_limit_memory.argtypes = [ctypes.c_size_t]
        library.fakecuda_fail_launch.argtypes = [ctypes.c_int, ctypes.c_int, integer, integer]
        library.fakecuda_break_device.argtypes = [ctypes.c_int, ctypes.c_int, integer]
        library.fakecuda_slow.argtypes = [ctypes.c_int, ctypes.c_double]
        library.fakecuda_slow.restype = None
        library.fakecuda_advance.argtypes = [integer]
        library.fakecuda_advance.restype = None
        library.fakecuda_order.argtypes = [ctypes.c_int, ctypes.c_ulong]
        library.fakecuda_order.restype = None
        library.fakecuda_access.argtypes = [pointer, ctypes.c_size_t, ctypes.c_int]
        library.fakecuda_access.restype = None
        library.fakecuda_name.argtypes = [ctypes.c_char_p]
        library.fakecuda_name.restype = None
        library.fakecuda_trace.argtypes = [ctypes.c_char_p]
        library.fakecuda_trace.restype = None
        library.fakecuda_mark.argtypes = [ctypes.c_char_p]
        library.fakecuda_mark.restype = None
        library.cudaLaunchHostFunc.argtypes = [pointer, HOST_FUNCTION, pointer]

    def count(self, what: str) -> int:
        """How many there are now: "streams", "events", "green_contexts", "graphs",
        "graph_execs", "device_bytes", "queued"; or were so far: "kernels", "graph_launches",
        "captures", "copies", "host_functions", "reports".

        Raises:
            KeyError: it counts no such thing.
        """
        number = int(self.library.fakecuda_count(what.encode()))
        if number < 0:
            raise KeyError(what)
        return number

    def reports(self) -> list[str]:
        """What it found wrong in this process so far, each as KIND: SENTENCE."""
        count = self.count("reports")
        return [self.library.fakecuda_report(i).decode() for i in range(count)]

    def stream_group(self, stream: int) -> SmGroup:
        """The SMs of a CUstream (torch's ``stream.cuda_stream``)."""
        return self._group(self.library.fakecuda_stream_group, stream)

    def node_group(self, node: int) -> SmGroup:
        """The SMs that a graph's node was captured on."""
        return self._group(self.library.fakecuda_node_group, node)

    def _group(self, function: ctypes._CFuncPtr, handle: int) -> SmGroup:  # type: ignore[name-defined]
        first, count, green = ctypes.c_int(), ctypes.c_int(), ctypes.c_long()
        references = (ctypes.byref(x) for x in (first, count, green))
        function(ctypes.c_void_p(handle), *references)
        return SmGroup(first.value, count.value, green.value)

    def fail_malloc(self, skip: int = 0, times: int = 1) -> None:
        """cudaMalloc fails ``times`` times, after ``skip`` calls more."""
        self.library.fakecuda_fail_malloc(skip, times)

    def limit_memory(self, num_bytes: int) -> None:
        """The device has no more than this from now on; 0 takes it back."""
        self.library.fakecuda_limit_memory(num_bytes)

    def fail_launch(self, group: int, error: int = 701, skip: int = 0, times: int = 1) -> None:
        """Launches of kernels and graphs on streams of ``group`` return ``error``."""
        self.library.fakecuda_fail_launch(group, error, skip, times)

    def break_device(self, group: int, error: int = 700, skip: int = 0) -> None:
        """A launch succeeds, and from when it runs every call returns ``error``."""
        self.library.fakecuda_break_device(group, error, skip)

    def hold(self, group: int) -> None:
        """Nothing runs on streams of ``group``, until ``no_faults``; who waits for one sleeps."""
        self.library.fakecuda_hold(group)

    def slow(self, group: int, factor: float) -> None:
        """Kernels on streams of ``group`` take ``factor`` times ``kernel_us``, until
        ``no_faults``."""
        self.library.fakecuda_slow(group, factor)

    def no_faults(self) -> None:
        """Nothing fails, is held or slow any more, and the device is whole."""
        self.library.fakecuda_no_faults()

    def order(self, seed: int | None) -> None:
        """From now on what is queued runs late, in an order drawn by ``seed``; None: at once."""
        self.library.fakecuda_order(seed is not None, seed or 0)

    def advance(self, steps: int) -> None:
        """Time passes on the device: at most ``steps`` items of streams or nodes of graphs run."""
        self.library.fakecuda_advance(steps)

    def seed(self, seed: int) -> None:
        """Draw the order by this seed from now on, as if the process had begun with it.

        For a process that runs with ``order`` late. What is queued should have run before.
        """
        self.library.fakecuda_seed(ctypes.c_ulong(seed))

    def trace(self, path: Path | None) -> None:
        """From now on trace into ``path``; None: as the option ``trace`` says.

        Nothing may be queued.
        """
        self.library.fakecuda_trace(str(path).encode() if path else None)

    def mark(self, name: str) -> None:
        """Put a line of one's own into the trace: where warming up ends, say. No spaces."""
        self.library.fakecuda_mark(name.encode())

    def name(self, name: str) -> None:
        """Within a host function: what to call it in the trace and in races. No spaces."""
        self.library.fakecuda_name(name.encode())

    def access(self, address: int, num_bytes: int, is_write: bool) -> None:
        """Within a host function: say which bytes it reads or writes. For races.py."""
        self.library.fakecuda_access(address, num_bytes, is_write)


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""For ``FakeGpu.library.cudaLaunchHostFunc(stream, HOST_FUNCTION(f), None)``. Keep a reference to
it until it has run, and for as long as a graph holds it."""
