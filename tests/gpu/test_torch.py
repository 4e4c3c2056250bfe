# SPDX-License-Identifier: Apache-2.0
"""torch's CUDA build takes the fake GPU for one, and what goes wrong there for its own errors."""

from __future__ import annotations

import os

import pytest
import torch
from fake_gpu import HOST_FUNCTION, FakeGpu


def _values() -> None:
    gpu, log = FakeGpu(), []
    stream = torch.cuda.Stream()
    # A host function may compute, by torch on the CPU, too.
    function = HOST_FUNCTION(lambda _: log.append(float(torch.ones(100).sum())))
    with torch.cuda.stream(stream):
        for _ in range(5):
            gpu.library.cudaLaunchHostFunc(stream.cuda_stream, function, None)
        numbers = torch.arange(10, device="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert log == []
    assert numbers.cpu().tolist() == list(range(10))
    assert log == [100.0] * 5
    assert torch.full((3,), 7, device="cuda").tolist() == [7, 7, 7]
    assert torch.cuda.get_device_properties(0).multi_processor_count == 114
    assert gpu.stream_group(stream.cuda_stream) == (0, 114, 0)


def test_values_and_properties(on_fake_gpu):
    for seed in range(2):
        on_fake_gpu(_values, order=f"late:{seed}", sms=114)


def _forked() -> None:
    assert torch.cuda.device_count() == 1
    child = os.fork()
    if not child:
        torch.zeros(1, device="cuda").item()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_counting_devices_does_not_start_cuda(on_fake_gpu):
    """vLLM's front end counts them, and then forks."""
    on_fake_gpu(_forked)


def _graph() -> None:
    log = []
    function = HOST_FUNCTION(lambda _: log.append("ran"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        FakeGpu().library.cudaLaunchHostFunc(stream, function, None)
    assert log == []
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert log == ["ran"] * 3
    del graph
    torch.cuda.synchronize()
    assert FakeGpu().count("graph_execs") == 0


def test_a_graph_is_captured_and_replayed(on_fake_gpu):
    on_fake_gpu(_graph)
    on_fake_gpu(_graph, order="late:0")


def _events() -> None:
    before = FakeGpu().count("events")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        event.record()
    assert FakeGpu().count("events") == before + 2
    while not events[1].query():
        pass
    assert events[0].elapsed_time(events[1]) >= 0
    del event, events
    assert FakeGpu().count("events") == before


def test_events_are_counted(on_fake_gpu):
    on_fake_gpu(_events)
    on_fake_gpu(_events, order="late:0")


def _out_of_memory() -> None:
    gpu = FakeGpu()
    gpu.fail_malloc(times=1000)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(1 << 30, device="cuda")
    gpu.no_faults()
    torch.empty(1 << 30, device="cuda")


def _broken() -> None:
    FakeGpu().break_device(-1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.ones(3, device="cuda").tolist()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.cuda.synchronize()


@pytest.mark.parametrize("program", [_out_of_memory, _broken])
def test_faults_are_torchs_errors(on_fake_gpu, program):
    on_fake_gpu(program, strict=True)
    on_fake_gpu(program, strict=True, order="late:0")
