# SPDX-License-Identifier: Apache-2.0
"""Accesses of the same memory that nothing orders, from a trace of the fake GPU.

    python tests/fake_gpu/races.py TRACE TRITON_CACHE

Two accesses that overlap race if one writes and neither's item comes after the other's by streams,
events, graphs or what the host waited for: vector clocks, one entry a stream (Lamport 1978,
Mattern 1989). It does not matter in which order they happened to run.

What is seen: copies and fills; torch's elementwise kernels; Triton's, whose TTIR says which
arguments are stored to and loaded from; host functions that say so (fakecuda_access). Kernels that
compute (real_kernels.py) say so of each byte. What is not seen: of other kernels, products,
attention, indexing, and how much of an argument a Triton kernel touches beyond its first element;
nodes of one graph among themselves; host code's own accesses. All host threads count as one: what
one of them waited for, all are taken to know.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_gpu.trace import Access, Line, read_trace

PAGE_BYTES = 4096
MOST_PAGES = 64
"""A longer access is kept apart, not by page."""

KINDS = {"C": "copy", "S": "fill", "H": "host function", "G": "graph", "K": "kernel", "E": "empty"}

Clock = dict[int, int]
"""By stream, up to which position everything has run."""


class Arguments(NamedTuple):
    """Ordinals of a kernel's arguments."""

    stored: frozenset[int]
    loaded: frozenset[int]


def triton_kernels(cache: Path) -> dict[str, Arguments]:
    """What each kernel in Triton's cache does with its arguments, by the trace's ``code``."""
    found = {}
    for cubin in cache.glob("*/*.cubin"):
        elf = cubin.read_bytes()
        code = zlib.adler32(elf[: int.from_bytes(elf[40:48], "little")])  # up to e_shoff
        found[f"{code:x}"] = arguments_of(cubin.with_suffix(".ttir").read_text())
    return found


_HEAD = re.compile(r"tt\.func public @\w+\((.*?)\) attributes", re.S)
_MEMORY = re.compile(r"\s*(?:%[\w#:]+ = )?tt\.(store|load|atomic\w*) (%[\w#]+)")
_POINTER = re.compile(
    r"\s*(%\w+)(?::\d+)? = tt\.(?:addptr|splat|broadcast|bitcast|expand_dims) (%[\w#]+)"
)


def arguments_of(ttir: str) -> Arguments:
    head = _HEAD.search(ttir)
    names = re.findall(r"(%\w+): ", head[1]) if head else []
    origin = {name: i for i, name in enumerate(names)}
    stored, loaded = set(), set()
    for line in ttir.splitlines():
        if match := _MEMORY.match(line):
            if match[2] in origin:
                (loaded if match[1] == "load" else stored).add(origin[match[2]])
        elif (match := _POINTER.match(line)) and match[2] in origin:
            origin[match[1]] = origin[match[2]]
    return Arguments(frozenset(stored), frozenset(loaded))


class Item(NamedTuple):
    stream: int
    position: int
    clock: Clock


class Touch(NamedTuple):
    item: Item
    who: str
    line: int


class Race(NamedTuple):
    first: Touch
    second: Touch
    address: int

    def __str__(self) -> str:
        sides = [f"{t.who} (stream {t.item.stream}, line {t.line})" for t in self[:2]]
        return f"{sides[0]} and {sides[1]} at {self.address:#x}"


class Memory:
    """Who touched what last, as far as a later item may still race with it."""

    def __init__(self) -> None:
        Kept = dict[tuple[int, int, int, bool], Touch]  # by begin, end, stream, whether it writes
        self._pages: dict[int, Kept] = {}
        self._long: Kept = {}

    def touch(self, access: Access, is_write: bool, touch: Touch, floor: Clock) -> Iterator[Race]:
        begin, end = access.address, access.address + access.num_bytes
        first, last = begin // PAGE_BYTES, (end - 1) // PAGE_BYTES
        is_long = last - first >= MOST_PAGES
        pages = [p for p in list(self._pages) if first <= p <= last] if is_long else []
        pages = pages or list(range(first, last + 1)[:MOST_PAGES])
        clock, stream = touch.item.clock, touch.item.stream
        seen = set()
        for kept in [self._long, *(self._pages.get(p, {}) for p in pages)]:
            for key, other in list(kept.items()):
                o_begin, o_end, o_stream, o_writes = key
                position = other.item.position
                if position <= floor.get(o_stream, 0):
                    del kept[key]
                elif (
                    o_stream != stream
                    and (is_write or o_writes)
                    and o_begin < end
                    and begin < o_end
                    and clock.get(o_stream, 0) < position
                    and key not in seen
                ):
                    seen.add(key)
                    yield Race(other, touch, max(begin, o_begin))
        key = (begin, end, stream, is_write)
        if is_long:
            self._long[key] = touch
        else:
            for page in pages:
                self._pages.setdefault(page, {})[key] = touch


class Order:
    """Which item comes after which."""

    def __init__(self) -> None:
        self.items: dict[int, Item] = {}  # by number, until they have run
        self._host: Clock = {}
        self._last: dict[int, Clock] = {}
        self._clocks: dict[int, dict[int, Clock]] = {}  # by stream and position
        self._waiting: dict[int, dict[int, Item]] = {}  # by stream, in its order
        self.floor: Clock = {}
        """What all that will still run comes after."""

    def queue(self, values: Mapping[str, str]) -> None:
        stream, position = int(values["stream"]), int(values["position"])
        clock = dict(self._last.get(stream, {}))
        _join(clock, self._host)
        for point in filter(None, values["after"].split(",")):
            other, at = map(int, point.split(":"))
            _join(clock, self._clocks.get(other, {}).get(at, {}))
        clock[stream] = position
        self._last[stream] = clock
        self._clocks.setdefault(stream, {})[position] = clock
        number = int(values["n"])
        self.items[number] = item = Item(stream, position, clock)
        self._waiting.setdefault(stream, {})[number] = item

    def running(self, number: int) -> Item:
        """The item that runs. All before it in its stream have run, then."""
        waiting = self._waiting[self.items[number].stream]
        for earlier in [n for n in waiting if n < number]:
            del waiting[earlier], self.items[earlier]
        return self.items[number]

    def sync(self, stream: int, position: int) -> None:
        clocks = self._clocks.get(stream, {})
        if position not in clocks:
            return  # known before
        _join(self._host, clocks[position])
        for known in [p for p in clocks if p <= position]:
            del clocks[known]
        waiting = self._waiting.get(stream, {})
        for number in [n for n, item in waiting.items() if item.position <= position]:
            del waiting[number], self.items[number]
        heads = [next(iter(w.values())).clock for w in self._waiting.values() if w]
        self.floor = {
            s: min([p, *(head.get(s, 0) for head in heads)]) for s, p in self._host.items()
        }


def _join(into: Clock, other: Clock) -> None:
    for stream, position in other.items():
        if position > into.get(stream, 0):
            into[stream] = position


class Found(NamedTuple):
    races: list[Race]
    num_writes: int
    num_reads: int

    def after(self, mark: int) -> list[Race]:
        """Those of which the second access is beyond line ``mark`` of the trace."""
        return [race for race in self.races if race.second.line > mark]

    def kinds(self) -> Counter[tuple[str, str]]:
        """How often each pair of names raced."""
        return Counter((race.first.who, race.second.who) for race in self.races)


def find_races(lines: Iterable[Line], kernels: Mapping[str, Arguments] | None = None) -> Found:
    order, memory = Order(), Memory()
    races: list[Race] = []
    seen: Counter[bool] = Counter()
    names: dict[tuple[str, str], str] = {}  # of host functions, by item and node
    for line in lines:
        if line.word == "queue":
            order.queue(line.values)
        elif line.word == "sync":
            order.sync(int(line.values["stream"]), int(line.values["position"]))
        elif line.word in ("run", "name", "access"):
            which = line.values["n"], line.values.get("node", "-1")
            if "name" in line.values:
                names[which] = line.values["name"]
            item = order.running(int(line.values["n"]))
            who = names.get(which) or KINDS[line.values.get("kind", "H")]
            known = (kernels or {}).get(line.values.get("code", ""))
            for access in line.accesses:
                for is_write in _effects(access, known):
                    seen[is_write] += 1
                    touch = Touch(item, who, line.number)
                    races += memory.touch(access, is_write, touch, order.floor)
    return Found(races, seen[True], seen[False])


def _effects(access: Access, known: Arguments | None) -> Iterator[bool]:
    """Whether the access writes; twice if it reads, too."""
    if access.what in "rw":
        yield access.what == "w"
    elif known is not None:
        if int(access.what) in known.loaded:
            yield False
        if int(access.what) in known.stored:
            yield True


def main(trace: Path, cache: Path) -> None:
    kernels = triton_kernels(cache)
    found = find_races(read_trace(trace), kernels)
    print(
        f"{found.num_writes} writes and {found.num_reads} reads seen, {len(kernels)} Triton"
        f" kernels known, {len(found.kinds())} kinds of race"
    )
    for (first, second), count in found.kinds().most_common(20):
        example = next(r for r in found.races if (r.first.who, r.second.who) == (first, second))
        print(f"{count} times: {example}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
