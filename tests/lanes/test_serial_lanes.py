# SPDX-License-Identifier: Apache-2.0
"""When the serial lanes run a prefill, and what they tell of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import get_args

import pytest

from vllm_duet.lanes.serial import SerialLanePair, Timing

TIMINGS = get_args(Timing)


@pytest.fixture
def lanes(request: pytest.FixtureRequest) -> Iterator[SerialLanePair]:
    timing, hold_steps = getattr(request, "param", ("interleaved", 0))
    pair = SerialLanePair(timing, hold_steps)
    yield pair
    pair.shutdown()


def serve(lanes: SerialLanePair, layers: int = 3) -> list[str]:
    """One prefill, and decode steps beside it until it is done; what ran, in order."""
    ran: list[str] = []

    def prefill() -> str:
        for layer in range(layers):
            lanes.give_way()
            ran.append(f"layer {layer}")
        with lanes.exclusive():
            ran.append("sampled")
        return "its result"

    launched = lanes.launch(prefill, 100)
    for step in range(1000):
        with lanes.exclusive(), lanes.decoding(32):
            ran.append(f"decode {step}")
        if launched.done():
            break
    ran.append("join")
    assert launched.result() == "its result"
    return ran


@pytest.mark.parametrize("lanes", [("early", 2)], indirect=True)
def test_early_is_before_every_step(lanes: SerialLanePair) -> None:
    prefill = ["layer 0", "layer 1", "layer 2", "sampled"]
    assert serve(lanes) == [*prefill, "decode 0", "decode 1", "decode 2", "join"]


@pytest.mark.parametrize("lanes", [("late", 1)], indirect=True)
def test_late_is_after_every_step(lanes: SerialLanePair) -> None:
    prefill = ["layer 0", "layer 1", "layer 2", "sampled"]
    assert serve(lanes) == ["decode 0", "decode 1", "join", *prefill]


def test_interleaved_is_a_layer_between_two_steps(lanes: SerialLanePair) -> None:
    assert serve(lanes) == [
        *("decode 0", "decode 1", "layer 0", "decode 2", "layer 1", "decode 3"),
        *("layer 2", "sampled", "join"),
    ]


def test_interleaved_goes_to_its_end_at_the_join(lanes: SerialLanePair) -> None:
    ran = []

    def prefill() -> None:
        for layer in range(5):
            lanes.give_way()
            ran.append(layer)

    lanes.launch(prefill, 100).result()
    assert ran == [0, 1, 2, 3, 4]
    first, second = (lanes.launch(prefill, 100) for _ in range(2))
    assert not first.done() and not first.done()
    first.result()
    assert not second.done() and not second.done()
    second.result()
    assert ran == 3 * [0, 1, 2, 3, 4]


def test_a_shutdown_finds_an_interleaved_prefill_half_way(lanes: SerialLanePair) -> None:
    ended = threading.Event()

    def prefill() -> None:
        lanes.give_way()
        ended.set()

    lanes.launch(prefill, 100).done()
    lanes.launch(prefill, 100)
    assert not ended.is_set()
    lanes.shutdown()
    assert ended.is_set()


@pytest.mark.parametrize("lanes", [(timing, 1) for timing in TIMINGS], indirect=True)
def test_a_failure_is_for_the_join(lanes: SerialLanePair) -> None:
    def prefill() -> None:
        lanes.give_way()
        raise ZeroDivisionError

    launched = lanes.launch(prefill, 100)
    while not launched.done():
        pass
    with pytest.raises(ZeroDivisionError):
        launched.result()
    assert lanes.is_usable() and launched.busy_ms() > 0
    assert serve(lanes)[-1] in ("join", "sampled")


# How often the clock is read from when a prefill runs to when it does not, less the pauses.
TICKS = {"early": 1, "late": 1, "interleaved": 2}


@pytest.mark.parametrize("lanes", [(timing, 2) for timing in TICKS], indirect=True)
def test_the_lanes_tell_how_busy_they_were(lanes: SerialLanePair, monkeypatch) -> None:
    milliseconds = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(milliseconds) / 1000)
    launched = lanes.launch(lanes.give_way, 100)
    for _ in range(3):
        with lanes.decoding(32):
            pass
    assert lanes.decode_busy_ms() == pytest.approx(3)
    assert lanes.decode_busy_ms() == 0
    while not launched.done():
        pass
    launched.result()
    assert launched.busy_ms() == pytest.approx(TICKS[lanes.timing])
