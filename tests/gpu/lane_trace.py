# SPDX-License-Identifier: Apache-2.0
"""What every lane was given, read from the fake GPU's trace (``environment(trace=...)``).

What may be queued where, and who may wait for whom (the header of ``vllm_duet/lanes/cuda.py``):

* A graph runs on a stream of the SM group that it was captured on, and on no prefill lane.
* A decode lane runs no layer of the model outside a graph: each decode step is one.
* A stream that is neither a lane, nor the caller's, nor the one to prepare on runs no kernel.
* Only the caller's stream, at a join, and the next prefill wait for a prefill. A decode lane waits
  for the caller's stream and for the preparing one, so for a prefill only by way of its join.
* A prefill does not wait for the decode step that it is launched beside, but for one that zeroes KV
  blocks it does (rule 4).
* The host does not wait for the whole device.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["caller", "decode", "prefill", "prepare", "other"]

CALLER = 0
"""The stream that vLLM's worker runs on, torch's default."""

MAY_WAIT_FOR: dict[Role, set[Role]] = {
    "caller": {"caller", "decode", "prefill", "other"},
    "decode": {"caller", "prepare"},
    "prepare": {"caller"},
    "prefill": {"caller", "prepare", "prefill"},
    "other": {"caller", "decode", "other"},
}
LAYER = "reshape_and_cache"
"""In the name of the kernel that writes a layer's keys and values: one a layer and forward."""
ZEROES_BLOCKS = "zero_kv_blocks"
FIELD = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True, slots=True)
class Item:
    """What was queued on a stream. ``kind``: K kernel, G graph, C copy, S set, R record, W wait."""

    line: int
    stream: int
    kind: str
    fields: dict[str, str]


@dataclass
class LaneTrace:
    """The trace of a process that has had lanes, whole."""

    items: list[Item] = field(default_factory=list)
    group: dict[int, int] = field(default_factory=dict)
    """The green context of each stream, 0 for none."""
    left_alive: set[int] = field(default_factory=set)
    """Streams of green contexts that have not been destroyed."""
    captured_on: set[int] = field(default_factory=set)
    syncs: list[tuple[int, str]] = field(default_factory=list)
    """The line and the words of what the host has waited for."""
    roles: dict[int, Role] = field(default_factory=dict)
    """Of each stream that is not another one."""

    @classmethod
    def read(cls, lines: Iterable[str]) -> LaneTrace:
        trace = cls(group={CALLER: 0})
        for number, line in enumerate(lines):
            what, _, rest = line.partition(" ")
            fields = dict(FIELD.findall(rest))
            if what == "queue":
                trace.items.append(Item(number, int(fields["stream"]), fields["kind"], fields))
            elif what == "stream":
                trace.group[int(fields["id"])] = int(fields["green"])
                if int(fields["green"]):
                    trace.left_alive.add(int(fields["id"]))
            elif line.startswith("destroy stream"):
                trace.left_alive.discard(int(fields["stream"]))
            elif line.startswith("capture begin"):
                trace.captured_on.add(int(fields["stream"]))
            elif what == "sync":
                trace.syncs.append((number, rest))
        trace._find_roles()
        return trace

    def _find_roles(self) -> None:
        """Lanes are the green streams, those that graphs were captured on for decodes. A prefill
        waits for the caller's stream and for the one that it was prepared on."""
        self.roles = {CALLER: "caller"}
        for stream, green in self.group.items():
            if green:
                self.roles[stream] = "decode" if stream in self.captured_on else "prefill"
        for item, recorded in self.waits():
            if self.role(item.stream) == "prefill" and not self.group[recorded.stream]:
                self.roles.setdefault(recorded.stream, "prepare")

    def role(self, stream: int) -> Role:
        return self.roles.get(stream, "other")

    def waits(self) -> list[tuple[Item, Item]]:
        """Each wait with the record that it is for, the last before it of the same event."""
        found, recorded = [], {}
        for item in self.items:
            if item.kind == "R":
                recorded[item.fields["event"]] = item
            elif item.kind == "W":
                found.append((item, recorded[item.fields["event"]]))
        return found

    def forks(self) -> list[tuple[Item, list[Item]]]:
        """Each time that a prefill is prepared, with what decode lanes were given since the point
        that it waits for: the decode step that it runs beside, empty where it comes after it."""
        return [
            (item, [i for i in self._between(fork, item) if self.role(i.stream) == "decode"])
            for item, fork in self.waits()
            if self.role(item.stream) == "prepare"
        ]

    def _between(self, first: Item, last: Item) -> list[Item]:
        begin, end = (bisect(self.items, i.line, key=lambda i: i.line) for i in (first, last))
        return self.items[begin : end - 1]

    def faults(self, begin: int = 0, end: int | None = None) -> list[str]:
        """What is not as the header says, a sentence each, from line ``begin`` up to ``end``."""
        lines = range(begin, sys.maxsize if end is None else end)
        faults = []
        for item in self.items:
            if item.line in lines:
                faults += self._faults_of(item)
        for item, recorded in self.waits():
            if item.line not in lines or item.stream == recorded.stream:
                continue
            role, waits_for = self.role(item.stream), self.role(recorded.stream)
            if waits_for not in MAY_WAIT_FOR[role]:
                faults.append(
                    f"line {item.line}: stream {item.stream}, {role}, waits for stream"
                    f" {recorded.stream}, {waits_for}"
                )
        for item, decodes in self.forks():
            zeroes = any(ZEROES_BLOCKS in decode.fields.get("name", "") for decode in decodes)
            if item.line in lines and zeroes:
                faults.append(
                    f"line {item.line}: a prefill is prepared beside a step that zeroes KV blocks"
                )
        for line, words in self.syncs:
            if line in lines and words == "device":
                faults.append(f"line {line}: the host waits for the whole device")
        return faults

    def _faults_of(self, item: Item) -> Iterable[str]:
        role, where = self.role(item.stream), f"line {item.line}: stream {item.stream}"
        if item.kind == "G":
            for stream in filter(None, item.fields["captured_on"].split(",")):
                if self.group[int(stream)] != self.group[item.stream]:
                    yield f"{where} is given a graph that was captured on stream {stream}"
            if role == "prefill":
                yield f"{where}, prefill, is given a graph"
        if item.kind in "KG" and role == "other":
            yield f"{where} is no lane and is given {item.fields.get('name', 'a graph')}"
        if role == "decode" and item.kind == "K" and LAYER in item.fields["name"]:
            yield f"{where}, decode, is given a layer outside a graph"

    def layers(self, begin: int, end: int) -> Counter[Role]:
        """How many layers of forwards each kind of stream was given outside graphs."""
        return Counter(
            self.role(item.stream)
            for item in self.items
            if begin <= item.line < end and item.kind == "K" and LAYER in item.fields["name"]
        )

    def graphs(self, begin: int, end: int) -> Counter[Role]:
        """How many graphs each kind of stream was given."""
        return Counter(
            self.role(item.stream)
            for item in self.items
            if begin <= item.line < end and item.kind == "G"
        )

    def joins(self, begin: int, end: int) -> int:
        """How often the caller's stream has waited for a prefill."""
        return sum(
            begin <= item.line < end
            and self.role(item.stream) == "caller"
            and self.role(recorded.stream) == "prefill"
            for item, recorded in self.waits()
        )

    def beside(self, begin: int, end: int) -> int:
        """How many prefills do not wait for the decode step that they were launched with."""
        return sum(
            begin <= item.line < end and any(decode.kind == "G" for decode in decodes)
            for item, decodes in self.forks()
        )
