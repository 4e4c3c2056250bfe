# SPDX-License-Identifier: Apache-2.0
"""Reading the fake GPU's trace.

A line is a word and KEY=VALUE, then for what was run the memory that it touched, as
WHAT:ADDRESS+BYTES. The words that matter here:

    stream id flags priority green first_sm sms          a stream was made; green 0: all SMs
    green id first_sm sms queues limit scope             a green context was made
    destroy stream | green
    queue n stream position green after kind ...         the n-th item of all was put on a stream
        kind K kernel (grid, name), C copy, S fill (to, from, bytes), H host function,
        G graph (nodes, captured_on), R record, W wait (event, record)
        after: points that it waits for, as STREAM:POSITION, beside what is before it in its stream
    run n [node] kind ...                                it ran, or a graph's node did
    name n node name                                     a host function said what it is
    access n node                                        and what it touches
    sync stream position                                 the host knows that this much has run
    capture id node stream green kind name               a node was captured
    mark name                                            a test's own line
    report ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Access(NamedTuple):
    """``what``: "r", "w", or the ordinal of the kernel's argument that points there."""

    what: str
    address: int
    num_bytes: int


class Line(NamedTuple):
    number: int
    word: str
    values: dict[str, str]
    accesses: list[Access]


_ACCESS = re.compile(r" (\w+):0x([0-9a-f]+)\+(\d+)")
_VALUE = re.compile(r"(\w+)=(\S*)")


def read_trace(path: Path) -> Iterator[Line]:
    with path.open() as lines:
        for number, text in enumerate(lines, 1):
            word, _, rest = text.partition(" ")
            accesses = []
            if word in ("run", "access"):
                accesses = [
                    Access(what, int(address, 16), int(num_bytes))
                    for what, address, num_bytes in _ACCESS.findall(text)
                ]
            yield Line(number, word.strip(), dict(_VALUE.findall(rest)), accesses)
