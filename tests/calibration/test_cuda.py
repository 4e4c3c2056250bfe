# SPDX-License-Identifier: Apache-2.0
"""What prepares and checks work for a GPU, on tensors of the CPU.

Streams, events and graphs are stood in for; the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from calibration.simulated import SimulatedDevice

from vllm_duet import lanes
from vllm_duet.calibration import command, cuda, triton_kernels
from vllm_duet.calibration.device import CalibrationError
from vllm_duet.calibration.work import Gemm, PagedAttention, SmallKernel, SmIds, Stream, Work

WORKS: list[Work] = [
    Gemm("plain", 5, 64, 96),
    Gemm("tiled", 70, 64, 96, kernel="persistent"),
    Stream("read", 100_000),
    Stream("copy", 100_000),
    PagedAttention(batch=2, context_len=100),
    SmallKernel(),
]


class Graph:
    """Counts; a CUDA graph replays what was run between begin and end."""

    def __init__(self) -> None:
        self.captured: list[str] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        self.captured.append("begin")

    def capture_end(self) -> None:
        self.captured.append("end")


class CpuDevice(cuda.CudaDevice):
    def __init__(self) -> None:
        self.info = replace(SimulatedDevice().info, num_sms=2)
        self.index = 0
        self.device = torch.device("cpu")
        # Triton's interpreter cannot multiply bfloat16.
        self.arena = cuda.Arena(torch.randn(2**20).to(torch.float16))
        self.cache_bytes = 2**14
        self._whole = cuda.CudaLane(2, SimpleNamespace(synchronize=lambda: None))
        self._lanes = [self._whole]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CpuDevice:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return CpuDevice()


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.kind}-{work.name}")
def test_every_work_computes_its_reference(device: CpuDevice, work: Work) -> None:
    unit = device.prepare([work], device.whole(), captured=False)
    assert unit.relative_error < cuda.TOLERANCE
    [kernel] = unit.kernels
    # What was not computed again is noticed: the buffers are poisoned before a check.
    kernel.poison()
    assert kernel.error() == float("inf")
    unit.launch()
    assert kernel.error() < cuda.TOLERANCE


def test_a_wrong_kernel_is_refused(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w, out: out.copy_(1.05 * right(x, w)))
    with pytest.raises(
        CalibrationError, match=r"plain.* is wrong on 2 SMs: relative error 0\.0[45]"
    ):
        device.prepare([WORKS[0]], device.whole())


def test_outputs_are_poisoned_before_the_check(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that leaves rows as they were must not find a right result there."""
    right: Callable[..., Any] = torch.mm
    seen = []

    def leaves_a_row(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        seen.append(bool(out.isnan().all()))
        out[1:] = right(x, w)[1:]

    monkeypatch.setattr(torch, "mm", leaves_a_row)
    with pytest.raises(CalibrationError, match="relative error inf"):
        device.prepare([WORKS[0]], device.whole())
    assert seen == [True]


def test_runs_take_turns_over_more_weights_than_the_cache_holds(device: CpuDevice) -> None:
    [kernel] = device.prepare([WORKS[0]], device.whole()).kernels
    assert isinstance(kernel, cuda._Gemm)
    starts = {weight.data_ptr() for weight in kernel.weights}
    size = kernel.weights[0].nbytes
    assert len(starts) == len(kernel.weights) and len(starts) * size > 2 * device.cache_bytes
    before = kernel.turn
    kernel.run()
    kernel.run()
    assert kernel.turn == before + 2
    assert kernel.error() < cuda.TOLERANCE  # Judged by the weight of the last run.


def test_a_capture_holds_every_run(device: CpuDevice) -> None:
    unit = device.prepare([WORKS[0]], device.whole(), runs=3)
    [kernel] = unit.kernels
    assert isinstance(kernel, cuda._Gemm)
    assert kernel.turn == 1 + 3  # Once to warm up and be checked.
    assert unit.graph.captured == ["begin", "end"]


def test_memory_is_handed_out_in_turn() -> None:
    arena = cuda.Arena(torch.arange(10_000, dtype=torch.float32).to(torch.bfloat16))
    first, second, third = arena.take(100), arena.take(4000), arena.take(6000)
    assert first.data_ptr() == third.data_ptr() == arena.values.data_ptr()
    assert second.data_ptr() - first.data_ptr() == 2 * 4096
    with pytest.raises(CalibrationError, match="GB are needed"):
        arena.take(10_001)


def test_sm_ids_are_poisoned_between_launches(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(source: torch.Tensor, sums: torch.Tensor, found: torch.Tensor) -> None:
        sums.fill_(int((64 * source.sum(dtype=torch.int64) + 2**31) % 2**32 - 2**31))
        found.copy_(torch.arange(found.numel()) % 2)

    monkeypatch.setattr(triton_kernels, "sm_ids", stand_in)
    unit = device.prepare([SmIds()], device.whole(), captured=False)
    unit.launch()
    assert device.sm_ids(unit) == {0, 1}
    assert device.sm_ids(unit) == {-1}


def test_no_gpu_is_one_sentence() -> None:
    with pytest.raises(CalibrationError, match=r"^torch \S+ finds no NVIDIA GPU\.$"):
        cuda.CudaDevice()


class Green:
    """Stands in for vllm_duet.lanes.green_context and torch's streams; writes down calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        module: Any = ModuleType("vllm_duet.lanes.green_context")
        module.GreenContextError = type("GreenContextError", (RuntimeError,), {})
        module.sm_limits = lambda index: SimpleNamespace(
            num_sms=132, min_sms=8, granularity=8, splits=lambda: range(8, 121, 8)
        )
        module.SmSplit = SimpleNamespace(create=self.create)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(lanes, "green_context", module, raising=False)
        for name in ("set_device", "empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: self.stream("whole"))
        clear = lambda: self.calls.append("clear workspaces")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, synchronize=lambda: self.calls.append(f"synchronize {name}")
        )

    def create(self, decode_sms: int, index: int, *, separate_work_queues: bool) -> Any:
        def group(name: str, num_sms: int) -> Any:
            return SimpleNamespace(
                num_sms=num_sms, stream=lambda priority=0: self.stream(f"{name}{decode_sms}")
            )

        @contextmanager
        def split() -> Iterator[Any]:
            decode, prefill = group("decode", decode_sms), group("prefill", 132 - decode_sms)
            yield SimpleNamespace(decode=decode, prefill=prefill, separate_work_queues=False)
            self.calls.append(f"release {decode_sms}")

        return split()


@pytest.fixture
def green(monkeypatch: pytest.MonkeyPatch) -> Green:
    return Green(monkeypatch)


def test_a_split_is_idle_when_it_is_released(device: CpuDevice, green: Green) -> None:
    with device.split(8) as outer:
        assert (outer.decode.num_sms, outer.prefill.num_sms) == (8, 124)
        assert not outer.separate_work_queues
        with device.split(64):
            pass
        # A graph of the outer split may still hold a workspace.
        assert "clear workspaces" not in green.calls
        assert green.calls.index("synchronize decode64") < green.calls.index("release 64")
        green.calls.clear()
    assert green.calls == [
        *("synchronize decode8", "synchronize prefill8"),
        *("release 8", "clear workspaces"),
    ]
    green.calls.clear()
    device.synchronize()
    assert not green.calls  # The lanes that are gone are not waited for.


def test_a_gpu_is_described(green: Green, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA X1", total_memory=2**26, L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    monkeypatch.setattr(cuda, "WARM_UP_S", 0.0)
    device = command.open_device(0)
    assert isinstance(device, cuda.CudaDevice)
    assert device.info.name == "NVIDIA X1" and device.info.splits == tuple(range(8, 121, 8))
    assert device.info.triton and device.whole().num_sms == 132
    # Random, not zeros, and an eighth of the memory.
    assert device.arena.values.nbytes == 2**23
    assert device.arena.values.float().std() == pytest.approx(1, abs=0.01)
    with pytest.raises(CalibrationError, match=r"There is no GPU 3 here, of 1\."):
        command.open_device(3)


def test_what_green_contexts_lack_is_said(green: Green, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["vllm_duet.lanes.green_context"]

    def too_old(index: int) -> Any:
        raise module.GreenContextError("The driver is too old.")

    monkeypatch.setattr(module, "sm_limits", too_old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    with pytest.raises(CalibrationError, match=r"^The driver is too old\.$"):
        command.open_device(0)
