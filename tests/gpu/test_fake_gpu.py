# SPDX-License-Identifier: Apache-2.0
"""The fake GPU against what NVIDIA's documentation says.

Functions whose name begins with an underscore run in a process on it. What is put on streams
are Python functions that write a log. A rule must hold under every seed; where CUDA leaves an order
open, some seed must show each.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import byref, c_int, c_long, c_uint, c_void_p
from pathlib import Path

import pytest
from cuda_calls import DEFAULT, NON_BLOCKING, NOT_PERMITTED, Cuda, CudaError, comes_before
from fake_gpu import FakeGpu

INVALID_VALUE, INVALID_RESOURCE_TYPE, INVALID_CONFIGURATION = 1, 914, 915
SEEDS = range(40)


def _under_all_seeds(program: str) -> None:
    gpu = FakeGpu()
    for seed in SEEDS:
        gpu.seed(seed)
        globals()[program]()


def orders_of(on_fake_gpu, program: Callable) -> set[str]:
    """What ``program`` prints under all seeds."""
    printed = on_fake_gpu(_under_all_seeds, program.__name__, order="late")
    return set(printed.splitlines())


def fails(error: int, call: Callable, *arguments: object) -> None:
    with pytest.raises(CudaError) as raised:
        call(*arguments)
    assert raised.value.error == error, raised.value


# ------------------------------------------------------------------ streams


def _runs_at_once() -> None:
    cuda, log = Cuda(), []
    cuda.host(cuda.stream(), lambda: log.append("first"))
    cuda.host(cuda.stream(), lambda: log.append("second"))
    assert log == ["first", "second"]


def test_without_an_order_work_runs_when_it_is_queued(on_fake_gpu):
    on_fake_gpu(_runs_at_once)


def _runs_when_waited_for() -> None:
    cuda, log = Cuda(), []
    stream = cuda.stream()
    for i in range(100):
        cuda.host(stream, lambda i=i: log.append(i))
    assert log == []
    assert cuda.gpu.count("queued") == 100
    cuda.sync(stream)
    assert log == list(range(100))
    assert cuda.gpu.count("queued") == 0


def test_late_work_runs_when_it_is_waited_for_and_in_its_streams_order(on_fake_gpu):
    on_fake_gpu(_under_all_seeds, _runs_when_waited_for.__name__, order="late")


def _two_streams(ordered: bool) -> None:
    cuda, log = Cuda(), []
    one, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.host(one, lambda: log.append("a"))
    if ordered:
        cuda.record(event, one)
        cuda.wait(other, event)
    cuda.host(other, lambda: log.append("b"))
    cuda.sync()
    print(*log)


def _unordered() -> None:
    _two_streams(False)


def _ordered() -> None:
    _two_streams(True)


def test_two_streams_run_in_any_order_unless_an_event_orders_them(on_fake_gpu):
    assert orders_of(on_fake_gpu, _unordered) == {"a b", "b a"}
    assert orders_of(on_fake_gpu, _ordered) == {"a b"}


def _recorded_again() -> None:
    cuda, log = Cuda(), []
    one, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.host(one, lambda: log.append("a"))
    cuda.record(event, one)
    cuda.wait(other, event)
    cuda.host(one, lambda: log.append("b"))
    cuda.record(event, one)
    cuda.host(other, lambda: log.append("c"))
    cuda.sync()
    print(*log)


def test_a_wait_is_for_the_last_record_before_it(on_fake_gpu):
    assert orders_of(on_fake_gpu, _recorded_again) == {"a b c", "a c b"}


def _event_destroyed() -> None:
    cuda, log = Cuda(), []
    one, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.host(one, lambda: log.append("a"))
    cuda.record(event, one)
    cuda.wait(other, event)
    cuda.call("cudaEventDestroy", c_void_p(event))
    cuda.host(other, lambda: log.append("b"))
    cuda.sync()
    print(*log)


def test_an_event_may_be_destroyed_before_it_happens(on_fake_gpu):
    assert orders_of(on_fake_gpu, _event_destroyed) == {"a b"}


def _legacy(flags: int) -> None:
    cuda, log = Cuda(), []
    stream = cuda.stream(flags)
    cuda.host(stream, lambda: log.append("a"))
    cuda.host(0, lambda: log.append("b"))
    cuda.host(stream, lambda: log.append("c"))
    cuda.sync()
    print(*log)


def _legacy_and_blocking() -> None:
    _legacy(DEFAULT)


def _legacy_and_non_blocking() -> None:
    _legacy(NON_BLOCKING)


def test_the_legacy_stream_and_blocking_streams_wait_for_each_other(on_fake_gpu):
    assert orders_of(on_fake_gpu, _legacy_and_blocking) == {"a b c"}
    assert orders_of(on_fake_gpu, _legacy_and_non_blocking) == {"a b c", "b a c", "a c b"}


def _polled() -> None:
    cuda = Cuda()
    stream, event, source = cuda.stream(), cuda.event(), cuda.pinned(200)
    source.raw = bytes(range(200))
    to = cuda.malloc(200)
    for i in range(200):
        cuda.copy(to + i, ctypes.addressof(source) + i, 1, stream)
    cuda.record(event, stream)
    polls = 0
    while not cuda.is_done(event):
        polls += 1
    assert cuda.read(to, 200) == bytes(range(200))
    assert 0 < polls < 2000


def _polled_before_a_host_function() -> None:
    cuda, log = Cuda(), []
    stream, event = cuda.stream(), cuda.event()
    cuda.host(stream, lambda: log.append("ran"))
    cuda.record(event, stream)
    # A query lets none run: whoever asks may hold a lock that the function needs.
    assert not any(cuda.is_done(event) for _ in range(500)) and not log
    FakeGpu().advance(1)
    assert cuda.is_done(event) and log == ["ran"]


def test_who_only_polls_gets_an_answer_in_the_end(on_fake_gpu):
    on_fake_gpu(_under_all_seeds, _polled.__name__, order="late")
    on_fake_gpu(_polled_before_a_host_function, order="late")


def _event_waited_for() -> None:
    cuda, log = Cuda(), []
    one, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.host(one, lambda: log.append("a"))
    cuda.record(event, one)
    cuda.host(one, lambda: log.append("later"))
    cuda.host(other, lambda: log.append("elsewhere"))
    cuda.call("cudaEventSynchronize", c_void_p(event))
    assert "a" in log
    print(len(log))


def test_waiting_for_an_event_promises_nothing_else(on_fake_gpu):
    assert orders_of(on_fake_gpu, _event_waited_for) >= {"1", "2"}


# ------------------------------------------------------------------ host functions and Python


def _host_function_waits() -> None:
    cuda, found = Cuda(), []
    stream = cuda.stream()

    def wait() -> None:
        found.append(cuda.library.cudaStreamSynchronize(c_void_p(stream)))

    cuda.host(stream, wait)
    cuda.sync()
    assert found == [NOT_PERMITTED]


def test_a_host_function_must_not_wait_for_the_device(on_fake_gpu):
    on_fake_gpu(_host_function_waits)
    on_fake_gpu(_host_function_waits, order="late:0")


def _waiters_with_pythons_lock() -> None:
    cuda, log = Cuda(), []
    keeps_the_lock = ctypes.PyDLL("libcuda.so.1")
    streams = [cuda.stream() for _ in range(4)]

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(2000):  # Python switches threads on the way
                sum(range(50))
            log.append(name)

        return run

    def wait(stream: int) -> None:
        assert keeps_the_lock.cudaStreamSynchronize(c_void_p(stream)) == 0

    for i in range(10):
        for k, stream in enumerate(streams):
            cuda.host(stream, work(f"{k}:{i}"))
    threads = [threading.Thread(target=wait, args=(s,)) for s in streams]
    for thread in threads:
        thread.start()
    event = cuda.event()
    while any(thread.is_alive() for thread in threads):
        keeps_the_lock.cudaEventRecord(c_void_p(event), c_void_p(streams[0]))
        keeps_the_lock.cudaEventQuery(c_void_p(event))
        for thread in threads:
            thread.join(0.001)
    for k in range(4):
        assert [x for x in log if x.startswith(f"{k}:")] == [f"{k}:{i}" for i in range(10)]


def test_nobody_waits_for_python_while_it_keeps_pythons_lock(on_fake_gpu):
    on_fake_gpu(_under_all_seeds, _waiters_with_pythons_lock.__name__, order="late")
    on_fake_gpu(_waiters_with_pythons_lock)


# ------------------------------------------------------------------ memory and copies


def _freed() -> None:
    cuda, log = Cuda(), []
    memory, stream = cuda.malloc(4096), cuda.stream()
    cuda.host(stream, lambda: log.append("used"))
    cuda.free(memory)
    assert log == ["used"]
    assert cuda.gpu.count("device_bytes") == 0


def test_freeing_waits_for_what_is_queued(on_fake_gpu):
    on_fake_gpu(_freed, order="late:0")


def _pinned(num_bytes: int, changes: bool) -> None:
    cuda = Cuda()
    source, memory, stream = cuda.pinned(num_bytes), cuda.malloc(num_bytes), cuda.stream()
    source[num_bytes - 1] = b"1"
    cuda.copy(memory, source, num_bytes, stream)
    if changes:
        source[num_bytes - 1] = b"2"
    assert cuda.read(memory, num_bytes)[-1:] == b"\0"
    cuda.sync(stream)
    source[num_bytes - 1] = b"3"
    cuda.sync()
    assert cuda.read(memory, num_bytes)[-1:] == (b"2" if changes else b"1")
    found = cuda.gpu.reports()
    assert len(found) == changes
    if changes:
        assert found[0].startswith("pinned: ")
        assert f"a copy of {num_bytes} bytes" in found[0]
        assert "_pinned" in found[0]  # the Python function that queued it


@pytest.mark.parametrize("num_bytes", [8, 100_000])
def test_a_pinned_source_must_not_change_before_its_copy_has_run(on_fake_gpu, num_bytes):
    on_fake_gpu(_pinned, num_bytes, True, order="late:0", backtrace=True)
    on_fake_gpu(_pinned, num_bytes, False, order="late:0", backtrace=True)


def _pageable() -> None:
    cuda = Cuda()
    source, memory, stream = ctypes.create_string_buffer(b"1"), cuda.malloc(1), cuda.stream()
    cuda.copy(memory, source, 1, stream)
    source[0] = b"2"
    cuda.sync(stream)
    assert cuda.read(memory, 1) == b"1"
    assert cuda.gpu.reports() == []


def test_a_pageable_source_may_change_after_the_call(on_fake_gpu):
    on_fake_gpu(_pageable, order="late:0")


def _to_the_host() -> None:
    cuda = Cuda()
    memory, stream = cuda.malloc(1), cuda.stream()
    pinned, pageable = cuda.pinned(1), ctypes.create_string_buffer(1)
    cuda.call("cudaMemsetAsync", c_void_p(memory), c_int(7), ctypes.c_size_t(1), c_void_p(stream))
    cuda.copy(pinned, memory, 1, stream)
    assert pinned[0] == b"\0"
    cuda.copy(pageable, memory, 1, stream)
    assert pageable[0] == pinned[0] == b"\7"


def test_a_copy_to_pinned_memory_comes_late_and_one_to_pageable_memory_is_waited_for(on_fake_gpu):
    on_fake_gpu(_to_the_host, order="late:0")


# ------------------------------------------------------------------ capture and graphs


def _branches() -> None:
    cuda, log = Cuda(), []
    main, side, elsewhere = (cuda.stream() for _ in range(3))
    forked, joined = cuda.event(), cuda.event()
    with cuda.capture(main) as graph:
        cuda.host(main, lambda: log.append("a"))
        cuda.record(forked, main)
        cuda.wait(side, forked)
        cuda.host(side, lambda: log.append("b"))
        cuda.host(main, lambda: log.append("c"))
        cuda.record(joined, side)
        cuda.wait(main, joined)
        cuda.host(main, lambda: log.append("d"))
    assert log == []
    executable = cuda.instantiate(graph[0])
    cuda.call("cudaGraphDestroy", c_void_p(graph[0]))
    cuda.launch(executable, main)
    cuda.launch(executable, elsewhere)
    cuda.call("cudaGraphExecDestroy", c_void_p(executable))
    assert log == []
    cuda.sync()
    first, second = log[:4], log[4:]
    for run in (first, second):  # launches of one executable graph do not overlap
        assert sorted(run) == ["a", "b", "c", "d"]
        assert run[0] == "a" and run[3] == "d"
    assert cuda.gpu.count("graphs") == cuda.gpu.count("graph_execs") == 0
    print(*first)


def test_a_graphs_nodes_run_in_any_order_that_it_allows(on_fake_gpu):
    assert orders_of(on_fake_gpu, _branches) == {"a b c d", "a c b d"}


def _interleaved() -> None:
    cuda, log = Cuda(), []
    one, other = cuda.stream(), cuda.stream()
    with cuda.capture(one) as graph:
        cuda.host(one, lambda: log.append("a"))
        cuda.host(one, lambda: log.append("c"))
    cuda.launch(cuda.instantiate(graph[0]), one)
    cuda.host(other, lambda: log.append("b"))
    cuda.sync()
    assert comes_before(log, "a", "c")
    print(*log)


def test_other_streams_run_between_a_graphs_nodes(on_fake_gpu):
    assert orders_of(on_fake_gpu, _interleaved) == {"a b c", "b a c", "a c b"}


def _capture_rules() -> None:
    cuda = Cuda()
    main, side, event, before = cuda.stream(), cuda.stream(), cuda.event(), cuda.event()
    invalid, unjoined, isolation, captured = 901, 904, 905, 907

    def begin() -> None:
        cuda.call("cudaStreamBeginCapture", c_void_p(main), c_int(0))

    # What would wait, or takes memory, is forbidden and ends it.
    for forbidden in (cuda.sync, lambda: cuda.sync(main), lambda: cuda.malloc(8)):
        begin()
        fails(900, forbidden)
        fails(invalid, cuda.end_capture, main)

    # Work of a stream that joined must be joined again.
    begin()
    cuda.record(event, main)
    cuda.wait(side, event)
    cuda.host(side, lambda: None)
    fails(unjoined, cuda.end_capture, main)

    # An event recorded in a capture has not happened, and cannot be asked for.
    begin()
    cuda.host(main, lambda: None)
    cuda.record(event, main)
    fails(captured, cuda.is_done, event)
    fails(invalid, cuda.end_capture, main)
    fails(captured, cuda.wait, side, event)  # what it stood for is gone

    # A capture cannot depend on what was queued outside of it.
    cuda.record(before, side)
    begin()
    fails(isolation, cuda.wait, main, before)
    fails(invalid, cuda.end_capture, main)

    # The thread may allow itself what a capture forbids.
    begin()
    mode = c_int(2)
    cuda.call("cudaThreadExchangeStreamCaptureMode", byref(mode))
    cuda.free(cuda.malloc(8))
    cuda.call("cudaThreadExchangeStreamCaptureMode", byref(mode))
    cuda.end_capture(main)


def test_capture_rules(on_fake_gpu):
    on_fake_gpu(_capture_rules)
    on_fake_gpu(_capture_rules, order="late:0")


# ------------------------------------------------------------------ green contexts


class Resource(ctypes.Structure):
    """CUdevResource, as far as it is about SMs."""

    _fields_ = (
        ("type", c_int),
        ("padding", ctypes.c_ubyte * 92),
        ("sms", c_uint),
        ("min_sms", c_uint),
        ("alignment", c_uint),
        ("rest", ctypes.c_ubyte * 64),
    )


def _device_sms(cuda: Cuda, kind: int = 1) -> Resource:
    whole = Resource()
    cuda.call("cuInit", c_uint(0))
    cuda.call("cuDeviceGetDevResource", c_int(0), byref(whole), c_int(kind))
    return whole


def _split(cuda: Cuda, at_least: int) -> tuple[Resource, Resource]:
    group, rest, count = Resource(), Resource(), c_uint(1)
    arguments = byref(_device_sms(cuda)), byref(rest), c_uint(0), c_uint(at_least)
    cuda.call("cuDevSmResourceSplitByCount", byref(group), byref(count), *arguments)
    return group, rest


def _green_stream(cuda: Cuda, sms: Resource) -> tuple[int, int]:
    description, context, stream = c_void_p(), c_void_p(), c_void_p()
    cuda.call("cuDevResourceGenerateDesc", byref(description), byref(sms), c_uint(1))
    cuda.call("cuGreenCtxCreate", byref(context), description, c_int(0), c_uint(1))
    cuda.call("cuGreenCtxStreamCreate", byref(stream), context, c_uint(1), c_int(0))
    assert context.value and stream.value
    return context.value, stream.value


def _splits(num_sms: int) -> None:
    cuda = Cuda()
    whole = _device_sms(cuda)
    assert (whole.sms, whole.min_sms, whole.alignment) == (num_sms, 8, 8)
    for asked, given in ((1, 8), (8, 8), (9, 16), (64, 64)):
        group, rest = _split(cuda, asked)
        assert (group.sms, rest.sms) == (given, num_sms - given)
    fails(INVALID_CONFIGURATION, _split, cuda, num_sms - num_sms % 8 + 1)
    fails(INVALID_VALUE, _split, cuda, num_sms + 1)


@pytest.mark.parametrize("num_sms", [132, 114, 78])
def test_groups_of_sms(on_fake_gpu, num_sms):
    on_fake_gpu(_splits, num_sms, sms=num_sms)


def _green_contexts() -> None:
    cuda = Cuda()
    group, rest = _split(cuda, 32)
    context, stream = _green_stream(cuda, group)
    others, other = _green_stream(cuda, rest)
    ours, theirs, all_sms = (cuda.gpu.stream_group(s) for s in (stream, other, cuda.stream()))
    assert (ours.first, ours.count) == (0, 32)
    assert (theirs.first, theirs.count) == (32, 100)
    assert all_sms.count == 132 and all_sms.green == 0
    assert ours.green != theirs.green
    assert cuda.gpu.count("green_contexts") == 2
    for green in (context, others):
        cuda.call("cuGreenCtxDestroy", c_void_p(green))
    fails(709, lambda: cuda.call("cuGreenCtxDestroy", c_void_p(context)))
    fails(917, cuda.host, stream, lambda: None)
    before = cuda.gpu.count("streams")
    for green in (stream, other):
        cuda.call("cudaStreamDestroy", c_void_p(green))
    assert cuda.gpu.count("streams") == before - 2
    assert cuda.gpu.count("green_contexts") == 0


def test_green_contexts_and_their_streams(on_fake_gpu):
    on_fake_gpu(_green_contexts)


def _has(cuda: Cuda, function: str) -> bool:
    found = c_void_p()
    name = function.encode()
    return not cuda.library.cuGetProcAddress_v2(name, byref(found), c_int(12050), c_long(0), None)


def _driver(streams: bool, queues: bool) -> None:
    cuda = Cuda()
    assert _has(cuda, "cuGreenCtxCreate")
    assert _has(cuda, "cuGreenCtxStreamCreate") == streams
    if queues:
        _device_sms(cuda, 1000)
    else:
        fails(INVALID_RESOURCE_TYPE, _device_sms, cuda, 1000)


def test_what_older_drivers_lack(on_fake_gpu):
    on_fake_gpu(_driver, True, True)
    on_fake_gpu(_driver, True, False, driver=13000)
    on_fake_gpu(_driver, True, False, work_queues=False)
    on_fake_gpu(_driver, False, False, driver=12040)


def _launched_on_another_group() -> None:
    cuda = Cuda()
    group, rest = _split(cuda, 32)
    _, stream = _green_stream(cuda, group)
    _, other = _green_stream(cuda, rest)
    handle = c_void_p()
    cuda.call("cublasCreate_v2", byref(handle))
    cuda.call("cublasSetStream_v2", handle, c_void_p(stream))
    with cuda.capture(stream) as graph:
        cuda.call("fakecuda_blas", handle, b"a product")
    executable = cuda.instantiate(graph[0])
    cuda.launch(executable, stream)
    assert cuda.gpu.reports() == []
    cuda.launch(executable, other)
    (found,) = cuda.gpu.reports()
    assert found.startswith("group: ") and "a product" in found and "32 SMs" in found


def test_a_graph_launched_on_another_group_of_sms_is_reported(on_fake_gpu):
    on_fake_gpu(_launched_on_another_group)


# ------------------------------------------------------------------ faults


def _memory_faults() -> None:
    cuda = Cuda()
    cuda.gpu.fail_malloc(skip=1, times=2)
    cuda.malloc(8)
    fails(2, cuda.malloc, 8)
    fails(2, cuda.malloc, 8)
    cuda.malloc(8)
    cuda.gpu.limit_memory(cuda.gpu.count("device_bytes") + 8192)
    fails(2, cuda.malloc, 8193)
    memory = cuda.malloc(8192)
    fails(2, cuda.malloc, 1)
    cuda.free(memory)
    cuda.malloc(1)
    cuda.gpu.no_faults()
    cuda.malloc(1 << 30)
    fails(2, cuda.malloc, 2 << 30)


def test_memory_that_runs_out(on_fake_gpu):
    on_fake_gpu(_memory_faults, memory_gb=2)


def _launch_faults() -> None:
    cuda = Cuda()
    group, _ = _split(cuda, 32)
    _, green = _green_stream(cuda, group)
    handle = c_void_p()
    cuda.call("cublasCreate_v2", byref(handle))

    def launch(stream: int) -> int:
        cuda.call("cublasSetStream_v2", handle, c_void_p(stream))
        return cuda.library.fakecuda_blas(handle, b"a product")

    cuda.gpu.fail_launch(32, skip=1)
    assert [launch(0), launch(green), launch(green), launch(green)] == [0, 0, 13, 0]
    assert cuda.library.cudaGetLastError() == 701
    assert cuda.library.cudaGetLastError() == 0

    cuda.gpu.break_device(32)
    assert launch(0) == launch(green) == 0
    for call in (cuda.sync, cuda.stream, lambda: cuda.malloc(1), lambda: cuda.sync(0)):
        fails(700, call)
    assert cuda.library.cudaGetLastError() == cuda.library.cudaGetLastError() == 700
    cuda.gpu.no_faults()
    cuda.sync()


def test_launches_that_fail_and_a_device_that_breaks(on_fake_gpu):
    on_fake_gpu(_launch_faults)


def _held() -> None:
    cuda, log = Cuda(), []
    group, rest = _split(cuda, 32)
    streams = [_green_stream(cuda, sms)[1] for sms in (group, rest)]
    cuda.gpu.hold(32)
    for name, stream in zip(("held", "free"), streams, strict=True):
        cuda.host(stream, lambda name=name: log.append(name))
    cuda.sync(streams[1])
    cuda.gpu.advance(10)
    assert log == ["free"]
    waiting = threading.Thread(target=cuda.sync, args=(streams[0],))
    waiting.start()
    cuda.gpu.no_faults()
    waiting.join()
    assert log == ["free", "held"]


@pytest.mark.parametrize("order", [None, "late:0"])
def test_nothing_runs_on_streams_that_are_held(on_fake_gpu, order):
    on_fake_gpu(_held, order=order)


def _faults_by_file(path: str) -> None:
    cuda = Cuda()
    cuda.malloc(1)
    Path(path).write_text("malloc 0 1\n")
    fails(2, cuda.malloc, 1)
    cuda.malloc(1)
    log, stream = [], _green_stream(cuda, _split(cuda, 32)[0])[1]
    Path(path).write_text("hold 32\n")
    cuda.malloc(1)
    cuda.host(stream, lambda: log.append("ran"))
    assert log == []
    Path(path).write_text("release\n")
    cuda.sync(stream)
    assert log == ["ran"]


def test_faults_by_a_file(on_fake_gpu, tmp_path):
    path = tmp_path / "faults"
    on_fake_gpu(_faults_by_file, str(path), faults=path)
