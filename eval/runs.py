# SPDX-License-Identifier: Apache-2.0
"""Simulated runs for the experiments: described, run on all cores, kept on disk.

A run that is on disk is not run again, unless the code that it went through has
changed since; so an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vllm_duet.sim.traces import TraceRequest, at_rate, read_trace, synthetic

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sim"
MODEL = HERE / "models" / "qwen3-8b"
PACKAGE = HERE.parent / "vllm_duet"

STOCK_BUDGETS = (256, 512, 1024, 2048, 4096, 8192, 16384)
DEFAULT_BUDGET = 8192
"""vllm serve's max_num_batched_tokens on an H100."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to serve: the first ``count`` of a trace file, or synthetic ones.

    ``ttft_slo_ms`` is the limit on p99 TTFT for goodput; ``lowest`` and ``highest`` are
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


def _synthetic(input_length: int, output_length: int, *numbers: float) -> Workload:
    name, (count, *others) = f"{input_length}/{output_length}", numbers
    return Workload(
        name, int(count), *others, input_length=input_length, output_length=output_length
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("azure-code", 600, 15_000, 2, 16, "azure-code-2023.csv"),
        Workload("azure-conv", 800, 2000, 5, 32, "azure-conv-2023.csv"),
        Workload("mooncake", 250, 10_000, 0.4, 4, "mooncake-conversation.jsonl"),
        _synthetic(4096, 512, 200, 4000, 1, 8),
        _synthetic(1024, 1024, 250, 2000, 2, 20),
        _synthetic(2048, 128, 300, 2000, 3, 20),
        _synthetic(8192, 256, 150, 6000, 0.5, 5),
        _synthetic(16384, 1024, 80, 10_000, 0.2, 2),
        _synthetic(32768, 512, 60, 20_000, 0.1, 1),
    )
}


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    workload: str
    scheduler: str
    rate: float
    budget: int = DEFAULT_BUDGET
    tbt_slo_ms: float = 100.0
    model_error: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        run = self
        if self.scheduler in ("stock", "disaggregated"):
            # Neither the bound nor the forecast's error reaches these.
            run = replace(self, tbt_slo_ms=0.0, model_error=0.0)
        return json.dumps(asdict(run))

    @property
    def label(self) -> str:
        return f"stock-{self.budget}" if self.scheduler == "stock" else self.scheduler


def simulate(run: Run, traces: Path) -> dict[str, Any]:
    """The figures of a run."""
    from vllm_duet.sim import results
    from vllm_duet.sim.simulation import Options, Simulation

    workload = WORKLOADS[run.workload]
    options = Options(
        MODEL,
        scheduler=run.scheduler,
        max_num_batched_tokens=run.budget,
        tbt_slo_ms=run.tbt_slo_ms,
        model_error=run.model_error,
        seed=run.seed,
    )
    num_gpus = 2 if run.scheduler == "disaggregated" else 1
    requests = workload.requests(traces, num_gpus * run.rate, run.seed)
    outcome = Simulation(options).run(requests)
    figures = results.figures(outcome, run.tbt_slo_ms)
    return {k: figures[k] for k in figures if k != "kv_cache_tokens"}


@functools.cache
def fingerprint(decides: bool) -> str:
    """Of the code that a run goes through; stock runs do not pass the policy."""
    files = [*PACKAGE.glob("sim/*.py"), *PACKAGE.glob("roofline/*.py"), PACKAGE / "plan.py"]
    files += PACKAGE.glob("profiles/h100-sxm.yaml")
    files = [file for file in files if file.name not in ("command.py", "results.py")]
    if decides:
        files += [PACKAGE / name for name in ("policy.py", "scheduler.py", "step_times.py")]
    else:
        files = [file for file in files if file.name not in ("systems.py", "simulation.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Runs:
    """Runs by their description; the file is rewritten as each ends."""

    def __init__(self, traces: Path, workers: int | None = None) -> None:
        self._traces = traces
        self._path = RESULTS / "runs.jsonl"
        self._workers = workers or os.cpu_count() or 1
        self._rows: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                row = json.loads(line)
                self._rows[row["key"]] = row

    def of(self, runs: Iterable[Run], title: str) -> list[dict[str, Any]]:
        """The figures of each run, in order; those not on disk are simulated."""
        runs = list(runs)
        missing = {run.key: run for run in runs if not self._is_current(run)}
        if missing:
            self._simulate(list(missing.values()), title)
        return [self._rows[run.key]["figures"] for run in runs]

    def _is_current(self, run: Run) -> bool:
        row = self._rows.get(run.key)
        return row is not None and row["code"] == self._code(run)

    def _code(self, run: Run) -> str:
        return fingerprint(run.scheduler not in ("stock", "disaggregated"))

    def _simulate(self, runs: Sequence[Run], title: str) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        # vLLM does not take to being forked.
        pool = _pool(self._workers)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=len(runs))
            futures = {pool.submit(simulate, run, self._traces): run for run in runs}
            for future in as_completed(futures):
                run = futures[future]
                self._rows[run.key] = {
                    "key": run.key,
                    "code": self._code(run),
                    "figures": future.result(),
                }
                self._save()
                progress.advance(task)

    def _save(self) -> None:
        text = "".join(json.dumps(row) + "\n" for _, row in sorted(self._rows.items()))
        draft = self._path.with_suffix(".tmp")
        draft.write_text(text)
        draft.replace(self._path)


@functools.cache
def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def keeps(figures: dict[str, Any], tbt_slo_ms: float, ttft_slo_ms: float) -> bool:
    """Whether p99 TBT and p99 TTFT are within their limits."""
    return bool(figures["tbt_ms"]["p99"] <= tbt_slo_ms and figures["ttft_ms"]["p99"] <= ttft_slo_ms)


def goodputs(runs: Runs, asked: Sequence[Run], step: float = 1.05) -> list[float]:
    """For each run, whatever its rate, the highest rate that keeps both limits.

    Rates are on a grid of the ratio ``step``; 0 where even the workload's lowest breaks
    them. Bisects all at once, taking it that a rate above one that breaks them does so.
    """
    searches = [_Search(run, step) for run in asked]
    while any(pending := [s.run for s in searches if not s.found]):
        title = f"goodput, {len(pending)} searches"
        figures = iter(runs.of(pending, title))
        for search in searches:
            if not search.found:
                search.learn(next(figures))
    return [search.rate(search.good) if search.good >= 0 else 0.0 for search in searches]


class _Search:
    """Bisection over the grid: ``good`` keeps the limits and ``bad`` breaks them."""

    def __init__(self, run: Run, step: float) -> None:
        self._workload, self._asked, self._step = WORKLOADS[run.workload], run, step
        self.good, self._bad = -1, 0
        while self.rate(self._bad) <= self._workload.highest:
            self._bad += 1

    def rate(self, index: int) -> float:
        return self._workload.lowest * self._step**index

    @property
    def found(self) -> bool:
        return self._bad - self.good <= 1

    @property
    def run(self) -> Run:
        return replace(self._asked, rate=round(self.rate((self.good + self._bad) // 2), 4))

    def learn(self, figures: dict[str, Any]) -> None:
        middle = (self.good + self._bad) // 2
        if keeps(figures, self._asked.tbt_slo_ms, self._workload.ttft_slo_ms):
            self.good = middle
        else:
            self._bad = middle
