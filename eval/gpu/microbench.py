# SPDX-License-Identifier: Apache-2.0
"""What a GPU does when its SMs are divided: facts about green contexts, by torch's own kernels.

    python eval/gpu/microbench.py
    python eval/gpu/microbench.py --only rates --only contention

Needs torch's CUDA build and cuda-bindings, not vLLM; about a minute by forecast. Each fact is a
function of that name, and is in the file as soon as it is found; what fails is in the file with
its error. docs/gpu-facts.md says what is expected, and from which source.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
import typer
from engines import RESULTS, provenance
from rich.console import Console
from rich.table import Table

from vllm_duet.lanes.green_context import GreenContextError, SmLimits, SmSplit, sm_limits

ROUNDS = 9
PRODUCT_ROWS = 2048
"""Of the product that is timed: gate_up of Qwen3-8B for a prefill chunk."""
HIDDEN, WIDTH = 4096, 24576
STREAM_BYTES = 2**30
"""Read and written by one run, far beyond the L2 cache."""
LONG_QUEUE_MS = 30.0
LEAST_OVERLAP = 3
"""Runs that have to lie wholly within the other lane's work."""

Found = dict[str, Any]
Work = Callable[[], object]


@triton.jit
def _write_down_sm(source, sums, found, TILE: tl.constexpr, SPINS: tl.constexpr):
    """Reads the same tile SPINS times, so that blocks are there long enough to spread."""
    total = tl.zeros([TILE], tl.int32)
    for _ in range(SPINS):
        total += tl.load(source + tl.arange(0, TILE), volatile=True)
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.store(found + tl.program_id(0), sm)


class SmIds:
    """Which SMs the blocks of a kernel run on."""

    def __init__(self, num_sms: int) -> None:
        self._source = torch.zeros(1024, dtype=torch.int32).cuda()
        self._sums, self._found = (
            torch.full((32 * num_sms,), -1, dtype=torch.int32).cuda() for _ in range(2)
        )
        self.launch()  # compiles it

    def launch(self) -> None:
        grid = (self._found.numel(),)
        _write_down_sm[grid](self._source, self._sums, self._found, TILE=1024, SPINS=64)

    def of(self, launch: Work, stream: Any) -> frozenset[int]:
        """The SMs that are used when ``launch`` launches it on ``stream``, several times.

        Raises:
            RuntimeError: a block has written nothing down.
        """
        seen: set[int] = set()
        for _ in range(ROUNDS):
            self._found.copy_(torch.full_like(self._found, -1, device="cpu"))
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                launch()
            stream.synchronize()
            seen |= set(self._found.tolist())
        if -1 in seen:
            raise RuntimeError("some blocks did not write down their SM")
        return frozenset(seen)


@dataclass(frozen=True)
class Gpu:
    """The GPU, what its driver makes of its SMs, and buffers to compute on."""

    limits: SmLimits
    whole: Any
    x: torch.Tensor
    weight: torch.Tensor
    buffers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def open(cls) -> Gpu:
        """
        Raises:
            GreenContextError: there are no SM groups here.
        """
        x, weight = (
            torch.randn(n, HIDDEN, dtype=torch.bfloat16, device="cuda")
            for n in (PRODUCT_ROWS, WIDTH)
        )
        count = STREAM_BYTES // 4
        buffers = tuple(
            (torch.empty(count // 2, device="cuda"), torch.empty(count // 2, device="cuda"))
            for _ in range(2)
        )
        return cls(sm_limits(), torch.cuda.Stream(), x, weight, buffers)

    def splits(self, count: int) -> list[int]:
        """At most ``count`` of the decode groups there may be, over the whole range."""
        sizes = self.limits.splits()
        at = {round(i * (len(sizes) - 1) / max(count - 1, 1)) for i in range(count)}
        return [sizes[i] for i in sorted(at)]

    def product(self) -> Work:
        out = torch.empty(PRODUCT_ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
        return lambda: torch.mm(self.x, self.weight.T, out=out)

    def traffic(self, number: int = 0) -> Work:
        """A kernel, where a copy of torch's would be cudaMemcpyAsync, which needs no SM."""
        source, target = self.buffers[number]
        return lambda: torch.neg(source, out=target)


@contextmanager
def split(sms: int, **options: Any) -> Iterator[SmSplit]:
    """The groups of one split. cuBLAS has workspaces for each stream, which go with it."""
    with SmSplit.create(sms, **options) as made:
        yield made
        torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()


def event(stream: Any) -> torch.cuda.Event:
    made = torch.cuda.Event(enable_timing=True)
    made.record(stream)
    return made


def run_ms(work: Work, stream: Any) -> float:
    """Median time of one run, of several queued back to back."""
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
        marks = [event(stream)]
        for _ in range(ROUNDS):
            work()
            marks.append(event(stream))
    stream.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(marks))


def beside_ms(
    works: tuple[Work, Work], streams: tuple[Any, Any]
) -> tuple[list[float], list[float]]:
    """Both alone, and beside each other: what counts are runs wholly within the other's.

    Raises:
        RuntimeError: the two did not run at once.
    """
    alone = [run_ms(work, stream) for work, stream in zip(works, streams, strict=True)]
    total_ms = 1.5 * (ROUNDS + 1) * max(alone)
    # By expected start, since neither queue may run dry while the other is filled.
    order = sorted(
        (i * ms, side) for side, ms in enumerate(alone) for i in range(ceil(total_ms / ms))
    )
    marks = [[event(stream)] for stream in streams]
    for _, side in order:
        with torch.cuda.stream(streams[side]):
            works[side]()
        marks[side].append(event(streams[side]))
    torch.cuda.synchronize()
    at = [[marks[0][0].elapsed_time(mark) for mark in side] for side in marks]
    start, end = max(side[0] for side in at), min(side[-1] for side in at)
    beside = []
    for side in at:
        inside = [b - a for a, b in pairwise(side) if a >= start and b <= end]
        if len(inside) < LEAST_OVERLAP:
            raise RuntimeError(f"only {len(inside)} of {len(side) - 1} runs were beside the other")
        beside.append(median(inside))
    return alone, beside


# The facts


def groups(gpu: Gpu) -> Found:
    """Whether each split gives the groups that were asked for, disjoint, counted by SM ids."""
    ids, found = SmIds(gpu.limits.num_sms), []
    for sms in gpu.limits.splits():
        began = time.perf_counter()
        with split(sms) as made:
            create_ms = 1e3 * (time.perf_counter() - began)
            lanes = made.decode, made.prefill
            decode, prefill = (ids.of(ids.launch, lane.stream()) for lane in lanes)
            found.append(
                {
                    "asked": sms,
                    "said": [lane.num_sms for lane in lanes],
                    "counted": [len(decode), len(prefill)],
                    "shared": len(decode & prefill),
                    "create_ms": create_ms,
                }
            )
    right = sum(f["said"] == f["counted"] and not f["shared"] for f in found)
    limits = gpu.limits
    return {
        "verdict": f"from {limits.min_sms} in steps of {limits.granularity}: {right} of"
        f" {len(found)} splits are two disjoint groups of what was asked for",
        "splits": found,
    }


def captured_launches(gpu: Gpu) -> Found:
    """Which SMs a graph that was captured on the decode lane uses when launched elsewhere."""
    ids = SmIds(gpu.limits.num_sms)
    with split(gpu.splits(3)[1]) as made:
        decode, prefill = (ids.of(ids.launch, g.stream()) for g in (made.decode, made.prefill))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=made.decode.stream()):
            ids.launch()
        streams = {"decode": made.decode.stream(), "prefill": made.prefill.stream()}
        replayed = {
            name: ids.of(graph.replay, stream)
            for name, stream in (streams | {"whole": gpu.whole}).items()
        }
        del graph
    if all(seen <= decode for seen in replayed.values()):
        verdict = "captured kernels stay in the group they were captured in"
    elif replayed["prefill"] <= prefill:
        verdict = "captured kernels run in the group that the graph is launched in"
    else:
        verdict = "captured kernels are bound to neither group"
    return {
        "verdict": verdict,
        "decode": sorted(decode),
        "prefill": sorted(prefill),
        "replayed_on": {name: sorted(seen) for name, seen in replayed.items()},
    }


def events_across_groups(gpu: Gpu) -> Found:
    """Whether an event of one group orders and times the other's work."""
    work = gpu.product()
    ones, passed = (torch.full((1 << 20,), value).cuda() for value in (1.0, 0.0))
    end = passed.clone()
    with split(gpu.splits(3)[1]) as made:
        decode, prefill = made.decode.stream(), made.prefill.stream()
        runs = ceil(LONG_QUEUE_MS / max(run_ms(work, prefill), 1e-3))
        begun = event(decode)
        with torch.cuda.stream(prefill):
            for _ in range(runs):
                work()
            passed.copy_(ones)
        done = event(prefill)
        decode.wait_event(done)
        with torch.cuda.stream(decode):
            end.copy_(passed)
        waited = not done.query()
        ended = event(decode)
        torch.cuda.synchronize()
        times = {"prefill_ms": begun.elapsed_time(done), "decode_ms": begun.elapsed_time(ended)}
    ordered = bool((end.cpu() == 1).all()) and times["decode_ms"] >= times["prefill_ms"]
    verdict = "an event of one group orders the other" if ordered else "an event orders nothing"
    if not waited:
        verdict += "; the queue had ended before it was waited for, so this shows little"
    return {"verdict": verdict, "ordered": ordered, "waited": waited, **times}


def launch_beside_a_long_queue(gpu: Gpu) -> Found:
    """Launch to completion of a small kernel on the decode lane, the other idle and with a long
    queue; with and without work queues of their own, at equal and at higher priority."""
    work, small, found = gpu.product(), torch.zeros(1024).cuda(), []
    for separate in (True, False):
        for priority in (0, -1):
            with split(gpu.splits(3)[1], separate_work_queues=separate) as made:
                decode, prefill = made.decode.stream(priority), made.prefill.stream()
                runs = ceil(LONG_QUEUE_MS / max(run_ms(work, prefill), 1e-3))

                def latency_us(decode: Any = decode) -> float:
                    began = time.perf_counter()
                    with torch.cuda.stream(decode):
                        torch.neg(small, out=small)
                    event(decode).synchronize()
                    return 1e6 * (time.perf_counter() - began)

                latency_us()
                idle, beside = [latency_us() for _ in range(ROUNDS)], []
                for _ in range(ROUNDS):
                    with torch.cuda.stream(prefill):
                        for _ in range(runs):
                            work()
                    beside.append(latency_us())
                    torch.cuda.synchronize()
                found.append(
                    {
                        "separate_work_queues": made.separate_work_queues,
                        "decode_priority": priority,
                        "idle_us": median(idle),
                        "beside_us": median(beside),
                        "max_beside_us": max(beside),
                    }
                )
    said = (
        f"{f['idle_us']:.0f} to {f['beside_us']:.0f} us with"
        f"{'' if f['separate_work_queues'] else 'out'} queues of their own at priority"
        f" {f['decode_priority']}"
        for f in found
    )
    return {"verdict": "idle to beside: " + ", ".join(said), "settings": found}


def rates(gpu: Gpu) -> Found:
    """C(S) and B(S): what a product and plain traffic reach on each group."""
    product, traffic, found = gpu.product(), gpu.traffic(), []

    def measure(stream: Any, num_sms: int) -> None:
        flops = 2.0 * PRODUCT_ROWS * HIDDEN * WIDTH
        found.append(
            {
                "num_sms": num_sms,
                "tflops": 1e-9 * flops / run_ms(product, stream),
                "gb_per_s": 1e-6 * STREAM_BYTES / run_ms(traffic, stream),
            }
        )

    measure(gpu.whole, gpu.limits.num_sms)
    for sms in gpu.splits(8):
        with split(sms) as made:
            for group in (made.decode, made.prefill):
                measure(group.stream(), group.num_sms)
    measure(gpu.whole, gpu.limits.num_sms)  # slower than at first where the GPU has grown warm
    whole, half = found[0], min(found, key=lambda f: abs(2 * f["num_sms"] - gpu.limits.num_sms))
    compute, memory = (half[key] / whole[key] for key in ("tflops", "gb_per_s"))
    return {
        "verdict": f"{half['num_sms']} of {whole['num_sms']} SMs reach {compute:.0%} of the"
        f" products and {memory:.0%} of the bandwidth",
        "groups": found,
    }


def contention(gpu: Gpu) -> Found:
    """How much two groups slow each other, by what each of them does."""
    works = {"product": gpu.product(), "traffic": gpu.traffic()}
    pairs = [("traffic", "product"), ("traffic", "traffic"), ("product", "product")]
    found = []
    for sms in gpu.splits(4):
        with split(sms) as made:
            streams = made.decode.stream(), made.prefill.stream()
            for first, second in pairs:
                other = gpu.traffic(1) if second == "traffic" else gpu.product()
                alone, beside = beside_ms((works[first], other), streams)
                slower = [b / a - 1 for a, b in zip(alone, beside, strict=True)]
                found.append(
                    {
                        "num_sms": [made.decode.num_sms, made.prefill.num_sms],
                        "decode": first,
                        "prefill": second,
                        "alone_ms": alone,
                        "beside_ms": beside,
                        "slower": slower,
                    }
                )
    most: dict[str, float] = {}
    for pair in found:
        name = f"{pair['decode']} beside {pair['prefill']}"
        most[name] = max(most.get(name, 0.0), *pair["slower"])
    said = ", ".join(f"{name} {slower:.0%}" for name, slower in most.items())
    return {"verdict": f"at most slower by: {said}", "pairs": found}


FACTS = {
    fact.__name__: fact
    for fact in (
        groups,
        captured_launches,
        events_across_groups,
        launch_beside_a_long_queue,
        rates,
        contention,
    )
}


def main(
    out: Annotated[Path, typer.Option(dir_okay=False)] = RESULTS / "microbench.json",
    only: Annotated[list[str] | None, typer.Option(help="A fact; repeat it for several.")] = None,
) -> None:
    """Find out, write JSON, print a table."""
    if unknown := set(only or ()) - set(FACTS):
        raise typer.BadParameter(f"--only takes {', '.join(FACTS)}, not {', '.join(unknown)}")
    if not torch.cuda.is_available():
        typer.echo(f"torch {torch.__version__} finds no NVIDIA GPU.", err=True)
        raise typer.Exit(2)
    try:
        gpu = Gpu.open()
    except GreenContextError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    results: Found = {"provenance": provenance(), "facts": {}}
    table = Table("fact", "verdict")
    for name in only or FACTS:
        try:
            found = FACTS[name](gpu)
        except Exception as error:
            found = {"verdict": f"failed: {error}", "error": traceback.format_exc(limit=8)}
        results["facts"][name] = found
        table.add_row(name, found["verdict"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table)
    typer.echo(f"Wrote {out}")


if __name__ == "__main__":
    typer.run(main)
