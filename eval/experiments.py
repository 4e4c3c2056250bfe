# SPDX-License-Identifier: Apache-2.0
"""The simulated experiments, one command each; results under eval/results/sim.

    python eval/experiments.py goodput --traces FOLDER
    python eval/experiments.py sweep --traces FOLDER
    python eval/experiments.py ratios --traces FOLDER
    python eval/experiments.py ablation --traces FOLDER
    python eval/experiments.py tables        # into docs/evaluation.md

FOLDER holds the public traces: azure-code-2023.csv and azure-conv-2023.csv
(Azure/AzurePublicDataset), mooncake-conversation.jsonl (kvcache-ai/Mooncake). A run that is
on disk and whose code has not changed is not run again. Each writes a JSON file and a plot.
"""

from __future__ import annotations

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
    DEFAULT_BUDGET,
    HERE,
    RESULTS,
    STOCK_BUDGETS,
    WORKLOADS,
    Run,
    Runs,
    goodputs,
)

from vllm_duet.report import COLOURS
from vllm_duet.sim.results import provenance

app = typer.Typer(no_args_is_help=True, add_completion=False)
Traces = Annotated[Path, typer.Option(exists=True, file_okay=False, help="The public traces.")]

TRACES = ("azure-code", "azure-conv", "mooncake")
TIGHT_BUDGETS = (256, 512, 1024, 2048, DEFAULT_BUDGET)
"""Those worth a search where the bound is under 100 ms."""
MODEL_ERRORS = (0.0, 0.1, 0.2)
TABLE_ERROR = 0.1


@app.command()
def goodput(traces: Traces) -> None:
    """The highest rate within p99 TBT and TTFT limits: duet, and what it has to beat."""
    runs, rows = Runs(traces), []
    for bound in (100.0, 50.0, 25.0):
        for workload in (*TRACES, "4096/512"):
            budgets = STOCK_BUDGETS if bound == 100 else TIGHT_BUDGETS
            stock = [Run(workload, "stock", 0, b, bound) for b in budgets]
            duet = [Run(workload, "duet", 0, tbt_slo_ms=bound, model_error=e) for e in MODEL_ERRORS]
            others = [
                Run(workload, name, 0, tbt_slo_ms=bound, model_error=error)
                for name, error in (
                    *(("paper", error) for error in MODEL_ERRORS),
                    ("fixed-split", 0.0),
                    ("disaggregated", 0.0),
                )
                if bound == 100
            ]
            asked = stock + duet + others
            found = goodputs(runs, asked)
            best = max(found[: len(stock)])
            default = found[budgets.index(DEFAULT_BUDGET)]
            rows += [
                {
                    "workload": workload,
                    "tbt_slo_ms": bound,
                    "ttft_slo_ms": WORKLOADS[workload].ttft_slo_ms,
                    "system": run.label,
                    "model_error": run.model_error,
                    "goodput": rate,
                    "over_default": rate / default if default else None,
                    "over_best_static": rate / best if best else None,
                }
                for run, rate in zip(asked, found, strict=True)
            ]
            _write("goodput", rows)
    _print(
        rows,
        ("workload", "tbt_slo_ms", "system", "model_error"),
        ("goodput", "over_default", "over_best_static"),
    )


@app.command()
def sweep(traces: Traces) -> None:
    """Throughput, TBT and TTFT against the rate, on the public traces."""
    runs, rows = Runs(traces), []
    shares = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15)
    for workload in TRACES:
        stock = [Run(workload, "stock", 0, b) for b in STOCK_BUDGETS]
        found = goodputs(runs, stock)
        best = STOCK_BUDGETS[max(range(len(stock)), key=lambda i: found[i])]
        rates = [round(max(found) * share, 3) for share in shares]
        asked = [
            Run(workload, name, rate, budget, model_error=error)
            for rate in rates
            for name, budget, error in (
                ("stock", DEFAULT_BUDGET, 0.0),
                ("stock", best, 0.0),
                *(
                    (name, DEFAULT_BUDGET, error)
                    for name in ("duet", "paper")
                    for error in MODEL_ERRORS
                ),
                ("fixed-split", DEFAULT_BUDGET, 0.0),
                ("disaggregated", DEFAULT_BUDGET, 0.0),
            )
        ]
        rows += _rows(asked, runs.of(asked, workload))
        _write("sweep", rows)
    _plot_sweep(rows)
    _print(rows, ("workload", "rate", "system", "model_error"), FIGURES)


@app.command()
def ratios(traces: Traces) -> None:
    """Goodput by the ratio of prompt to answer, and with long contexts; bound 100 ms."""
    runs, rows = Runs(traces), []
    names = [name for name, workload in WORKLOADS.items() if workload.file is None]
    for name in names:
        asked = [Run(name, "stock", 0, b) for b in (512, 1024, 2048, 4096, DEFAULT_BUDGET)]
        static = len(asked)
        asked += [Run(name, "duet", 0, model_error=error) for error in MODEL_ERRORS]
        asked.append(Run(name, "paper", 0, model_error=TABLE_ERROR))
        found = goodputs(runs, asked)
        best = max(found[:static])
        rows += [
            {
                "workload": name,
                "system": run.label,
                "model_error": run.model_error,
                "goodput": rate,
                "over_best_static": rate / best if best else None,
            }
            for run, rate in zip(asked, found, strict=True)
        ]
        _write("ratios", rows)
    _print(rows, ("workload", "system"), ("goodput", "over_best_static"))


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
    for workload in (*TRACES, "4096/512"):
        found = goodputs(runs, [Run(workload, "stock", 0, b) for b in STOCK_BUDGETS])
        rate = round(max(found), 3)
        best = STOCK_BUDGETS[max(range(len(found)), key=lambda i: found[i])]
        asked = [Run(workload, "stock", rate, best)]
        asked += [
            Run(workload, name, rate, model_error=error)
            for name in ABLATIONS
            for error in MODEL_ERRORS
        ]
        rows += _rows(asked, runs.of(asked, workload))
        _write("ablation", rows)
    _print(rows, ("workload", "rate", "system"), FIGURES)


@app.command()
def tables() -> None:
    """Write the results that are there into the tables of docs/evaluation.md."""
    page = PAGE.read_text()
    for name, table in (
        ("goodput", _goodput_table),
        ("sweep", _sweep_table),
        ("ratios", _ratios_table),
        ("ablation", _sweep_table),
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


def _goodput_table(rows: list[dict[str, Any]]) -> str:
    found = {
        (r["workload"], r["tbt_slo_ms"], r["system"], r["model_error"]): r["goodput"] for r in rows
    }
    lines = []
    for workload, bound in dict.fromkeys(key[:2] for key in found):
        mine = {key[2:]: rate for key, rate in found.items() if key[:2] == (workload, bound)}
        static = {name: rate for (name, _), rate in mine.items() if name.startswith("stock-")}
        best = max(static, key=lambda name: static[name])
        duet = [mine["duet", error] for error in MODEL_ERRORS]
        over = [f"{duet[1] / rate:.2f}" if rate else "-" for rate in (static[best],)]
        default = static[f"stock-{DEFAULT_BUDGET}"]
        others = [
            mine.get(key)
            for key in (("paper", TABLE_ERROR), ("fixed-split", 0.0), ("disaggregated", 0.0))
        ]
        lines.append(
            [
                workload,
                f"{bound:g}",
                _rate(default),
                f"{_rate(static[best])} ({best.removeprefix('stock-')})",
                *map(_rate, duet),
                f"{duet[1] / default:.2f}" if default else "-",
                *over,
                *("" if rate is None else _rate(rate) for rate in others),
            ]
        )
    header = "workload, TBT bound ms, stock default, best static (budget), duet 0 %, duet 10 %,"
    header += " duet 20 %, 10 % over default, 10 % over best, paper, fixed split, disaggregated"
    return _markdown(header.split(", "), lines)


def _in_tables(row: dict[str, Any]) -> bool:
    """Whether a page with one model error has the row: all of what does not forecast."""
    forecasts = row["system"].startswith(("duet", "paper"))
    return not forecasts or row["model_error"] == TABLE_ERROR


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["workload"],
            f"{row['rate']:.2f}",
            row["system"] + (f" {row['model_error']:.0%}" if row["system"] == "duet" else ""),
            *(f"{row[f]:,.0f}" for f in FIGURES[:3]),
            *(f"{row[f]:.1f}" for f in FIGURES[3:5]),
            f"{row['split_share']:.0%}",
        ]
        for row in rows
        if _in_tables(row)
    ]
    header = "workload, requests/s, system, tokens/s out, TTFT mean, TTFT p99, TBT mean, TBT p99,"
    return _markdown((header + " time split").split(", "), lines)


def _ratios_table(rows: list[dict[str, Any]]) -> str:
    found = {(r["workload"], r["system"], r["model_error"]): r["goodput"] for r in rows}
    lines = []
    for workload in dict.fromkeys(key[0] for key in found):
        mine = {key[1:]: rate for key, rate in found.items() if key[0] == workload}
        static = {name: rate for (name, _), rate in mine.items() if name.startswith("stock-")}
        best = max(static, key=lambda name: static[name])
        duet = [mine["duet", error] for error in MODEL_ERRORS]
        ratio = f"{mine['duet', TABLE_ERROR] / static[best]:.2f}" if static[best] else "-"
        budget = best.removeprefix("stock-")
        default = _rate(static[f"stock-{DEFAULT_BUDGET}"])
        lines.append(
            [
                workload,
                default,
                f"{_rate(static[best])} ({budget})",
                *map(_rate, duet),
                ratio,
                _rate(mine["paper", TABLE_ERROR]),
            ]
        )
    header = "in/out, stock default, best static (budget), duet 0 %, duet 10 %, duet 20 %,"
    header += " 10 % over best, paper"
    return _markdown(header.split(", "), lines)


FIGURES = (
    "output_throughput",
    "ttft_mean_ms",
    "ttft_p99_ms",
    "tbt_mean_ms",
    "tbt_p99_ms",
    "tbt_within_slo",
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
            "tbt_within_slo": f["tbt_within_slo"],
            "split_share": f["lane_utilization"]["decode"],
            "preemptions": f["preemptions"],
        }
        for run, f in zip(asked, figures, strict=True)
    ]


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    head = provenance(shlex.join(["python", "eval/experiments.py", *sys.argv[1:2]]))
    head |= {
        "model": "Qwen3-8B, bf16",
        "gpu": "h100-sxm profile, not measured",
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
        mine = [row for row in rows if row["workload"] == workload and _in_tables(row)]
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
