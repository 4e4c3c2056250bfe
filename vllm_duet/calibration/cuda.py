# SPDX-License-Identifier: Apache-2.0
"""The Device that is a GPU: torch, Triton and the green contexts of vllm_duet.lanes.

What only fails on a GPU, and how it is kept out:

* The caching allocator gives a freed block to the next that asks on the same stream.
  Buffers are made on the default stream, before an idle GPU, and outlive the work.
* cuBLAS has a workspace for each stream and allocates it at first use: every work runs
  eagerly on its lane before it is captured or timed. That also compiles Triton kernels.
* What fits the L2 cache would be read from there in every run but the first: each work
  has memory of its own, and runs take turns over enough weights to push each other out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
import triton

from vllm_duet.calibration import triton_kernels as kernels
from vllm_duet.calibration.device import CalibrationError, Device, DeviceInfo, Lane, Lanes, Unit
from vllm_duet.calibration.references import attention_error, gemm_error, tile_sums
from vllm_duet.calibration.work import (
    KV_BLOCK_TOKENS,
    SHAPE,
    Gemm,
    PagedAttention,
    SmallKernel,
    Stream,
    Work,
    amounts,
)

TOLERANCE = 0.02
"""Relative L2 error of a bfloat16 result; rounding the output alone gives about 0.002."""

ARENA_BYTES = 3 * 2**30
WARM_UP_S = 0.5
CACHE_SIZES_APART = 4
"""Between two reads of one weight, this many times the L2 cache is read."""


@dataclass(frozen=True)
class CudaLane:
    """A torch stream, of a green context or of the whole device."""

    num_sms: int
    stream: Any


class Arena:
    """Random bfloat16 values to read: weights, KV blocks, plain memory. ``take`` hands out
    one part after the other and starts over at the end."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._next = 0

    def take(self, count: int) -> torch.Tensor:
        """The next ``count`` values.

        Raises:
            CalibrationError: there are not that many.
        """
        size = self.values.numel()
        if count > size:
            raise CalibrationError(
                f"{2 * count / 1e9:.1f} GB are needed and {2 * size / 1e9:.1f} GB are held"
            )
        start = self._next if self._next + count <= size else 0
        self._next = -(-(start + count) // 4096) * 4096  # Aligned as an allocation is.
        return self.values[start : start + count]


class _Kernel(Protocol):
    """One work with its buffers. ``run`` queues it on the current stream."""

    def poison(self) -> None: ...
    def run(self) -> None: ...
    def error(self) -> float: ...


class CudaUnit:
    """Works behind one launch; see Device.prepare."""

    def __init__(
        self, lane: CudaLane, works: Sequence[_Kernel], runs: int, relative_error: float
    ) -> None:
        self.lane, self.kernels, self.runs = lane, works, runs
        self.relative_error = relative_error
        self.graph: Any = None

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.lane.stream):
            # torch.cuda.graph() would also collect garbage and empty the cache, which
            # takes longer than what is measured here.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._run()
            finally:
                graph.capture_end()
        self.graph = graph

    def launch(self, lane: Lane | None = None) -> None:
        chosen = self.lane if lane is None else lane
        assert isinstance(chosen, CudaLane)
        with torch.cuda.stream(chosen.stream):
            if self.graph is None:
                self._run()
            else:
                self.graph.replay()

    def _run(self) -> None:
        for _ in range(self.runs):
            for kernel in self.kernels:
                kernel.run()


class CudaDevice(Device):
    """GPU ``index`` of this process.

    Raises:
        CalibrationError: there is no such GPU, or torch cannot use it.
    """

    def __init__(self, index: int = 0, seed: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise CalibrationError(f"torch {torch.__version__} finds no NVIDIA GPU.")
        if index >= torch.cuda.device_count():
            raise CalibrationError(f"There is no GPU {index} here, of {torch.cuda.device_count()}.")
        from vllm_duet.lanes.green_context import sm_limits

        torch.cuda.set_device(index)
        torch.manual_seed(torch.seed() if seed is None else seed)
        properties = torch.cuda.get_device_properties(index)
        limits = sm_limits(index)
        self.index = index
        self.info = DeviceInfo(
            name=properties.name,
            num_sms=limits.num_sms,
            min_sms=limits.min_sms,
            sm_granularity=limits.granularity,
            splits=tuple(limits.splits()),
            memory_bytes=properties.total_memory,
            driver=_driver_version(),
            cuda=str(torch.version.cuda),
            torch=torch.__version__,
            triton=triton.__version__,
        )
        self.device = torch.device("cuda", index)
        size = min(ARENA_BYTES, properties.total_memory // 8) // 2**20 * 2**20
        # bfloat16; normal, since the data decides how much power a product draws.
        values = torch.empty(size // 2, dtype=torch.bfloat16, device=self.device).normal_()
        self.arena = Arena(values)
        self.cache_bytes = int(properties.L2_cache_size)
        self._whole = CudaLane(limits.num_sms, torch.cuda.Stream(index))
        self._lanes = [self._whole]
        self._warm_up()

    def whole(self) -> CudaLane:
        return self._whole

    @contextmanager
    def split(
        self, decode_sms: int, *, separate_work_queues: bool = True, decode_priority: int = 0
    ) -> Iterator[Lanes]:
        from vllm_duet.lanes.green_context import SmSplit

        before = list(self._lanes)
        with SmSplit.create(
            decode_sms, self.index, separate_work_queues=separate_work_queues
        ) as split:
            decode = CudaLane(split.decode.num_sms, split.decode.stream(decode_priority))
            prefill = CudaLane(split.prefill.num_sms, split.prefill.stream())
            self._lanes += [decode, prefill]
            try:
                yield Lanes(decode, prefill, split.separate_work_queues)
            finally:
                # A buffer must not go before its reader.
                self.synchronize()
                self._lanes = before
        if before == [self._whole]:
            # Those of streams that are gone; within another split a graph may hold some.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def prepare(
        self, works: Sequence[Work], lane: Lane, *, runs: int = 1, captured: bool = True
    ) -> CudaUnit:
        assert isinstance(lane, CudaLane)
        copies = ceil(CACHE_SIZES_APART * self.cache_bytes / amounts(works)[1])
        made = [self._kernel(work, copies) for work in works]
        for kernel in made:
            kernel.poison()
        self.synchronize()
        with torch.cuda.stream(lane.stream):
            for kernel in made:
                kernel.run()
        self.synchronize()
        errors = [kernel.error() for kernel in made]
        self.synchronize()
        for work, error in zip(works, errors, strict=True):
            if not error <= TOLERANCE:
                raise CalibrationError(
                    f"{work} is wrong on {lane.num_sms} SMs: relative error {error:.3g}"
                )
        unit = CudaUnit(lane, made, runs, max(errors))
        if captured:
            unit.capture()
        return unit

    def mark(self, lane: Lane) -> Any:
        assert isinstance(lane, CudaLane)
        event = torch.cuda.Event(enable_timing=True)
        event.record(lane.stream)
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def synchronize(self) -> None:
        # The device's primary context, and each green context's stream: whether the
        # first waits for the others is the driver's version's business.
        torch.cuda.synchronize(self.index)
        for lane in self._lanes:
            lane.stream.synchronize()

    def now_s(self) -> float:
        return perf_counter()

    def free_bytes(self) -> int:
        self.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.index)[0])

    def sm_ids(self, unit: Unit) -> frozenset[int]:
        self.synchronize()
        assert isinstance(unit, CudaUnit)
        [kernel] = unit.kernels
        assert isinstance(kernel, _SmIds)
        found = frozenset(kernel.found.tolist())
        kernel.found.fill_(-1)  # So that a launch that does nothing is seen.
        self.synchronize()
        return found

    def _warm_up(self) -> None:
        """Keep the GPU busy until its clocks have risen."""
        x, y = (torch.randn(4096, 4096, **_like(self.arena)) for _ in range(2))
        end_s = perf_counter() + WARM_UP_S
        while perf_counter() < end_s:
            torch.mm(x, y)
            torch.cuda.synchronize(self.index)

    def _kernel(self, work: Work, copies: int) -> _Kernel:
        if isinstance(work, Gemm):
            return _Gemm(work, self.arena, copies, self.info.num_sms)
        if isinstance(work, PagedAttention):
            return _Attention(work, self.arena)
        if isinstance(work, Stream):
            return (_Read if work.name == "read" else _Copy)(work.bytes, self.arena)
        if isinstance(work, SmallKernel):
            return _Copy(work.bytes, self.arena)
        return _SmIds(self.arena, 32 * self.info.num_sms)


class _Gemm:
    def __init__(self, work: Gemm, arena: Arena, copies: int, device_sms: int) -> None:
        self.work, self.device_sms = work, device_sms
        size = work.fan_in * work.fan_out
        copies = max(min(copies, arena.values.numel() // size), 1)
        self.weights = [arena.take(size).view(work.fan_out, work.fan_in) for _ in range(copies)]
        self.x = torch.randn(work.rows, work.fan_in, **_like(arena))
        self.y = torch.empty(work.rows, work.fan_out, **_like(arena))
        self.turn = 0

    def poison(self) -> None:
        self.y.fill_(torch.nan)

    def run(self) -> None:
        weight = self.weights[self.turn % len(self.weights)]
        self.turn += 1
        if self.work.kernel == "persistent":
            num_programs = self.work.sm_target or self.device_sms
            kernels.persistent_gemm(self.x, weight, self.y, num_programs)
        elif self.work.sm_target is None:
            torch.mm(self.x, weight.T, out=self.y)
        else:
            with _cublas_sm_target(self.work.sm_target):
                torch.mm(self.x, weight.T, out=self.y)

    def error(self) -> float:
        weight = self.weights[(self.turn - 1) % len(self.weights)]
        return gemm_error(self.x, weight, self.y)


class _Attention:
    def __init__(self, work: PagedAttention, arena: Arena) -> None:
        heads, kv_heads, dim = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
        width = -(-work.context_len // KV_BLOCK_TOKENS)
        blocks = work.batch * width
        shape = (blocks, KV_BLOCK_TOKENS, kv_heads, dim)
        self.keys, self.values = arena.take(2 * prod(shape)).view(2, *shape)
        # In random order, as a pool that has served for a while hands them out.
        order = torch.randperm(blocks, device=arena.values.device).to(torch.int32)
        self.table = order.view(work.batch, width)
        self.query = torch.randn(work.batch, heads, dim, **_like(arena))
        self.output = torch.empty(work.batch, heads, dim, **_like(arena))
        self.context_len = work.context_len
        self.attention = kernels.DecodeAttention(
            self.keys, self.values, self.table, self.query, self.output, work.context_len
        )

    def poison(self) -> None:
        self.output.fill_(torch.nan)

    def run(self) -> None:
        self.attention.run()

    def error(self) -> float:
        return attention_error(
            self.query, self.keys, self.values, self.table, self.context_len, self.output
        )


class _Read:
    def __init__(self, traffic: int, arena: Arena) -> None:
        self.source = arena.take(traffic // 2).view(torch.int32)
        tiles = triton.cdiv(self.source.numel(), kernels.TILE_ELEMENTS)
        self.sums = torch.empty(tiles, dtype=torch.int32, device=self.source.device)
        # Before anything is timed: the same in every run.
        self.expected = torch.cat(
            [
                tile_sums(part, kernels.TILE_ELEMENTS)
                for part in self.source.split(4096 * kernels.TILE_ELEMENTS)
            ]
        )

    def poison(self) -> None:
        self.sums.fill_(-1)

    def run(self) -> None:
        kernels.read(self.source, self.sums)

    def error(self) -> float:
        return 0.0 if torch.equal(self.sums, self.expected) else float("inf")


class _Copy:
    def __init__(self, traffic: int, arena: Arena) -> None:
        self.source = arena.take(traffic // 4).view(torch.int32)
        self.target = torch.empty_like(self.source)

    def poison(self) -> None:
        self.target.fill_(-1)

    def run(self) -> None:
        kernels.copy(self.source, self.target)

    def error(self) -> float:
        return 0.0 if torch.equal(self.source, self.target) else float("inf")


class _SmIds:
    def __init__(self, arena: Arena, programs: int) -> None:
        self.source = arena.take(2 * kernels.SM_IDS_TILE).view(torch.int32)
        self.sums, self.found = (
            torch.empty(programs, dtype=torch.int32, device=self.source.device) for _ in range(2)
        )
        expected = kernels.SM_IDS_SPINS * self.source.sum(dtype=torch.int64)
        self.expected = ((expected + 2**31) % 2**32 - 2**31).to(torch.int32)

    def poison(self) -> None:
        self.sums.fill_(-1)
        self.found.fill_(-1)

    def run(self) -> None:
        kernels.sm_ids(self.source, self.sums, self.found)

    def error(self) -> float:
        right = (self.sums == self.expected).all() and (self.found >= 0).all()
        return 0.0 if bool(right) else float("inf")


def _like(arena: Arena) -> dict[str, Any]:
    return {"dtype": arena.values.dtype, "device": arena.values.device}


@contextmanager
def _cublas_sm_target(num_sms: int) -> Iterator[None]:
    """Make cuBLAS size its kernels for ``num_sms`` SMs.

    Source: cuBLAS documentation, cublasSetSmCountTarget; 0 is the whole device again.
    """
    library = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).split('.')[0]}")
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    status = library.cublasSetSmCountTarget(handle, ctypes.c_int(num_sms))
    if status:
        raise CalibrationError(f"cublasSetSmCountTarget failed with status {status}")
    try:
        yield
    finally:
        library.cublasSetSmCountTarget(handle, ctypes.c_int(0))


def _driver_version() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # Absent, or without permission: the kernel module says it too.
        line = Path("/proc/driver/nvidia/version")
        words = line.read_text().split() if line.exists() else []
        return next((w for w in words if w[0].isdigit() and w.count(".") >= 1), "unknown")
