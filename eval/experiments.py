# SPDX-License-Identifier: Apache-2.0
"""The simulated experiments; results under eval/results/sim.

    python eval/experiments.py all --traces FOLDER
    python eval/experiments.py goodput --traces FOLDER
    python eval/experiments.py sweep --traces FOLDER
    python eval/experiments.py ratios --traces FOLDER
    python eval/experiments.py ablation --traces FOLDER
    python eval/experiments.py anchors --traces FOLDER
    python eval/experiments.py tables        # into docs/evaluation.md

FOLDER holds the public traces: azure-code-2023.csv and azure-conv-2023.csv
(Azure/AzurePublicDataset), mooncake-conversation.jsonl (kvcache-ai/Mooncake). Each writes a
JSON file, ``sweep`` plots too, and ``all`` does all of it and fills the tables. A run that is on
disk and whose code has not changed is not run again, so any of them can be stopped.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import (
    BOUNDS_MS,
    DEFAULT_BUDGET,
    HERE,
    MANY,
    MOST,
    RESULTS,
    WORKLOADS,
    Found,
    Run,
    Runs,
    Search,
    goodputs,
)

from vllm_duet.report import COLOURS
from vllm_duet.sim.results import provenance

app = typer.Typer(no_args_is_help=True, add_completion=False)
Traces = Annotated[Path, typer.Option(exists=True, file_okay=False, help="The public traces.")]

TRACES = ("azure-code", "azure-conv", "mooncake")
MAIN = (*TRACES, "4096/512")
RATIOS = tuple(name for name, workload in WORKLOADS.items() if workload.file is None)
MODEL_ERRORS = (0.0, 0.1, 0.2)
TABLE_ERROR = 0.1
SHORT = (("default", 0.0), ("split", 0.0), ("duet", TABLE_ERROR))
"""Kinds of system, and the error of their forecasts."""

# The static systems that are searched over: (scheduler, token budget).
STATIC: dict[str, tuple[tuple[str, int], ...]] = {
    "budget": tuple(("stock", budget) for budget in (2048, 1024, 512, 4096, 256, 16384, 8192)),
    "split": (
        *((f"fixed-split:{sms}", DEFAULT_BUDGET) for sms in (48, 64, 56, 40, 32, 80, 24)),
        *((f"fixed-split:{sms}", 16384) for sms in (48, 64)),
    ),
    "cap": tuple((f"prefill-cap:{tokens}", DEFAULT_BUDGET) for tokens in (1024, 512, 2048, 256)),
    "interval": tuple(
        (f"prefill-interval:{steps}", budget) for budget in (1024, 2048) for steps in (2, 4)
    ),
}
"""Likely ones first. No budget over 2048 keeps a bound under 100 ms."""


@app.command("all")
def everything(traces: Traces) -> None:
    """Every experiment, and the tables."""
    for command in (goodput, ratios, sweep, ablation, anchors):
        command(traces)
    tables()


def _static(kind: str, workload: str, bound_ms: float) -> tuple[Run, ...]:
    most = max(budget for _, budget in STATIC[kind])
    if kind == "budget" and bound_ms < 100:
        most = 2048
    return tuple(
        Run(workload, scheduler, budget=budget, tbt_slo_ms=bound_ms)
        for scheduler, budget in STATIC[kind]
        if budget <= most
    )


def _best_budgets(
    runs: Runs, workloads: Sequence[str], bound_ms: float, guesses: dict[str, float] | None = None
) -> dict[str, Found]:
    """For each workload the best static budget, and its goodput."""
    found = goodputs(
        runs,
        [
            Search(_static("budget", name, bound_ms), guess=(guesses or {}).get(name))
            for name in workloads
        ],
    )
    return dict(zip(workloads, found, strict=True))


def _told(workload: str, scheduler: str, bound_ms: float, error: float) -> tuple[Run]:
    return (Run(workload, scheduler, tbt_slo_ms=bound_ms, model_error=error),)


def _asked(workload: str, bound_ms: float) -> list[tuple[str, tuple[Run, ...]]]:
    """What is searched beside the best static budget, and what the tables call it."""
    asked: list[tuple[str, tuple[Run, ...]]] = [
        ("default", (Run(workload, "stock", tbt_slo_ms=bound_ms),)),
        ("split", _static("split", workload, bound_ms)),
        *(
            ("duet", _told(workload, "duet", bound_ms, error))
            for error in (MODEL_ERRORS if bound_ms > 25 else (TABLE_ERROR,))
        ),
    ]
    if bound_ms > 25:
        asked.append(("disaggregated", (Run(workload, "disaggregated", tbt_slo_ms=bound_ms),)))
    if bound_ms == 100:
        asked += [(kind, _static(kind, workload, bound_ms)) for kind in ("cap", "interval")]
        asked.append(("paper", _told(workload, "paper", bound_ms, TABLE_ERROR)))
    return asked


Short = Annotated[bool, typer.Option(help="Some systems at two bounds: a fifth of the runs.")]


@app.command()
def goodput(traces: Traces, short: Short = False) -> None:
    """The highest rate with good requests: duet, and what it has to beat."""
    runs, rows = Runs(traces), []
    guesses: dict[str, float] = {}
    for bound in BOUNDS_MS[:2] if short else BOUNDS_MS:
        best = _best_budgets(runs, MAIN, bound, guesses)
        guesses = {name: found.rate or WORKLOADS[name].lowest for name, found in best.items()}
        asked = [(name, *pair) for name in MAIN for pair in _asked(name, bound)]
        if short:
            asked = [a for a in asked if (a[1], a[2][0].model_error) in SHORT]
        found = goodputs(runs, [Search(runs_, guess=guesses[name]) for name, _, runs_ in asked])
        kinds = [*((name, "budget") for name in MAIN), *((name, kind) for name, kind, _ in asked)]
        at_most = [*best.values(), *found]
        # Where 99 % found nothing, neither the order nor the rate says anything.
        at_many: Sequence[Found | None] = [None] * len(at_most)
        if not short:
            at_many = goodputs(runs, [Search(f.others, MANY, f.rate or None) for f in at_most])
        rows += [
            _found_row(name, kind, one, many, best[name].rate)
            for (name, kind), one, many in zip(kinds, at_most, at_many, strict=True)
        ]
        _write("goodput", rows)
    _print(
        rows,
        ("workload", "tbt_slo_ms", "kind", "system", "model_error"),
        ("goodput", "goodput_90", "request_goodput", "over_best_static"),
    )


def _found_row(
    workload: str, kind: str, most: Found, many: Found | None, best: float
) -> dict[str, Any]:
    return {
        "workload": workload,
        "tbt_slo_ms": most.run.tbt_slo_ms,
        "ttft_slo_ms": WORKLOADS[workload].ttft_slo_ms,
        "kind": kind,
        "system": most.run.label,
        "model_error": most.run.model_error,
        "goodput": most.rate,
        "goodput_90": many.rate if many else None,
        "system_90": many.run.label if many else None,
        # What vllm bench prints at the rate of goodput, which is the lowest where there is none.
        "request_goodput": most.figures["request_goodput"],
        "ttft_p99_ms": most.figures["ttft_ms"]["p99"],
        "over_best_static": most.rate / best if best else None,
    }


@app.command()
def sweep(traces: Traces) -> None:
    """Throughput, TBT, TTFT and good requests against the rate, on the public traces."""
    runs, rows = Runs(traces), []
    best = _best_budgets(runs, TRACES, 100.0)
    searches = [
        Search(_static("split", name, 100.0), guess=best[name].rate or None) for name in TRACES
    ]
    splits = goodputs(runs, searches)
    for workload, split in zip(TRACES, splits, strict=True):
        rates = [round(best[workload].run.rate * share, 3) for share in (0.3, 0.6, 0.85, 1.0, 1.15)]
        asked = [
            Run(workload, name, rate, budget, model_error=error)
            for rate in rates
            for name, budget, error in (
                ("stock", DEFAULT_BUDGET, 0.0),
                ("stock", best[workload].run.budget, 0.0),
                (split.run.scheduler, split.run.budget, 0.0),
                ("duet", DEFAULT_BUDGET, TABLE_ERROR),
                ("paper", DEFAULT_BUDGET, TABLE_ERROR),
                ("disaggregated", DEFAULT_BUDGET, 0.0),
            )
        ]
        asked = list(dict.fromkeys(asked))
        rows += _rows(asked, runs.of(asked, workload))
        _write("sweep", rows)
    _plot_sweep(rows)
    _print(rows, ("workload", "rate", "system", "model_error"), FIGURES)


@app.command()
def ratios(traces: Traces) -> None:
    """Goodput by the ratio of prompt to answer, and with long contexts; bound 100 ms."""
    runs, rows = Runs(traces), []
    best = _best_budgets(runs, RATIOS, 100.0)
    asked = [
        (name, *pair)
        for name in RATIOS
        for pair in (
            ("default", (Run(name, "stock"),)),
            ("split", _static("split", name, 100.0)),
            ("duet", _told(name, "duet", 100.0, TABLE_ERROR)),
        )
    ]
    found = goodputs(runs, [Search(a[2], guess=best[a[0]].rate or None) for a in asked])
    kinds = [*((name, "budget") for name in RATIOS), *((name, kind) for name, kind, _ in asked)]
    rows = [
        {
            "workload": name,
            "kind": kind,
            "system": f.run.label,
            "model_error": f.run.model_error,
            "goodput": f.rate,
            "over_best_static": f.rate / best[name].rate if best[name].rate else None,
        }
        for (name, kind), f in zip(kinds, [*best.values(), *found], strict=True)
    ]
    _write("ratios", rows)
    _print(rows, ("workload", "kind", "system"), ("goodput", "over_best_static"))


ABLATIONS = (
    "duet",
    "duet-join-after-k",
    "duet-one-in-flight",
    "duet-no-caps",
    "duet-no-splits",
    "duet-no-contention",
    "duet-no-correction",
    "duet-bound-only",
    "duet-counts-tokens",
    "duet-counts-alone",
    "duet-counts-added",
    "paper",
)


@app.command()
def ablation(traces: Traces) -> None:
    """Each of our additions to the paper taken away, and other objectives.

    At the highest rate that the best static budget serves within the limits.
    """
    runs, rows = Runs(traces), []
    for workload, best in _best_budgets(runs, MAIN, 100.0).items():
        asked = [best.run]
        asked += [Run(workload, name, best.run.rate, model_error=TABLE_ERROR) for name in ABLATIONS]
        rows += _rows(asked, runs.of(asked, workload))
        _write("ablation", rows)
    _print(rows, ("workload", "rate", "system"), FIGURES)


ANCHORED = ("azure-conv", "4096/512")
WRONG = 0.3
SEEDS = (0, 1)
FINE_STEP = 1.01


@app.command()
def anchors(traces: Traces) -> None:
    """Goodput of a policy whose profile is 30 % wrong, with and without steps measured at start.

    Bound 100 ms. A seed draws which of the profile's rates are too high and which too low, and
    the noise. Rates are told apart by 1 %.
    """
    runs, rows = Runs(traces), []
    known = json.loads((RESULTS / "goodput.json").read_text())["rows"]
    known = [row for row in known if row["kind"] == "duet" and row["tbt_slo_ms"] == 100]
    guesses = {row["workload"]: row["goodput"] for row in known}
    for seed, workload in itertools.product(SEEDS, ANCHORED):
        asked = [
            Run(workload, "duet", model_error=error, measured=measured, seed=seed)
            for error, measured in ((0.0, False), (0.0, True), (WRONG, False), (WRONG, True))
        ]
        guess = guesses[workload]
        found = goodputs(runs, [Search((run,), guess=guess, step=FINE_STEP) for run in asked])
        rows += [
            {
                "workload": workload,
                "seed": seed,
                "model_error": f.run.model_error,
                "measured_at_start": f.run.measured,
                "goodput": f.rate,
                "over_right_profile": f.rate / found[0].rate if found[0].rate else None,
            }
            for f in found
        ]
        _write("anchors", rows)
    _print(
        rows,
        ("workload", "seed", "model_error", "measured_at_start"),
        ("goodput", "over_right_profile"),
    )


@app.command()
def tables() -> None:
    """Write the results that are there into the tables of docs/evaluation.md."""
    page = PAGE.read_text()
    for name, table in (
        ("goodput", _goodput_table),
        ("sweep", _sweep_table),
        ("ratios", _ratios_table),
        ("ablation", _sweep_table),
        ("anchors", _anchors_table),
    ):
        file = RESULTS / f"{name}.json"
        if file.exists():
            first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
            head, rest = page.split(first)
            _, tail = rest.split(last)
            page = head + first + table(json.loads(file.read_text())["rows"]) + last + tail
    PAGE.write_text(page)


PAGE = HERE.parent / "docs" / "evaluation.md"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def _rate(value: float) -> str:
    return f"{value:.2f}" if value else "none"


KINDS = {
    "default": "stock, default budget",
    "budget": "best static budget",
    "split": "best static split",
    "cap": "best prefill cap",
    "interval": "best prefill interval",
    "duet": "duet",
    "paper": "paper, forecasts 10 % wrong",
    "disaggregated": "disaggregated, per GPU",
}


def _goodput_table(rows: list[dict[str, Any]]) -> str:
    """Of each workload and bound, a line for each system."""
    lines = []
    for row in sorted(rows, key=_place):
        name = KINDS[row["kind"]]
        if row["kind"] == "duet":
            name += f", forecasts {row['model_error']:.0%} wrong"
        over = row["over_best_static"]
        lines.append(
            [
                row["workload"],
                f"{row['tbt_slo_ms']:g}",
                name,
                row["system"] if row["kind"] in STATIC else "",
                _rate(row["goodput"]),
                _rate(row["goodput_90"]) if row["goodput_90"] is not None else "",
                f"{row['request_goodput']:.2f}" if row["goodput"] else "",
                f"{over:.2f}" if over else "-",
            ]
        )
    header = "workload, TBT bound ms, system, which, goodput, at 90 %, vllm bench, over best budget"
    return _markdown(header.split(", "), lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    kinds = list(KINDS)
    workload = MAIN.index(row["workload"])
    return -row["tbt_slo_ms"], workload, kinds.index(row["kind"]), row["model_error"]


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["workload"],
            f"{row['rate']:.2f}",
            row["system"],
            *(f"{row[f]:,.0f}" for f in FIGURES[:3]),
            *(f"{row[f]:.1f}" for f in FIGURES[3:5]),
            f"{row['good_requests_share']:.1%}",
            f"{row['request_goodput']:.2f}",
            f"{row['split_share']:.0%}",
        ]
        for row in rows
    ]
    header = "workload, requests/s, system, tokens/s out, TTFT mean, TTFT p99, TBT mean, TBT p99,"
    return _markdown((header + " good, vllm bench, time split").split(", "), lines)


def _ratios_table(rows: list[dict[str, Any]]) -> str:
    found = {(row["workload"], row["kind"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        default, budget, split, duet = (
            found[name, kind] for kind in ("default", "budget", "split", "duet")
        )
        over = duet["over_best_static"]
        lines.append(
            [
                name,
                _rate(default["goodput"]),
                f"{_rate(budget['goodput'])} ({budget['system']})",
                f"{_rate(split['goodput'])} ({split['system']})",
                _rate(duet["goodput"]),
                f"{over:.2f}" if over else "-",
            ]
        )
    header = "in/out, stock default, best static budget, best static split, duet 10 %,"
    return _markdown((header + " duet over best budget").split(", "), lines)


def _anchors_table(rows: list[dict[str, Any]]) -> str:
    """Of each workload and draw, a line."""
    found = {
        (r["workload"], str(r["seed"]), r["model_error"], r["measured_at_start"]): r for r in rows
    }
    kinds = [(error, measured) for error in (0.0, WRONG) for measured in (False, True)]
    lines = []
    for case in dict.fromkeys(key[:2] for key in found):
        last = found[(*case, WRONG, True)]["over_right_profile"]
        goodputs_ = [_rate(found[(*case, *kind)]["goodput"]) for kind in kinds]
        lines.append([*case, *goodputs_, f"{last:.3f}" if last else "-"])
    header = (
        "workload, draw, right profile, and measured, 30 % wrong, and measured, over right profile"
    )
    return _markdown(header.split(", "), lines)


FIGURES = (
    "output_throughput",
    "ttft_mean_ms",
    "ttft_p99_ms",
    "tbt_mean_ms",
    "tbt_p99_ms",
    "good_requests_share",
    "request_goodput",
    "split_share",
)


def _rows(asked: Sequence[Run], figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "workload": run.workload,
            "rate": run.rate,
            "system": run.label,
            "model_error": run.model_error,
            "tbt_slo_ms": run.tbt_slo_ms,
            "output_throughput": f["output_throughput"],
            "ttft_mean_ms": f["ttft_ms"]["mean"],
            "ttft_p99_ms": f["ttft_ms"]["p99"],
            "tbt_mean_ms": f["tbt_ms"]["mean"],
            "tbt_p99_ms": f["tbt_ms"]["p99"],
            "good_requests_share": f["good_requests_share"],
            "request_goodput": f["request_goodput"],
            "split_share": f["lane_utilization"]["decode"],
            "preemptions": f["preemptions"],
        }
        for run, f in zip(asked, figures, strict=True)
    ]


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    asked = [*sys.argv[1:2], *(option for option in sys.argv if option == "--short")]
    head = provenance(shlex.join(["python", "eval/experiments.py", *asked]))
    head |= {
        "model": "Qwen3-8B, bf16",
        "gpu": "h100-sxm",
        "good": "TTFT within its limit, own p99 gap within the bound, no gap beyond 3 times it",
        "goodput": f"highest rate with {MOST:.0%} of requests good; goodput_90 with {MANY:.0%}",
        "requests": {name: workload.count for name, workload in WORKLOADS.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"provenance": head, "rows": rows}, indent=1) + "\n"
    )


def _plot_sweep(rows: list[dict[str, Any]]) -> None:
    panels = (
        ("output_throughput", "output tokens/s", "linear"),
        ("tbt_mean_ms", "mean TBT, ms", "linear"),
        ("tbt_p99_ms", "p99 TBT, ms", "log"),
        ("ttft_mean_ms", "mean TTFT, ms", "log"),
        ("ttft_p99_ms", "p99 TTFT, ms", "log"),
    )
    for workload in sorted({row["workload"] for row in rows}):
        mine = [row for row in rows if row["workload"] == workload]
        systems = list(dict.fromkeys(row["system"] for row in mine))
        figure = Figure(figsize=(20, 4), layout="constrained")
        for axes, (key, label, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for colour, system in zip(COLOURS, systems, strict=False):
                points = [(row["rate"], row[key]) for row in mine if row["system"] == system]
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=system)
            if key == "tbt_p99_ms":
                axes.axhline(100, color="grey", linestyle="--", linewidth=1)
            axes.set(xlabel="requests/s for each GPU", ylabel=label, yscale=scale)
        axes.legend()
        figure.suptitle(f"{workload}, simulated: Qwen3-8B on an H100, model error 10 %")
        figure.savefig(RESULTS / f"sweep-{workload}.svg", metadata={"Date": None})


def _print(rows: list[dict[str, Any]], names: Sequence[str], figures: Sequence[str]) -> None:
    table = Table(*names, *figures)
    for row in rows:
        cells = [f"{row[f]:.3g}" if row[f] is not None else "-" for f in figures]
        table.add_row(*(str(row[name]) for name in names), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    app()
