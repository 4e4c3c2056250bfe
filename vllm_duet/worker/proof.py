# SPDX-License-Identifier: Apache-2.0
"""Whether a split step computes what whole steps do: the same batch both ways, on every lane.

What may live here: running hand-made steps in the worker, and comparing their logits and what
they leave in the KV cache. It runs before the first request, and never waits for a lane without
end: a kernel that waits for more SMs than its group has would never come to its own.

How much two right results may differ, the model itself tells. A step's numbers depend on what
else is in its batch, since kernels then add up in another order. So the batch runs whole in two
ways, all in one step, and decodes and prompts apart; a split step may differ from either by
somewhat more than these two do from each other.

Each split runs three times. First every step ends before the next begins, and the prefill before
its join: then both lanes are known to come to an end. Then steps queue up on the device as in
vLLM's own loop, and at last the join, too, behind the prefill: what nobody waits for shows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import inf
from typing import Any, NamedTuple

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_duet.hand_made import HandMadeRequest, HandMadeSteps
from vllm_duet.lanes import LaneError
from vllm_duet.plan import Join, JoinedPrefill, PrefillLaunch, StepDirective

TIMEOUT_S = 30.0
"""For one split step of less than a thousand tokens."""

MOST_DECODES = 12
CONTEXTS = 20, 200
"""Tokens before the shortest decode and before the longest."""
MOST_PREFILL = 768
"""Tokens of the two prompts."""
DECODE_STEPS = 3
"""Beside the prefill."""
ROOM = DECODE_STEPS + 2
"""Tokens that a request makes."""

ROUNDING = {torch.float32: 2**-7, torch.float16: 2**-7, torch.bfloat16: 2**-4}
"""No less than this is taken for an error: eight times the relative distance of two numbers of
such a type; float32 may be multiplied as TF32."""
NOISE_FACTOR = 4.0
"""How much more than two whole runs a split one may differ by. Each is one draw of what rounding
does."""
NEVER_ROUNDING = 0.5
"""Of its own size. Whatever two whole runs differ by, this is an error."""


class Proof(NamedTuple):
    """``obstacle`` says in a clause what is wrong with split steps; ``None``, nothing. ``runs``:
    they came to their end."""

    obstacle: str | None
    runs: bool = True


def prove_lanes(
    worker: Any, steps: HandMadeSteps, splits: Mapping[int, int], most_decodes: int
) -> Proof:
    """Compare split steps with whole ones on each of ``splits``, the SMs of the prefill lane by
    those of the decode lane, which takes ``most_decodes`` requests.

    Afterwards the requests are gone, and a lane that has not ended holds nothing else up.
    """
    try:
        with _streams_of_its_own(worker.model_runner):
            batch = _Batch(worker, steps, most_decodes)
            try:
                return Proof(batch.difference(splits))
            finally:
                batch.end()
    except LaneError as error:
        return Proof(str(error), runs=False)
    except Exception as error:
        said = str(error).partition("\n")[0].rstrip(".")
        what = f"a split step failed when it was tried: {type(error).__name__}: {said}"
        return Proof(what, runs=False)


@contextmanager
def _streams_of_its_own(runner: Any) -> Iterator[None]:
    """What waits for a lane that does not end is then nothing that serving needs."""
    if runner.device.type == "cpu":
        yield
        return
    caller, own = torch.cuda.current_stream(runner.device), torch.cuda.Stream(runner.device)
    own.wait_stream(caller)
    copies, runner.output_copy_stream = runner.output_copy_stream, torch.cuda.Stream(runner.device)
    try:
        with torch.cuda.stream(own):
            yield
        if own.query():
            caller.wait_stream(own)
    finally:
        runner.output_copy_stream = copies


class _Results:
    """What a run of the batch has computed: of each request the logits [vocabulary] of every
    token that it sampled, and the token; of each layer its KV blocks [blocks, ...]."""

    def __init__(self, num_requests: int) -> None:
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(num_requests)]
        self.tokens: list[list[int]] = [[] for _ in range(num_requests)]
        self.kv: list[torch.Tensor] = []

    def same_until(self, other: _Results, request: int) -> int:
        """How many tokens of a request are the same. Two that are nearly as likely may change
        places; what comes after them cannot be compared."""
        pairs = zip(self.tokens[request], other.tokens[request], strict=True)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(self.tokens[request]))

    def is_like(self, other: _Results) -> bool:
        """Whether each request has as many of everything."""
        counts = [[*map(len, r.tokens), *map(len, r.logits)] for r in (self, other)]
        return counts[0] == counts[1]


class _Queued(NamedTuple):
    """A step's output, whether the device has come to its end (``None``: it has), what it is."""

    output: Any
    is_done: Callable[[], bool] | None
    what: str


class _Batch:
    """Some decodes, a new prompt, and one of which a part has been computed."""

    def __init__(self, worker: Any, steps: HandMadeSteps, most_decodes: int) -> None:
        """Computes what all runs begin with.

        Raises:
            LaneError: there is no room for such a batch.
        """
        self._worker, self._runner, self._steps = worker, worker.model_runner, steps
        self._launches = 0
        self._queued = deque[_Queued]()
        self._depth = 1
        self._places: dict[str, int] = {}
        limits = steps.limits
        count = min(MOST_DECODES, most_decodes - 2, limits.max_seqs - 2, limits.max_tokens // 2)
        longest = min(
            CONTEXTS[1], limits.max_context - ROOM - 2, limits.cache_tokens // (4 * MOST_DECODES)
        )
        prefill = min(
            MOST_PREFILL,
            limits.max_tokens - count,
            limits.max_context - ROOM - 2,
            limits.cache_tokens // 4,
        )
        if count < 1 or longest < 1 or prefill < 6:
            raise LaneError("there is no room for a batch that would prove the lanes")
        shortest, part = min(CONTEXTS[0], longest), prefill // 3
        contexts = [shortest + n * (longest - shortest) // count for n in range(count)]
        shapes = [(context, 1) for context in contexts]
        shapes += [(0, prefill - part), (part // 2, part)]
        self._num_decodes = count
        self._originals = [steps.request(*shape, room=ROOM, temperature=0.0) for shape in shapes]
        self._blocks = sorted(set().union(*map(_blocks_of, self._originals)))
        for view in self._views():
            view.write(torch.zeros_like(view.read()))  # or what is not written might be right
        for request in self._originals:
            self._fill(request)
        self._begin = [blocks.cpu() for blocks in self._kv()]

    def _fill(self, request: HandMadeRequest) -> None:
        """Compute the tokens that it is to find in the KV cache."""
        done = 0
        while done < request.computed:
            size = min(request.computed - done, self._steps.limits.max_tokens)
            chunk = self._steps.request(done, size, temperature=0.0, like=request)
            self._run(self._steps.step([chunk]))
            self._run(self._steps.step(ended=[chunk]))
            done += size

    def difference(self, splits: Mapping[int, int]) -> str | None:
        """How a split step differs from whole ones, in a clause, where it may not."""
        mixed = self._results(self._mixed)
        mixed.kv = [blocks.cpu() for blocks in self._kv()]
        apart = self._results(self._apart)
        noise = self._off(apart, mixed)
        apart.kv = [blocks.cpu() for blocks in self._kv()]
        least = ROUNDING[self._runner.model_config.dtype]
        allowed = min(max(NOISE_FACTOR * noise, least), NEVER_ROUNDING)
        depth = self._runner.vllm_config.max_concurrent_batches
        ways = (1, Join.IF_DONE), (depth, Join.IF_DONE), (depth, Join.WAIT)
        for (decode_sms, prefill_sms), (self._depth, join) in product(splits.items(), ways):
            split = self._results(partial(self._split, decode_sms, prefill_sms, join))
            off = min(self._off(split, whole) for whole in (mixed, apart))
            if not off <= allowed:
                return (
                    f"steps split into lanes of {decode_sms} and {prefill_sms} SMs do not compute"
                    f" what whole ones do: they are off by {off:.1%}, and whole ones among"
                    f" themselves by {noise:.1%}"
                )
        return None

    def end(self) -> None:
        """Have all requests gone."""
        self._runner.execute_model_state = None
        self._worker.execute_model(self._steps.end())

    # Three ways to run the batch

    def _mixed(
        self, decodes: Sequence[HandMadeRequest], prompts: Sequence[HandMadeRequest]
    ) -> None:
        self._run(self._steps.step(prompts, decodes))
        for _ in range(DECODE_STEPS - 1):
            self._run(self._steps.step(decodes=decodes))

    def _apart(
        self, decodes: Sequence[HandMadeRequest], prompts: Sequence[HandMadeRequest]
    ) -> None:
        for _ in range(DECODE_STEPS):
            self._run(self._steps.step(decodes=decodes))
        self._run(self._steps.step(prompts))

    def _split(
        self,
        decode_sms: int,
        prefill_sms: int,
        join: Join,
        decodes: Sequence[HandMadeRequest],
        prompts: Sequence[HandMadeRequest],
    ) -> None:
        of_decode = f"a decode step on its lane of {decode_sms} SMs"
        of_prefill = f"a prefill on its lane of {prefill_sms} SMs"
        for n in range(DECODE_STEPS):
            output, launch = self._steps.step(decodes=decodes), None
            if n == 0:
                prefill = self._steps.step(prompts)
                launch = PrefillLaunch(self._launches, prefill, decode_sms, prefill_sms)
                self._launches += 1
            output.duet = StepDirective(launch, None if launch else join, decode_sms)
            self._run(output, of_decode)
        for prefill in self._runner.prefills_in_flight:
            self._wait(prefill.done, of_prefill)
            output = self._steps.step()
            output.duet = StepDirective(join=Join.WAIT, decode_sms=decode_sms)
            self._run(output, of_prefill)

    # Running

    def _results(
        self, way: Callable[[Sequence[HandMadeRequest], Sequence[HandMadeRequest]], None]
    ) -> _Results:
        """Run the batch in a ``way``, always from the same beginning; then all requests together,
        which reads what each of them has written."""
        for view, blocks in zip(self._views(), self._begin, strict=True):
            view.write(blocks)
        requests = [
            self._steps.request(
                original.data.num_computed_tokens,
                original.prompt_tokens - original.data.num_computed_tokens,
                room=ROOM,
                temperature=0.0,
                like=original,
            )
            for original in self._originals
        ]
        decodes, prompts = requests[: self._num_decodes], requests[self._num_decodes :]
        self._places = {request.req_id: n for n, request in enumerate(requests)}
        self._found = _Results(len(requests))
        with self._recorded_logits():
            self._run(self._steps.step(decodes))
            way(decodes, prompts)
            self._run(self._steps.step(decodes=requests))
            self._take_all_but(0)
        self._run(self._steps.step(ended=requests))
        self._take_all_but(0)
        return self._found

    @contextmanager
    def _recorded_logits(self) -> Iterator[None]:
        runner, stock = self._runner, self._runner.sample

        def sample(hidden_states: torch.Tensor, input_batch: Any, *args: Any) -> Any:
            logits = runner.model.compute_logits(hidden_states[input_batch.logits_indices])
            for req_id, row in zip(input_batch.req_ids, logits, strict=False):
                self._found.logits[self._places[req_id]].append(row)
            return stock(hidden_states, input_batch, *args)

        runner.sample = sample
        try:
            yield
        finally:
            del runner.sample

    def _run(self, output: Any, what: str = "a step") -> None:
        """Queue a step, and wait until no more than ``depth - 1`` have not ended.

        Raises:
            LaneError: the device has not come to the end of one in time, or a prefill has failed.
        """
        step = self._worker.execute_model(output)
        if output.total_num_scheduled_tokens:
            step = self._worker.sample_tokens(None)
        is_done = None
        if self._runner.device.type != "cpu":
            is_done = torch.cuda.current_stream(self._runner.device).record_event().query
        self._queued.append(_Queued(step, is_done, what))
        self._take_all_but(self._depth - 1)

    def _take_all_but(self, count: int) -> None:
        while len(self._queued) > count:
            self._take()

    def _take(self) -> None:
        step, is_done, what = self._queued.popleft()
        if is_done is not None:
            self._wait(is_done, what)
        if isinstance(step, AsyncModelRunnerOutput):
            step = step.get_output()
        joined: JoinedPrefill | None = getattr(step, "duet", None)
        if joined is not None and joined.error is not None:
            raise LaneError(joined.error.rstrip("."))
        for part in (step, joined and joined.output):
            for req_id, tokens in zip(*_sampled(part), strict=True):
                if (place := self._places.get(req_id)) is not None:
                    self._found.tokens[place] += tokens

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not is_done():
            if time.monotonic() > until:
                raise LaneError(f"{what} had not ended after {TIMEOUT_S:g} s")
            time.sleep(1e-4)

    # Comparing

    def _off(self, found: _Results, whole: _Results) -> float:
        """The largest relative difference of a row of logits or of a KV block. The blocks of
        ``found`` are those in the KV cache now."""
        if not found.is_like(whole):
            return inf
        off, comparable = 0.0, set[int]()
        for request, original in enumerate(self._originals):
            same = found.same_until(whole, request)
            if same >= len(found.tokens[request]) - 1:  # nothing was computed from the last
                comparable |= _blocks_of(original)
            pairs = zip(found.logits[request], whole.logits[request], strict=True)
            for ours, theirs in list(pairs)[: same + 1]:
                off = _worse(off, _relative(_centred(ours)[None], _centred(theirs)[None]))
        rows = [n for n, block in enumerate(self._blocks) if block in comparable]
        for blocks, stored in zip(self._kv(), whole.kv, strict=True):
            ours, theirs = (
                self._numbers(blocks[rows]),
                self._numbers(stored[rows].to(blocks.device)),
            )
            if ours is not None:
                off = _worse(off, _relative(ours, theirs))
        return off

    def _numbers(self, blocks: torch.Tensor) -> torch.Tensor | None:
        """None where bytes stand for more than one kind of number: the last step reads them."""
        if blocks.is_floating_point():
            return blocks
        dtype = str(self._runner.vllm_config.cache_config.cache_dtype)
        formats = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
        formats["fp8_e5m2"] = torch.float8_e5m2
        return blocks.view(formats[dtype]) if dtype in formats else None

    def _kv(self) -> Iterator[torch.Tensor]:
        return (view.read() for view in self._views())

    def _views(self) -> Iterator[_KVBlocks]:
        num_blocks = self._runner.kv_cache_config.num_blocks
        return (_KVBlocks.of(cache, num_blocks, self._blocks) for cache in self._runner.kv_caches)


class _KVBlocks(NamedTuple):
    """``num_blocks`` blocks of a layer's KV cache, whatever its layout: ``rows`` of ``dim``."""

    cache: torch.Tensor
    dim: int
    rows: torch.Tensor
    num_blocks: int

    @classmethod
    def of(cls, cache: torch.Tensor, num_blocks: int, blocks: Sequence[int]) -> _KVBlocks:
        # A kernel may have smaller blocks, so that one of vLLM's is some of its.
        sizes = list(enumerate(cache.shape))
        dim, size = next((d, n) for d, n in sizes if n % num_blocks == 0)
        each = size // num_blocks
        rows = [each * block + n for block in blocks for n in range(each)]
        return cls(cache, dim, torch.tensor(rows, device=cache.device), len(blocks))

    def read(self) -> torch.Tensor:
        """[blocks, rows of a block, ...]"""
        rows = self.cache.index_select(self.dim, self.rows).movedim(self.dim, 0)
        return rows.unflatten(0, (self.num_blocks, -1))

    def write(self, blocks: torch.Tensor) -> None:
        rows = blocks.to(self.cache.device).flatten(0, 1).movedim(0, self.dim)
        self.cache.index_copy_(self.dim, self.rows, rows)


def _blocks_of(request: HandMadeRequest) -> set[int]:
    return set().union(*request.blocks)


def _sampled(output: Any) -> tuple[list[str], list[list[int]]]:
    if output is None or not output.req_ids:
        return [], []
    return output.req_ids, output.sampled_token_ids


def _centred(logits: torch.Tensor) -> torch.Tensor:
    # What is added to all of them changes no probability.
    finite = torch.nan_to_num(logits.float())
    return finite - finite.mean()


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of two rows [rows, ...], over the size of the row."""
    if not ours.numel():
        return 0.0
    ours, theirs = (torch.nan_to_num(part.float()).flatten(1) for part in (ours, theirs))
    apart, size = (ours - theirs).norm(dim=1), theirs.norm(dim=1)
    return float((apart / size.clamp_min(1e-20)).max())


def _worse(off: float, other: float) -> float:
    """The larger; not a number is worse than any."""
    return other if not other <= off else off
