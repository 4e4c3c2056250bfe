# SPDX-License-Identifier: Apache-2.0
"""Simulated runs for the experiments: described, run on all cores, kept on disk.

A run that is on disk is not run again, unless its workload or the code that it went
through has changed since; so an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vllm_duet.sim.results import version
from vllm_duet.sim.traces import TraceRequest, at_rate, read_trace, synthetic

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sim"
MODEL = HERE / "models" / "qwen3-8b"
PACKAGE = HERE.parent / "vllm_duet"

DEFAULT_BUDGET = 8192
"""vllm serve's max_num_batched_tokens on an H100."""
BOUNDS_MS = (100.0, 50.0, 25.0)
"""The bounds on TBT; what is not told the bound is simulated once for all of them."""
UNTOLD = ("stock", "disaggregated", "fixed-split", "prefill-cap", "prefill-interval")
"""Systems that neither the bound nor a forecast reaches."""

MOST, MANY = 0.99, 0.90
"""Shares of good requests; goodput is the highest rate that keeps the first."""
STEP = 1.05
"""The ratio between two rates of the grid on which goodput is looked for, unless told otherwise."""
WIDTH = 3
"""Steps of the grid between the first rates of a search: 16 %."""
NEAREST = 3
"""Candidates that a search goes on with once all of them have failed at a rate."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to serve: the first ``count`` of a trace file, or synthetic ones.

    ``ttft_slo_ms`` is the limit on TTFT of a good request; ``lowest`` and ``highest`` are
    requests a second between which goodput is looked for.
    """

    name: str
    count: int
    ttft_slo_ms: float
    lowest: float
    highest: float
    file: str | None = None
    input_length: int = 0
    output_length: int = 0

    def requests(self, traces: Path, rate: float, seed: int) -> list[TraceRequest]:
        if self.file is None:
            return synthetic(self.count, rate, self.input_length, self.output_length, seed)
        return at_rate(read_trace(traces / self.file)[: self.count], rate)

    def rate(self, index: int, step: float = STEP) -> float:
        """The rates that are tried: a grid of the ratio ``step`` from ``lowest``."""
        return round(self.lowest * step**index, 4)

    def nearest(self, rate: float, step: float = STEP) -> int:
        """The grid's index of the rate at most ``rate``; that of 0 is -1."""
        return max(-1, math.floor(math.log(rate / self.lowest, step) + 0.02)) if rate else -1


def _synthetic(input_length: int, output_length: int, *numbers: float) -> Workload:
    name, (count, *others) = f"{input_length}/{output_length}", numbers
    return Workload(
        name, int(count), *others, input_length=input_length, output_length=output_length
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("azure-code", 600, 15_000, 1, 16, "azure-code-2023.csv"),
        Workload("azure-conv", 800, 2000, 3, 40, "azure-conv-2023.csv"),
        Workload("mooncake", 300, 10_000, 0.2, 4, "mooncake-conversation.jsonl"),
        _synthetic(4096, 512, 300, 4000, 1, 12),
        _synthetic(1024, 1024, 300, 2000, 2, 40),
        _synthetic(2048, 128, 400, 2000, 3, 40),
        _synthetic(8192, 256, 300, 6000, 0.5, 8),
        _synthetic(16384, 1024, 200, 10_000, 0.1, 2),
        _synthetic(32768, 512, 200, 20_000, 0.1, 1.5),
    )
}


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation. ``scheduler`` is a name that Simulation takes, with its number;
    ``measured``: its policy has measured steps before."""

    workload: str
    scheduler: str
    rate: float = 0.0
    budget: int = DEFAULT_BUDGET
    tbt_slo_ms: float = 100.0
    model_error: float = 0.0
    seed: int = 0
    measured: bool = False

    @property
    def system(self) -> str:
        """The scheduler without its number."""
        return self.scheduler.partition(":")[0]

    @property
    def key(self) -> str:
        run = replace(self, tbt_slo_ms=0.0, model_error=0.0) if self.system in UNTOLD else self
        fields = asdict(run)
        if not self.measured:  # as runs on file have it
            del fields["measured"]
        return json.dumps(fields)

    @property
    def label(self) -> str:
        """As the tables call it: the budget where it is searched for."""
        searched = self.scheduler == "stock" or self.budget != DEFAULT_BUDGET
        return f"{self.scheduler}-{self.budget}" if searched else self.scheduler

    @property
    def code(self) -> str:
        """Of the code that the run goes through, and of its workload."""
        return fingerprint(self.system != "stock", WORKLOADS[self.workload], self.measured)


def simulate(run: Run, traces: Path) -> dict[str, Any]:
    """The figures of a run; what is good under each of BOUNDS_MS is in ``by_bound``."""
    from vllm_duet.sim import results
    from vllm_duet.sim.simulation import Options, Simulation

    workload = WORKLOADS[run.workload]
    options = Options(
        MODEL,
        scheduler=run.scheduler,
        max_num_batched_tokens=run.budget,
        tbt_slo_ms=run.tbt_slo_ms,
        ttft_slo_ms=workload.ttft_slo_ms,
        model_error=run.model_error,
        seed=run.seed,
        measure_at_start=run.measured,
    )
    num_gpus = 2 if run.scheduler == "disaggregated" else 1
    requests = workload.requests(traces, num_gpus * run.rate, run.seed)
    start_s = time.process_time()
    outcome = Simulation(options).run(requests)
    cpu_s = time.process_time() - start_s
    values = results.latencies(outcome.records)
    figures = results.figures(outcome, run.tbt_slo_ms, workload.ttft_slo_ms)
    by_bound = {
        f"{bound:g}": results.goodput(outcome, values, bound, workload.ttft_slo_ms)
        for bound in BOUNDS_MS
    }
    kept = {k: v for k, v in figures.items() if k not in (*by_bound["100"], "tbt_within_slo")}
    return kept | {"by_bound": by_bound, "cpu_s": round(cpu_s, 2)}


@functools.cache
def fingerprint(decides: bool, workload: Workload, measured: bool = False) -> str:
    """Stock runs pass neither the policy nor the other systems; all stand on the tables."""
    files = [*PACKAGE.glob("sim/**/*.py"), *PACKAGE.glob("roofline/**/*.py"), PACKAGE / "plan.py"]
    files += PACKAGE.glob("profiles/h100-sxm.yaml")
    files = [file for file in files if file.name != "command.py"]
    if decides:
        files += [PACKAGE / name for name in ("policy.py", "scheduler.py", "step_times.py")]
    else:
        files = [file for file in files if file.name != "systems.py"]
    if measured:
        files.append(PACKAGE / "anchors.py")
    digest = hashlib.sha256(repr((workload, version("aiconfigurator-core"))).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Runs:
    """Runs by their description; each is on disk as soon as it has ended."""

    def __init__(self, traces: Path) -> None:
        self._traces, self._path = traces, RESULTS / "runs.jsonl"
        self._rows: dict[str, dict[str, Any]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut short when an experiment was stopped
            run = json.loads(row["key"])
            if run["workload"] in WORKLOADS and Run(**run).code == row["code"]:
                self._rows[row["key"]] = row

    def of(self, runs: Iterable[Run], title: str) -> list[dict[str, Any]]:
        """The figures of each run, in order; those not on disk are simulated."""
        runs = list(runs)
        missing = {run.key: run for run in runs if run.key not in self._rows}
        if missing:
            self._simulate(list(missing.values()), title)
        rows = [self._rows[run.key]["figures"] for run in runs]
        return [
            row | row["by_bound"][f"{run.tbt_slo_ms:g}"]
            for row, run in zip(rows, runs, strict=True)
        ]

    def _simulate(self, runs: Sequence[Run], title: str) -> None:
        self._drop_what_is_stale()
        pool = _pool()
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=len(runs))
            futures = {pool.submit(simulate, run, self._traces): run for run in runs}
            for future in as_completed(futures):
                run = futures[future]
                row = {"key": run.key, "code": run.code, "figures": future.result()}
                self._rows[run.key] = row
                with self._path.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                progress.advance(task)

    def _drop_what_is_stale(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        rows = (json.dumps(row) + "\n" for _, row in sorted(self._rows.items()))
        draft.write_text("".join(rows))
        draft.replace(self._path)


@functools.cache
def _pool() -> Executor:
    # vLLM does not take to being forked.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn"))


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the highest rate at which one of ``candidates`` keeps ``share``.

    The candidates are one system with other options; their own rates do not count.
    ``guess`` is a rate to begin with, such as a neighbour's goodput, and ``step`` the ratio
    between two rates that are told apart.
    """

    candidates: tuple[Run, ...]
    share: float = MOST
    guess: float | None = None
    step: float = STEP


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found. ``rate`` is 0 where even the lowest rate is not kept.

    ``run`` is the candidate that keeps it, else the one that came nearest at the
    lowest rate, and ``figures`` are those of that run. ``others``: candidates in the order
    in which they came near.
    """

    rate: float
    run: Run
    figures: dict[str, Any]
    others: tuple[Run, ...]


Asking = Generator[list[Run], list[dict[str, Any]], Found]


def goodputs(runs: Runs, searches: Sequence[Search]) -> list[Found]:
    """What each search finds. They run side by side, in rounds of one question each."""
    found: dict[int, Found] = {}
    asking = {number: _search(search) for number, search in enumerate(searches)}
    asked = {number: next(search) for number, search in asking.items()}
    while asked:
        batch = [run for question in asked.values() for run in question]
        figures = iter(runs.of(batch, f"goodput, {len(asked)} of {len(searches)} searches"))
        for number, question in list(asked.items()):
            answers = [next(figures) for _ in question]
            try:
                asked[number] = asking[number].send(answers)
            except StopIteration as end:
                found[number] = end.value
                del asked[number]
    return [found[number] for number in range(len(searches))]


def _search(search: Search) -> Asking:
    """Gallops from the guess to a bracket, and bisects it, on the workload's grid of rates.

    It takes it that a rate above one that is not kept is not kept either. A rate is kept
    when one candidate keeps it: the last one that did is asked first, and only where it
    fails the others. When all have failed at a rate, the NEAREST go on: those with
    the largest shares there.
    """
    workload, step = WORKLOADS[search.candidates[0].workload], search.step
    order, top = list(search.candidates), workload.nearest(workload.highest, step)
    good, bad, width = -1, top + 1, WIDTH
    middle = top // 2
    at = middle if search.guess is None else min(max(workload.nearest(search.guess, step), 0), top)
    best: tuple[Run, dict[str, Any]] | None = None
    while True:
        tried: list[tuple[Run, dict[str, Any]]] = []
        for some in (order[:1], order[1:]):
            asked = [replace(run, rate=workload.rate(at, step)) for run in some]
            if asked:
                tried += zip(asked, (yield asked), strict=True)
            if any(figures["good_requests_share"] >= search.share for _, figures in tried):
                break
        tried.sort(key=lambda pair: -pair[1]["good_requests_share"])
        runs = [run for run, _ in tried]
        kept = tried[0][1]["good_requests_share"] >= search.share
        if kept:
            good = at
            order = [runs[0], *(run for run in order if _same(run) != _same(runs[0]))]
        else:
            bad, order = at, runs[:NEAREST]
        if kept or good < 0:
            best = tried[0]
        if bad - good == 1:
            rate = workload.rate(good, step) if good >= 0 else 0.0
            return Found(rate, *best, tuple(order))
        if bad > top:
            at, width = min(good + width, top), 2 * width
        elif good < 0:
            at, width = max(bad - width, 0), 2 * width
        else:
            at = (good + bad) // 2


def _same(run: Run) -> Run:
    return replace(run, rate=0.0)
