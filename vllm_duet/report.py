# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page that compares simulated runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""

MODE_COLOURS = {
    "mixed": "#d55e00",
    "decode_only": "#0072b2",
    "prefill_only": "#e69f00",
    "split": "#009e73",
}
LANES = ("gpu", "decode", "prefill")
TIMELINE_MS = 2000.0
CDF_POINTS = 300
MAX_CDFS = 6


class ReportError(ValueError):
    """Runs that cannot be reported, in one sentence."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What ``vllm-duet simulate`` wrote to ``path``."""

    path: Path
    summary: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> RunFolder:
        """
        Raises:
            ReportError: there is no summary, or it is not one.
        """
        file = path / "summary.json"
        if not file.is_file():
            raise ReportError(f"{path} has no summary.json: give folders that `simulate` wrote")
        try:
            summary = json.loads(file.read_text())
        except ValueError as error:
            raise ReportError(f"{file}: not JSON ({error})") from None
        for key in ("scheduler", "trace", "rate", "ttft_ms", "tbt_ms", "steps"):
            if not isinstance(summary, dict) or key not in summary:
                raise ReportError(f"{file} has no {key!r}")
        return cls(path, summary)

    @property
    def label(self) -> str:
        name, budget = self.summary["scheduler"], self.summary["max_num_batched_tokens"]
        return f"{name}, {budget} tokens" if name == "stock" else str(name)

    @property
    def setting(self) -> tuple[str, float]:
        """Which runs it may be compared with: trace and model error."""
        return self.summary["trace"]["name"], self.summary["model_error"]

    @property
    def title(self) -> str:
        summary = self.summary
        return (
            f"{summary['trace']['name']} at {summary['rate']:.4g} requests/s, {summary['model']} on"
            f" {summary['gpu']}, forecasts wrong by {summary['model_error']:.0%}"
        )

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """
        Raises:
            ReportError: the file is missing or a line is not JSON.
        """
        file = self.path / name
        if not file.is_file():
            raise ReportError(f"{self.path} has no {name}")
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ReportError(f"{file}, line {number}: not JSON ({error})") from None


Column = tuple[str, Callable[[dict[str, Any]], Any], str, int]
COLUMNS: tuple[Column, ...] = (
    ("tokens/s out", lambda s: s["output_throughput"], ",.0f", 1),
    ("TTFT mean ms", lambda s: s["ttft_ms"]["mean"], ",.0f", -1),
    ("TTFT p50 ms", lambda s: s["ttft_ms"]["p50"], ",.0f", -1),
    ("TTFT p99 ms", lambda s: s["ttft_ms"]["p99"], ",.0f", -1),
    ("TBT mean ms", lambda s: s["tbt_ms"]["mean"], ".1f", -1),
    ("TBT p99 ms", lambda s: s["tbt_ms"]["p99"], ".1f", -1),
    ("within bound", lambda s: s["tbt_within_slo"], ".2%", 1),
    ("aggregated", lambda s: s["steps"]["aggregated"], ",d", 0),
    ("capped", lambda s: s["steps"]["capped"], ",d", 0),
    ("split", lambda s: s["steps"]["split"], ",d", 0),
    ("preemptions", lambda s: s["preemptions"], ",d", 0),
)
"""Title, value, format, and whether more (1) or less (-1) is better."""


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page for the runs in ``folders``; equal bytes for equal runs.

    Raises:
        ReportError: a folder holds no run, or matplotlib and jinja2 are not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
    except ImportError:
        raise ReportError("the report needs more packages: pip install 'vllm-duet[sim]'") from None
    runs = [RunFolder.load(folder) for folder in folders]
    runs.sort(key=lambda run: (run.setting, run.summary["rate"], run.label, str(run.path)))
    labels = dict.fromkeys(run.label for run in runs)
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    sections = [
        {
            "title": title,
            "figures": [{"svg": Markup(svg), "caption": caption} for svg, caption in figures],
        }
        for title, figures in (
            ("Against the rate", list(_by_rate(runs, colours))),
            ("Distributions", list(_distributions(runs, colours))),
            ("Timelines", list(_timelines(runs))),
        )
        if figures
    ]
    environment = Environment(loader=PackageLoader("vllm_duet"), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        columns=("scheduler", *(column[0] for column in COLUMNS)),
        groups=list(_tables(runs)),
        sections=sections,
        runs=[run.summary for run in runs],
    )
    out.write_text(page)


def _same_load(run: RunFolder) -> tuple[tuple[str, float], float]:
    return run.setting, run.summary["rate"]


def _tables(runs: Sequence[RunFolder]) -> Iterator[dict[str, Any]]:
    for _, found in groupby(runs, key=_same_load):
        group = list(found)
        rows = [[{"text": run.label, "best": False}] for run in group]
        for _, value, form, better in COLUMNS:
            values = [value(run.summary) for run in group]
            best = max(v * better for v in values)
            for row, v in zip(rows, values, strict=True):
                marked = better != 0 and len(group) > 1 and v * better == best
                row.append({"text": format(v, form), "best": marked})
        yield {"title": group[0].title, "rows": rows}


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("the report needs more packages: pip install 'vllm-duet[sim]'") from None
    # Text stays text, and equal runs give equal bytes.
    rcParams["svg.fonttype"], rcParams["svg.hashsalt"] = "none", "vllm-duet"
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _by_rate(runs: Sequence[RunFolder], colours: dict[str, str]) -> Iterator[tuple[str, str]]:
    panels = (
        ("output tokens/s", lambda s: s["output_throughput"], "linear"),
        ("mean TBT, ms", lambda s: s["tbt_ms"]["mean"], "linear"),
        ("p99 TBT, ms", lambda s: s["tbt_ms"]["p99"], "linear"),
        ("mean TTFT, ms", lambda s: s["ttft_ms"]["mean"], "log"),
        ("p99 TTFT, ms", lambda s: s["ttft_ms"]["p99"], "log"),
    )
    for (trace, error), found in groupby(runs, key=lambda run: run.setting):
        group = list(found)
        if len({run.summary["rate"] for run in group}) < 2:
            continue
        figure, axes = _figure(17, 3.6, len(panels))
        for axis, (label, value, scale) in zip(axes, panels, strict=True):
            for name, colour in colours.items():
                points = [
                    (run.summary["rate"], value(run.summary)) for run in group if run.label == name
                ]
                if points:
                    axis.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=name)
            if label.startswith("p99 TBT"):
                bound = group[0].summary["tbt_slo_ms"]
                axis.axhline(bound, color="grey", linestyle="--", linewidth=1)
            axis.set(xlabel="requests/s", ylabel=label, yscale=scale)
        axes[0].legend(fontsize=8)
        yield _svg(figure), f"{trace}, forecasts wrong by {error:.0%}; the dashed line is the bound"


def _distributions(runs: Sequence[RunFolder], colours: dict[str, str]) -> Iterator[tuple[str, str]]:
    groups = [list(found) for _, found in groupby(runs, key=_same_load)]
    for group in groups[:MAX_CDFS]:
        figure, axes = _figure(11, 3.6, 2)
        shares = np.linspace(0, 1, CDF_POINTS)
        for run in group:
            requests = list(run.lines("requests.jsonl"))
            gaps = np.concatenate([np.diff(r["token_ms"]) for r in requests] or [np.empty(0)])
            firsts = np.array([r["ttft_ms"] for r in requests])
            for axis, values in zip(axes, (gaps, firsts), strict=True):
                if values.size:
                    points = np.maximum(np.quantile(values, shares), 0.1)
                    axis.plot(points, shares, color=colours[run.label], label=run.label)
        axes[0].axvline(group[0].summary["tbt_slo_ms"], color="grey", linestyle="--", linewidth=1)
        for axis, label in zip(axes, ("TBT, ms", "TTFT, ms"), strict=True):
            axis.set(xlabel=label, ylabel="share at most", xscale="log", ylim=(0, 1))
        axes[0].legend(fontsize=8)
        yield _svg(figure), f"{group[0].title}; the dashed line is the bound"


def _timelines(runs: Sequence[RunFolder]) -> Iterator[tuple[str, str]]:
    """For each scheduler its busiest run, around the step with the most prefill beside."""
    for label in dict.fromkeys(run.label for run in runs):
        run = max((r for r in runs if r.label == label), key=lambda r: r.summary["rate"])
        steps = list(run.lines("steps.jsonl"))
        if not steps:
            continue
        middle = max(steps, key=lambda s: (s["lane"] == "prefill", s["prefill_tokens"]))["start_ms"]
        first = max(0.0, middle - TIMELINE_MS / 2)
        shown = [s for s in steps if s["end_ms"] > first and s["start_ms"] < first + TIMELINE_MS]
        figure, (axis,) = _figure(13, 2.2, 1)
        for row, lane in enumerate(LANES):
            for mode, colour in MODE_COLOURS.items():
                bars = [
                    (s["start_ms"], s["end_ms"] - s["start_ms"])
                    for s in shown
                    if s["lane"] == lane and s["mode"] == mode
                ]
                if bars:
                    axis.broken_barh(
                        bars, (row - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.4
                    )
        axis.set(
            xlim=(first, first + TIMELINE_MS),
            xlabel="ms",
            yticks=range(len(LANES)),
            yticklabels=LANES,
            ylim=(-0.6, len(LANES) - 0.4),
        )
        for mode, colour in MODE_COLOURS.items():
            axis.plot([], [], "s", color=colour, label=mode.replace("_", " "))
        axis.legend(ncols=4, fontsize=7, loc="upper right")
        yield _svg(figure), f"{label}: {run.title}"
