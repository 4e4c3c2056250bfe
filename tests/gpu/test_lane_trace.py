# SPDX-License-Identifier: Apache-2.0
"""The reader of the fake GPU's trace notices what it is there for."""

from __future__ import annotations

import pytest
from gpu.lane_trace import LaneTrace

STREAMS = """\
stream id=1 green=0
stream id=2 green=0
stream id=3 green=1
stream id=4 green=2
capture begin id=1 stream=3 mode=1
capture begin id=2 stream=2 mode=1
""".splitlines()
"""1 is to prepare on, 2 any other, 3 a decode lane and 4 a prefill lane."""


def queue(stream: int, kind: str, **fields: object) -> str:
    return f"queue stream={stream} kind={kind} " + " ".join(f"{k}={v}" for k, v in fields.items())


SERVED = [
    queue(0, "R", event="fork"),
    queue(1, "W", event="fork"),
    queue(1, "K", name="prepare"),
    queue(1, "R", event="prepared"),
    queue(0, "R", event="caller"),
    queue(3, "W", event="caller"),
    queue(3, "W", event="prepared"),
    queue(3, "G", captured_on=3),
    queue(3, "R", event="decoded"),
    queue(0, "W", event="decoded"),
    queue(4, "W", event="prepared"),
    queue(4, "K", name="reshape_and_cache"),
    queue(4, "R", event="filled"),
    queue(0, "W", event="filled"),
    queue(0, "K", name="sample"),
    queue(0, "G", captured_on=2),
]


def test_what_is_right_has_no_faults():
    trace = LaneTrace.read(STREAMS + SERVED)
    assert trace.faults() == []
    assert trace.roles == {0: "caller", 1: "prepare", 3: "decode", 4: "prefill"}
    assert trace.left_alive == {3, 4}
    assert trace.joins(0, 100) == 1 and trace.layers(0, 100) == {"prefill": 1}
    assert trace.beside(0, 100) == 0  # what was prepared came before the step


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (queue(3, "W", event="filled"), "stream 3, decode, waits for stream 4, prefill"),
        (queue(1, "W", event="filled"), "stream 1, prepare, waits for stream 4, prefill"),
        (queue(4, "W", event="decoded"), "stream 4, prefill, waits for stream 3, decode"),
        (queue(0, "G", captured_on=3), "stream 0 is given a graph that was captured on stream 3"),
        (
            queue(3, "G", captured_on="3,2"),
            "stream 3 is given a graph that was captured on stream 2",
        ),
        (queue(4, "G", captured_on=4), "stream 4, prefill, is given a graph"),
        (queue(2, "K", name="expert"), "stream 2 is no lane and is given expert"),
        (queue(3, "K", name="reshape_and_cache"), "stream 3, decode, is given a layer outside"),
        ("sync device", "the host waits for the whole device"),
    ],
)
def test_what_is_wrong_is_noticed(wrong, fault):
    (found,) = LaneTrace.read([*STREAMS, *SERVED, wrong]).faults()
    assert fault in found


def prepared(after_the_step: bool) -> list[str]:
    """A decode step that zeroes blocks, and a prefill prepared beside it or after it."""
    fork = [queue(0, "R", event="fork")]
    step = [
        queue(3, "K", name="_zero_kv_blocks_kernel"),
        queue(3, "G", captured_on=3),
        queue(3, "R", event="decoded"),
        queue(0, "W", event="decoded"),
    ]
    launch = [queue(1, "W", event="fork"), queue(1, "K", name="prepare")]
    return step + fork + launch if after_the_step else fork + step + launch


def test_a_prefill_beside_a_step_that_zeroes_blocks_is_noticed():
    trace = LaneTrace.read([*STREAMS, *SERVED, *prepared(after_the_step=True)])
    assert trace.faults() == [] and trace.beside(0, 100) == 0
    trace = LaneTrace.read([*STREAMS, *SERVED, *prepared(after_the_step=False)])
    (found,) = trace.faults()
    assert "prepared beside a step that zeroes KV blocks" in found
    assert trace.beside(0, 100) == 1


def test_streams_that_are_destroyed_are_not_left():
    trace = LaneTrace.read([*STREAMS, "destroy stream=3", "destroy stream=2"])
    assert trace.left_alive == {4}


def test_only_the_lines_that_are_asked_for():
    lines = [*STREAMS, *SERVED, "sync device"]
    assert LaneTrace.read(lines).faults(end=len(lines) - 1) == []
