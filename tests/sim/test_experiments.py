# SPDX-License-Identifier: Apache-2.0
"""eval/experiments.py: how it searches, what it keeps, and that one command fills the page.

A made-up system stands in for the simulator: each has a rate up to which all is good.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

import experiments
import runs as runs_module
from runs import BOUNDS_MS, MANY, WORKLOADS, Run, Runs, Search, goodputs

WORKLOAD = "4096/512"
GRID = WORKLOADS[WORKLOAD]
TOP = GRID.nearest(GRID.highest)


def made_up(share: float) -> dict[str, Any]:
    spread = {"mean": 20.0, "p50": 18.0, "p90": 30.0, "p99": 45.0, "max": 60.0}
    return {
        "output_throughput": 1000.0,
        "ttft_ms": spread,
        "tbt_ms": spread,
        "lane_utilization": {"gpu": 0.5, "decode": 0.3, "prefill": 0.2},
        "preemptions": 0,
        "good_requests_share": share,
        "request_goodput": 3.0,
    }


class Capacities:
    """Stands for Runs: a run is good up to its scheduler's capacity, and worse the more beyond."""

    def __init__(self, **capacities: float) -> None:
        self.capacities, self.asked = capacities, 0

    def of(self, runs: list[Run], _: str) -> list[dict[str, Any]]:
        self.asked += len(runs)
        return [made_up(min(1.0, self.capacities[run.scheduler] / run.rate)) for run in runs]


def candidates(*names: str) -> tuple[Run, ...]:
    return tuple(Run(WORKLOAD, name) for name in names)


rates = st.floats(0.5 * GRID.lowest, 1.5 * GRID.highest)


@given(st.lists(rates, min_size=1, max_size=6), st.none() | rates)
def test_a_search_finds_the_grids_highest_rate(
    capacities: list[float], guess: float | None
) -> None:
    named = {f"s{n}": capacity for n, capacity in enumerate(capacities)}
    (found,) = goodputs(Capacities(**named), [Search(candidates(*named), 1.0, guess)])
    kept = [GRID.rate(i) for i in range(TOP + 1) if GRID.rate(i) <= max(capacities)]
    assert found.rate == (kept[-1] if kept else 0.0)
    assert found.run.rate == (found.rate or GRID.lowest)
    if kept:
        assert named[found.run.scheduler] >= found.rate
        assert found.figures["good_requests_share"] == 1.0


def test_searches_side_by_side_find_what_they_find_alone() -> None:
    truth = Capacities(a=2.0, b=3.3, c=7.0)
    searches = [
        Search(candidates("a", "b"), 1.0),
        Search(candidates("c"), 0.5, 3.0),
        Search(candidates("a"), 1.0, 2.0),
    ]
    together = goodputs(truth, searches)
    assert together == [goodputs(truth, [search])[0] for search in searches]
    assert [f.run.scheduler for f in together] == ["b", "c", "a"]
    assert together[1].rate == GRID.rate(TOP), "half of the requests are good at every rate"


def test_a_good_guess_saves_runs() -> None:
    guessed, blind = Capacities(a=1.2), Capacities(a=1.2)
    goodputs(guessed, [Search(candidates("a"), 1.0, 1.25)])
    goodputs(blind, [Search(candidates("a"), 1.0)])
    assert guessed.asked <= 4 < blind.asked


def test_those_that_came_near_go_on_alone() -> None:
    """Ten candidates do not cost ten times one."""
    named = {f"s{n}": 2.0 + n / 10 for n in range(10)}
    many = Capacities(**named)
    (found,) = goodputs(many, [Search(candidates(*named), 1.0, 3.0)])
    assert found.run.scheduler == "s9"
    assert many.asked <= 10 + 10 + 3 + 3


# What is kept


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Run]]:
    """The runs that a made-up simulator was asked for; results go to ``tmp_path``."""
    asked: list[Run] = []
    factors = {"stock": 0.4, "duet": 0.6, "fixed-split": 0.5}

    def simulate(run: Run, _: Path) -> dict[str, Any]:
        asked.append(run)
        workload = WORKLOADS[run.workload]
        capacity = factors.get(run.system, 0.3) * workload.highest
        figures = made_up(0.0)
        by_bound = {
            f"{bound:g}": {
                "good_requests_share": min(1.0, capacity * (bound / 100) ** 0.2 / run.rate),
                "request_goodput": 2.0,
            }
            for bound in BOUNDS_MS
        }
        del figures["good_requests_share"], figures["request_goodput"]
        return figures | {"by_bound": by_bound, "cpu_s": 1.0}

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(runs_module, "_pool", lambda: pool)
        monkeypatch.setattr(runs_module, "simulate", simulate)
        for module in (runs_module, experiments):
            monkeypatch.setattr(module, "RESULTS", tmp_path)
        yield asked


def test_a_run_on_disk_is_not_run_again(simulated: list[Run], monkeypatch, tmp_path) -> None:
    run = Run(WORKLOAD, "duet", 2.0)
    first = Runs(tmp_path).of([run, run], "")
    assert Runs(tmp_path).of([run], "")[0] == first[0] == first[1]
    assert simulated == [run]
    with (tmp_path / "runs.jsonl").open("a") as lines:
        lines.write('{"key": "')  # stopped while it was written
    monkeypatch.setitem(WORKLOADS, WORKLOAD, replace(GRID, count=7))
    Runs(tmp_path).of([run], "")
    assert simulated == [run, run], "another workload of the same name"
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").open()]
    assert [row["code"] for row in rows] == [run.code]


def test_what_is_not_told_the_bound_is_run_once(simulated: list[Run], tmp_path) -> None:
    runs, rate = Runs(tmp_path), 7.5
    for scheduler, times in (
        ("stock", 1),
        ("fixed-split:48", 1),
        ("disaggregated", 1),
        ("duet", 3),
    ):
        simulated.clear()
        asked = [Run(WORKLOAD, scheduler, rate, tbt_slo_ms=bound) for bound in BOUNDS_MS]
        figures = runs.of(asked, "")
        assert len(simulated) == times
        assert len({f["good_requests_share"] for f in figures}) == 3


def test_one_command_makes_everything(simulated: list[Run], monkeypatch, tmp_path) -> None:
    page = tmp_path / "evaluation.md"
    page.write_text(experiments.PAGE.read_text())
    monkeypatch.setattr(experiments, "PAGE", page)
    experiments.everything(tmp_path)
    for name in ("goodput", "sweep", "ratios", "ablation", "anchors"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        table = page.read_text().split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        lines = [line for line in table.splitlines() if line.startswith("|")]
        # These have several rows in a line.
        several = {"ratios": len(experiments.RATIOS), "anchors": len(rows) // 4}
        expected = several.get(name, len(rows))
        assert len(lines) == 2 + expected, name
        assert len({line.count("|") for line in lines}) == 1, "as many cells in each line"
    goodput = json.loads((tmp_path / "goodput.json").read_text())["rows"]
    kinds = {(row["tbt_slo_ms"], row["kind"]) for row in goodput}
    assert {kind for bound, kind in kinds if bound == 100} == set(experiments.KINDS)
    for row in goodput:
        assert row["goodput_90"] >= row["goodput"] > 0
        assert row["system"].startswith(("stock", "duet", "fixed-split", "disagg", "p"))
    assert len(simulated) == len({run.key for run in simulated}), "no run twice"
    asked = len(simulated)
    experiments.everything(tmp_path)
    assert len(simulated) == asked, "all of it is on disk"


def test_ninety_percent_is_looked_for_from_the_goodput(simulated: list[Run], tmp_path) -> None:
    runs = Runs(tmp_path)
    (most,) = goodputs(runs, [Search((Run(WORKLOAD, "duet"),))])
    asked = len(simulated)
    (many,) = goodputs(runs, [Search(most.others, MANY, most.rate)])
    # 99 % and 90 % of 60 % of the highest rate, in steps of 5 %.
    assert many.rate == pytest.approx(most.rate * 1.05**2, rel=0.06)
    assert len(simulated) - asked <= 4
