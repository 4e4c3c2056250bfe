# SPDX-License-Identifier: Apache-2.0
"""A model of the device for a scheduler that runs alone: KV slots, request rows, two lanes.

There is no neural network. The value of a KV slot is a hash of its token, its position and
every slot value that attention would read for it, and a sampled token is a hash of all the
values that were read. One wrong block, stale slot, lost write or wrong order therefore
changes the token, as it may in a real model. What a request's tokens should be follows from
its own tokens alone: see :class:`Answer`.

A prefill on its lane may run before, during or after any decode step between its launch and
its join. :class:`Lane` draws when, as an adversary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_duet.plan import Join, JoinedPrefill, PrefillLaunch, directive_of

VOCABULARY = 61
NEVER_WRITTEN = -1


def slot_value(read: tuple[tuple[int, ...], ...], token: int, position: int) -> int:
    """What is written to the slots of a token, from the values read before, by group."""
    return hash((read, token, position))


def sampled_token(read: tuple[tuple[int, ...], ...]) -> int:
    return hash(read) % VOCABULARY


class Answer:
    """The tokens that a request with this prompt has to get: a pure function of it.

    ``windows`` are the attention windows of the KV cache groups; 0 is full attention.
    """

    def __init__(self, prompt: Sequence[int], windows: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self._prompt_length = len(prompt)
        self._windows = windows
        self._values: list[int] = []

    def __getitem__(self, index: int) -> int:
        """The answer's token number ``index``."""
        while len(self.tokens) <= self._prompt_length + index:
            for position in range(len(self._values), len(self.tokens)):
                read = self._read(position)
                self._values.append(slot_value(read, self.tokens[position], position))
            self.tokens.append(sampled_token(self._read(len(self.tokens))))
        return self.tokens[self._prompt_length + index]

    def _read(self, end: int) -> tuple[tuple[int, ...], ...]:
        # Sampling at the last position reads that position, too.
        at_end = end == len(self._values) == len(self.tokens)
        query = end - 1 if at_end else end
        return tuple(
            tuple(self._values[first_read(window, query) : end]) for window in self._windows
        )


def first_read(window: int, position: int) -> int:
    """The first position that a query at ``position`` attends to."""
    return max(0, position - window + 1) if window else 0


@dataclass
class Row:
    """What the model runner's tensors hold for one request (vllm/v1/worker/gpu/states.py)."""

    prefill_tokens: list[int] = field(default_factory=list)
    block_table: list[list[int]] = field(default_factory=list)
    num_computed: int = 0
    last_sampled: int = 0


@dataclass
class Query:
    """The part of one request in a batch, as it was when the batch was prepared."""

    request_id: str
    row: Row
    start: int
    num_tokens: int
    prefill_tokens: list[int]
    block_table: list[list[int]]


class Prefill:
    """A launched prefill; ``run`` goes one position further at every ``next``."""

    def __init__(
        self, launch: PrefillLaunch, queries: list[Query], steps: Iterator[None], age_limit: int
    ) -> None:
        self.launch = launch
        self.queries = queries
        self.steps = steps
        self.age_limit = age_limit
        self.result: ModelRunnerOutput | None = None
        self.fails_after: int | None = None
        self.error: str | None = None
        self.ended = False

    def advance(self, positions: int) -> int:
        """Run for so many positions at most; returns how many are left."""
        while positions and not self.ended:
            positions -= 1
            if self.fails_after is not None:
                self.fails_after -= 1
                if self.fails_after < 0:
                    self.error, self.ended = "out of memory", True
                    break
            self.ended = next(self.steps, "ended") == "ended"
        return positions


class Device:
    """Executes SchedulerOutputs in order, and prefills when ``random`` says so."""

    def __init__(
        self,
        num_rows: int,
        num_blocks: int,
        block_size: int,
        windows: Sequence[int],
        random: Random,
    ) -> None:
        self.windows = windows
        self.block_size = block_size
        self.rows = [Row() for _ in range(num_rows)]
        self.row_of: dict[str, int] = {}
        self.free_rows = list(range(num_rows))
        self.lane: deque[Prefill] = deque()
        """Launched, and not joined on the device."""
        self.in_flight: deque[Prefill] = deque()
        """Launched, and the scheduler has not seen the join."""
        self.fail_next = False
        self.num_tokens = 0
        self.seen_beside = 0
        self._slots = [[NEVER_WRITTEN] * (num_blocks * block_size) for _ in windows]
        self._random = random

    # A step: the host's part in order, then the device's part when it likes.

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        directive = directive_of(output)
        batch = self._prepare(output)
        launched = None
        if directive is not None and directive.launch is not None:
            launched = self._launch(directive.launch)
            self.in_flight.append(launched)
            if not getattr(directive.launch, "after_decode", False):
                # It waits for what came before this step, and not for its decode part.
                self.lane.append(launched)
                launched = None
        self._let_the_lane_run()
        result = self._run_now(batch)
        if launched is not None:
            self.lane.append(launched)
        self._let_the_lane_run()
        if directive is not None and directive.join is not None:
            self._join(result, directive.join)
        return result

    def _prepare(self, output: SchedulerOutput) -> list[Query]:
        """The host's part: rows and block tables, in the model runner's order."""
        for request_id in sorted(output.finished_req_ids | (output.preempted_req_ids or set())):
            self._remove(request_id)
        for new in output.scheduled_new_reqs:
            self._remove(new.req_id)
            assert self.free_rows, "No free indices"
            index = self.free_rows.pop()
            self.row_of[new.req_id] = index
            row = self.rows[index]
            row.prefill_tokens = list(new.prefill_token_ids)
            row.block_table = [list(group) for group in new.block_ids]
            row.num_computed, row.last_sampled = new.num_computed_tokens, -1
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            row = self.rows[self.row_of[request_id]]
            for table, more in zip(row.block_table, blocks or (), strict=blocks is not None):
                table.extend(more)
        rows = {i: self.rows[self.row_of[i]] for i in output.num_scheduled_tokens}
        return self._writers_first(
            [
                Query(
                    request_id=i,
                    row=row,
                    start=row.num_computed,
                    num_tokens=output.num_scheduled_tokens[i],
                    prefill_tokens=row.prefill_tokens,
                    block_table=[list(table) for table in row.block_table],
                )
                for i, row in rows.items()
            ]
        )

    def _writers_first(self, batch: list[Query]) -> list[Query]:
        """Within one batch a layer writes every slot before it reads any, whatever the order
        of the requests. Here they take turns, so whoever is read goes first."""
        ordered: list[Query] = []
        reads = [self._blocks_of(query, write=False) for query in batch]
        writes = [self._blocks_of(query, write=True) for query in batch]
        left = list(range(len(batch)))
        while left:
            first = next(
                i for i in left if all(reads[i].isdisjoint(writes[j]) for j in left if j != i)
            )
            left.remove(first)
            ordered.append(batch[first])
        return ordered

    def _blocks_of(self, query: Query, write: bool) -> set[int]:
        """Those that it writes to, or those that it finds written before."""
        begin = query.start // self.block_size
        blocks: set[int] = set()
        for table, window in zip(query.block_table, self.windows, strict=True):
            first = first_read(window, query.start) // self.block_size
            blocks.update(table[begin:] if write else table[first:begin])
        return blocks

    def forget_everything(self) -> None:
        """As when the weights change: whoever reads an old value gets a wrong token."""
        for slots in self._slots:
            slots[:] = [NEVER_WRITTEN] * len(slots)

    def _remove(self, request_id: str) -> None:
        if (index := self.row_of.get(request_id)) is None:
            return
        for prefill in self.lane:
            assert all(query.row is not self.rows[index] for query in prefill.queries), (
                f"the row of {request_id} is given back while its prefill is in flight"
            )
        del self.row_of[request_id]
        self.free_rows.append(index)

    def _run_now(self, batch: list[Query]) -> ModelRunnerOutput:
        result = ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])
        for query in batch:
            for _ in self._positions(query):
                pass
            self._sample([query], result)
            if self.lane and self._random.random() < 0.1:
                self._let_the_lane_run()
        return result

    def _positions(self, query: Query) -> Iterator[None]:
        known = query.prefill_tokens
        for position in range(query.start, query.start + query.num_tokens):
            token = known[position] if position < len(known) else query.row.last_sampled
            value = slot_value(self._read(query, position, position), token, position)
            for slots, table in zip(self._slots, query.block_table, strict=True):
                block, offset = divmod(position, self.block_size)
                slots[table[block] * self.block_size + offset] = value
            self.num_tokens += 1
            yield

    def _read(self, query: Query, position: int, end: int) -> tuple[tuple[int, ...], ...]:
        size = self.block_size
        read = []
        for slots, table, window in zip(self._slots, query.block_table, self.windows, strict=True):
            first = first_read(window, position)
            values: list[int] = []
            for block in range(first // size, -(-end // size)):
                values += slots[table[block] * size : (table[block] + 1) * size]
            skipped = first // size * size
            read.append(tuple(values[first - skipped : end - skipped]))
        return tuple(read)

    def _sample(self, queries: list[Query], result: ModelRunnerOutput) -> None:
        for query in queries:
            end = query.start + query.num_tokens
            tokens = []
            if end >= len(query.prefill_tokens):
                tokens = [sampled_token(self._read(query, end - 1, end))]
                query.row.last_sampled = tokens[0]
            query.row.num_computed = end
            result.req_id_to_index[query.request_id] = len(result.req_ids)
            result.req_ids.append(query.request_id)
            result.sampled_token_ids.append(tokens)

    # The prefill lane

    def _launch(self, launch: PrefillLaunch) -> Prefill:
        queries = self._prepare(launch.output)
        prefill = Prefill(launch, queries, iter(()), self._random.choice([0, 0, 1, 2, 3, 6, 9]))
        prefill.steps = self._prefill_steps(prefill)
        if self.fail_next:
            self.fail_next = False
            prefill.fails_after = self._random.randrange(launch.output.total_num_scheduled_tokens)
        return prefill

    def _prefill_steps(self, prefill: Prefill) -> Iterator[None]:
        for query in prefill.queries:
            yield from self._positions(query)
        result = ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])
        self._sample(prefill.queries, result)
        prefill.result = result

    def _let_the_lane_run(self) -> None:
        """Prefills run in the order of their launches, as far as is drawn."""
        positions = self._random.choice([0, 0, 1, 4, 16, 1000])
        for prefill in self.lane:
            positions = prefill.advance(positions)

    def _join(self, result: ModelRunnerOutput, join: Join) -> None:
        if not self.lane:
            return
        prefill = self.lane[0]
        if join is Join.WAIT or prefill.age_limit <= 0:
            prefill.advance(1_000_000)
        prefill.age_limit -= 1
        if not prefill.ended or (join is Join.IF_DONE and self._random.random() < 0.3):
            return
        self.lane.popleft()
        result.duet = JoinedPrefill(prefill.launch.launch_id, prefill.result, prefill.error)
