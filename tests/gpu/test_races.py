# SPDX-License-Identifier: Apache-2.0
"""Accesses that nothing orders are found, and no others, whatever the order in which they ran."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_size_t, c_void_p
from pathlib import Path

import pytest
import triton
import triton_sample
from cuda_calls import DEFAULT, Cuda
from fake_gpu import FakeGpu
from fake_gpu.races import Arguments, Found, arguments_of, find_races
from fake_gpu.trace import read_trace
from triton.backends.compiler import GPUTarget


class Program(Cuda):
    """Two streams and 64 bytes of the device's memory."""

    def __init__(self, flags: int = 1) -> None:
        super().__init__()
        self.one, self.other = self.stream(flags), self.stream(flags)
        self.memory = self.malloc(64)

    def write(self, stream: int, at: int = 0, num_bytes: int = 8) -> None:
        def run() -> None:
            self.gpu.name("writer")
            self.gpu.access(self.memory + at, num_bytes, True)

        self.host(stream, run)

    def read_bytes(self, stream: int, at: int = 0, num_bytes: int = 8) -> None:
        self.host(stream, lambda: self.gpu.access(self.memory + at, num_bytes, False))


def races_of(on_fake_gpu, tmp_path: Path, program: Callable) -> Found:
    """The races of the program, the same under every order."""
    found = []
    for order in (None, "late:0", "late:1", "late:2"):
        trace = tmp_path / f"{program.__name__}-{order}"
        on_fake_gpu(program, order=order, trace=trace)
        (file,) = tmp_path.glob(f"{trace.name}.*")
        found.append(find_races(read_trace(file)))
    assert len({len(f.races) for f in found}) == 1
    return found[0]


def _unordered_writes() -> None:
    p = Program()
    p.write(p.one)
    p.write(p.other)
    p.sync()


def _overlap() -> None:
    p = Program()
    p.write(p.one, at=0, num_bytes=32)
    p.read_bytes(p.other, at=31, num_bytes=1)
    p.sync()


def _fill_and_copy() -> None:
    p = Program()
    p.call("cudaMemsetAsync", c_void_p(p.memory), c_int(1), c_size_t(64), c_void_p(p.one))
    p.copy(p.pinned(4), p.memory + 60, 4, p.other)
    p.sync()


def _waits_for_too_little() -> None:
    p = Program()
    event = p.event()
    p.record(event, p.one)
    p.write(p.one)
    p.wait(p.other, event)
    p.read_bytes(p.other)
    p.sync()


def _waits_for_the_other_stream() -> None:
    p = Program()
    p.write(p.one)
    p.sync(p.other)
    p.read_bytes(p.other)
    p.sync()


def _nodes() -> None:
    p = Program()
    with p.capture(p.one) as graph:
        p.write(p.one)
    p.launch(p.instantiate(graph[0]), p.one)
    p.read_bytes(p.other)
    p.sync()


@pytest.mark.parametrize(
    "program",
    [
        _unordered_writes,
        _overlap,
        _fill_and_copy,
        _waits_for_too_little,
        _waits_for_the_other_stream,
        _nodes,
    ],
)
def test_a_race_is_found(on_fake_gpu, tmp_path, program):
    assert len(races_of(on_fake_gpu, tmp_path, program).races) == 1


def test_a_race_tells_who(on_fake_gpu, tmp_path):
    (race,) = races_of(on_fake_gpu, tmp_path, _waits_for_too_little).races
    assert sorted([race.first.who, race.second.who]) == ["host function", "writer"]
    assert "stream" in str(race) and "writer" in str(race)


def _marked() -> None:
    _unordered_writes()
    FakeGpu().mark("here")
    _unordered_writes()


def test_races_after_a_mark(on_fake_gpu, tmp_path):
    trace = tmp_path / "trace"
    on_fake_gpu(_marked, trace=trace)
    (file,) = tmp_path.glob("trace.*")
    (mark,) = (line.number for line in read_trace(file) if line.word == "mark")
    found = find_races(read_trace(file))
    assert (len(found.races), len(found.after(mark))) == (2, 1)


def _apart() -> None:
    p = Program()
    p.write(p.one, at=0, num_bytes=32)
    p.write(p.other, at=32, num_bytes=32)
    p.read_bytes(p.one, at=0)
    p.sync()


def _reads() -> None:
    p = Program()
    p.read_bytes(p.one)
    p.read_bytes(p.other)
    p.sync()


def _by_an_event() -> None:
    p = Program()
    event = p.event()
    p.write(p.one)
    p.record(event, p.one)
    p.wait(p.other, event)
    p.write(p.other)
    p.record(event, p.other)
    p.wait(p.one, event)
    p.read_bytes(p.one)
    p.sync()


def _by_the_host() -> None:
    p = Program()
    event = p.event()
    p.write(p.one)
    p.record(event, p.one)
    while not p.is_done(event):
        FakeGpu().advance(1)  # a query lets no host function run
    p.write(p.other)
    p.sync(p.other)
    p.read_bytes(p.one)
    p.sync()


def _by_the_legacy_stream() -> None:
    p = Program(flags=DEFAULT)
    p.write(p.one)
    p.write(0)
    p.write(p.other)
    p.sync()


def _by_one_executable_graph() -> None:
    p = Program()
    with p.capture(p.one) as graph:
        p.write(p.one)
    executable = p.instantiate(graph[0])
    p.launch(executable, p.one)
    p.launch(executable, p.other)
    p.sync()


@pytest.mark.parametrize(
    "program",
    [_apart, _reads, _by_an_event, _by_the_host, _by_the_legacy_stream, _by_one_executable_graph],
)
def test_what_is_ordered_is_no_race(on_fake_gpu, tmp_path, program):
    found = races_of(on_fake_gpu, tmp_path, program)
    assert found.races == []
    assert found.num_writes + found.num_reads >= 2


def test_which_arguments_a_triton_kernel_reads_and_writes():
    signature = {"to": "*i32", "source": "*i32", "unused": "*i32", "n": "i32", "BLOCK": "constexpr"}
    source = triton.compiler.ASTSource(triton_sample.copy_some, signature, {"BLOCK": 64})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert arguments_of(compiled.asm["ttir"]) == Arguments(frozenset({0}), frozenset({1}))
