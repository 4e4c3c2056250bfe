# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page that compares simulated runs.

The tables come from summary.json alone. Every request and every step is read only for
the runs whose distributions and timelines are drawn, so that many runs stay quick.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart; one for each scheduler."""
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Tell apart runs of one scheduler with other options, and schedulers of one colour."""
MODE_COLOURS = {
    "aggregated": "#d55e00",
    "mixed": "#d55e00",  # what the simulator calls a batch of both, whole or capped
    "capped": "#cc79a7",
    "split": "#009e73",
    "decode_only": "#0072b2",
    "prefill_only": "#e69f00",
}
LANES = ("gpu", "decode", "prefill")
TIMELINE_MS = 2000.0
CDF_POINTS = 300
MAX_CDFS = 6
LEAST_MS = 0.1
"""What less is drawn as: a logarithmic axis has no zero, and tokens can come together."""

FloatArray = npt.NDArray[np.float64]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
P = TypeVar("P", bound="_Part")


class ReportError(ValueError):
    """Runs that cannot be reported, in one sentence."""


class _Part(BaseModel):
    """What the page uses of a file; there may be more in it."""

    model_config = ConfigDict(
        frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Spread(_Part):
    mean: float
    p50: float
    p99: float


class StepCounts(_Part):
    aggregated: int
    capped: int
    split: int
    decode_only: int
    prefill_only: int


class Trace(_Part):
    name: str
    requests: int
    mean_input_length: float
    mean_output_length: float


class Summary(_Part):
    """A run's summary.json."""

    command: str
    date: str
    versions: dict[str, str]
    trace: Trace
    model: str
    gpu: str
    num_gpus: int = 1
    scheduler: str
    rate: float
    tbt_slo_ms: float
    ttft_slo_ms: float
    max_num_batched_tokens: int
    max_num_seqs: int
    seed: int
    model_error: float
    output_throughput: float
    ttft_ms: Spread
    tbt_ms: Spread
    tbt_within_slo: float
    good_requests_share: float
    request_goodput: float
    steps: StepCounts
    preemptions: int


class Request(_Part):
    """A line of requests.jsonl; ``token_ms`` counts from the request's arrival."""

    ttft_ms: float
    token_ms: list[float]


class Step(_Part):
    """A line of steps.jsonl."""

    lane: Literal["gpu", "decode", "prefill"]
    mode: str
    start_ms: float
    end_ms: float
    decodes: int
    prefill_tokens: int


class Setting(NamedTuple):
    """Runs that differ in it do not compare."""

    trace: str
    model: str
    gpu: str
    tbt_slo_ms: float
    ttft_slo_ms: float

    def __str__(self) -> str:
        limits = f"bound {self.tbt_slo_ms:g} ms, TTFT within {self.ttft_slo_ms:g} ms"
        return f"{self.model} on {self.gpu}, {limits}"


class Load(NamedTuple):
    """A setting and the requests a second that were offered."""

    setting: Setting
    rate: float

    def __str__(self) -> str:
        return f"{self.setting.trace} at {self.rate:g} requests/s, {self.setting}"


@dataclass(frozen=True, slots=True)
class Run:
    """A folder that ``vllm-duet simulate`` wrote, and how the page shows it."""

    path: Path
    summary: Summary
    label: str
    colour: str
    dash: Any

    @property
    def setting(self) -> Setting:
        return _load_of(self.summary).setting

    @property
    def load(self) -> Load:
        return _load_of(self.summary)


def _load_of(summary: Summary) -> Load:
    setting = Setting(
        summary.trace.name, summary.model, summary.gpu, summary.tbt_slo_ms, summary.ttft_slo_ms
    )
    # Rates that read the same are the same.
    return Load(setting, float(f"{summary.rate:.4g}"))


class Column(NamedTuple):
    heading: str
    title: str
    value: Callable[[Summary], float]
    form: str
    better: Literal[1, -1, 0] = 0
    """Whether more or less is better; 0 where neither is."""


COLUMNS = (
    Column("", "forecast error", lambda s: s.model_error, ".0%"),
    Column("", "token budget", lambda s: s.max_num_batched_tokens, ",d"),
    Column("", "output tokens/s", lambda s: s.output_throughput, ",.0f", 1),
    Column("TTFT, ms", "mean", lambda s: s.ttft_ms.mean, ",.0f", -1),
    Column("TTFT, ms", "p50", lambda s: s.ttft_ms.p50, ",.0f", -1),
    Column("TTFT, ms", "p99", lambda s: s.ttft_ms.p99, ",.0f", -1),
    Column("TBT, ms", "mean", lambda s: s.tbt_ms.mean, ",.1f", -1),
    Column("TBT, ms", "p99", lambda s: s.tbt_ms.p99, ",.1f", -1),
    Column("TBT, ms", "within bound", lambda s: s.tbt_within_slo, ".2%", 1),
    Column("Good requests", "share", lambda s: s.good_requests_share, ".1%", 1),
    Column("Good requests", "vllm bench, /s", lambda s: s.request_goodput, ",.2f", 1),
    Column("Steps", "aggregated", lambda s: s.steps.aggregated, ",d"),
    Column("Steps", "capped", lambda s: s.steps.capped, ",d"),
    Column("Steps", "split", lambda s: s.steps.split, ",d"),
    Column("Steps", "decode only", lambda s: s.steps.decode_only, ",d"),
    Column("Steps", "prefill only", lambda s: s.steps.prefill_only, ",d"),
    Column("", "preemptions", lambda s: s.preemptions, ",d", -1),
)


class Picture(NamedTuple):
    """A figure, its caption, and what it shows for those who cannot see it."""

    svg: str
    caption: str
    alternative: str


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page for the runs in ``folders``; equal bytes for equal runs.

    Raises:
        ReportError: a folder holds no run, a file of it is broken, or matplotlib or
            jinja2 is not installed. Nothing is written then.
    """
    try:
        import matplotlib
        from jinja2 import Environment, PackageLoader
        from markupsafe import Markup
    except ImportError as error:
        raise ReportError(f"the report needs {error.name}: pip install 'vllm-duet[sim]'") from None
    runs = _load_runs(folders)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same page whatever the user's matplotlibrc says
        # Text stays text, and a "$" in a name is no formula.
        matplotlib.rcParams.update({"svg.fonttype": "none", "text.parse_math": False})
        sections = [
            (title, [picture._replace(svg=Markup(picture.svg)) for picture in pictures])
            for title, pictures in (
                ("Against the rate", list(_by_rate(runs))),
                ("Distributions", list(_distributions(runs))),
                ("Timelines", list(_timelines(runs))),
            )
            if pictures
        ]
    environment = Environment(
        loader=PackageLoader("vllm_duet"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        headings=[(name, len(list(found))) for name, found in groupby(c.heading for c in COLUMNS)],
        columns=[column.title for column in COLUMNS],
        tables=list(_tables(runs)),
        sections=sections,
        runs=runs,
    )
    out.write_text(page, encoding="utf-8")


# Reading


def _load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the order of the page, each once."""
    if not folders:
        raise ReportError("there is nothing to report: give folders that `simulate` wrote")
    each_once = {folder.resolve(): folder for folder in folders}.values()
    found = [(folder, _read_summary(folder)) for folder in each_once]
    found.sort(key=lambda pair: (_load_of(pair[1]), *_identity(pair[1]), str(pair[0])))
    labels = _labels([summary for _, summary in found])
    schedulers = list(dict.fromkeys(summary.scheduler for _, summary in found))
    variants: dict[str, list[str]] = {name: [] for name in schedulers}
    runs = []
    for (folder, summary), label in zip(found, labels, strict=True):
        number, known = schedulers.index(summary.scheduler), variants[summary.scheduler]
        if label not in known:
            known.append(label)
        dash = DASHES[(number // len(COLOURS) + known.index(label)) % len(DASHES)]
        runs.append(Run(folder, summary, label, COLOURS[number % len(COLOURS)], dash))
    return runs


def _identity(summary: Summary) -> tuple[Any, ...]:
    """What two runs of one load may differ in: the scheduler, then its options."""
    budget, requests = summary.max_num_batched_tokens, summary.max_num_seqs
    return summary.scheduler, summary.model_error, budget, requests, summary.seed


def _labels(summaries: Sequence[Summary]) -> list[str]:
    """For each run its scheduler, and the options in which that scheduler's runs differ."""
    words = "{}", "forecast error {:.0%}", "{} tokens", "{} requests", "seed {}"
    options = _grouped(map(_identity, summaries), lambda identity: identity[0])
    labels = []
    for identity in map(_identity, summaries):
        differ = [len(set(values)) > 1 for values in zip(*options[identity[0]], strict=True)]
        parts = zip(words, identity, [True, *differ[1:]], strict=True)
        labels.append(", ".join(form.format(value) for form, value, said in parts if said))
    return labels


def _read_summary(folder: Path) -> Summary:
    file = folder / "summary.json"
    if not file.is_file():
        raise ReportError(f"{folder} has no summary.json: give folders that `simulate` wrote")
    try:
        return Summary.model_validate(json.loads(file.read_bytes()))
    except json.JSONDecodeError as error:
        raise ReportError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ReportError(f"{file}: not JSON (not UTF-8)") from None
    except ValidationError as error:
        raise ReportError(f"{file}: {_first_problem(error)}") from None


def _read_lines(file: Path, kind: type[P]) -> Iterator[P]:
    if not file.is_file():
        raise ReportError(f"{file.parent} has no {file.name}: simulate it again")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                raise ReportError(f"{file}, line {number}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return "not JSON"
    place = ".".join(map(str, problem["loc"]))
    words = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{place}: {words}" if place else words


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# The tables


def _tables(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    for load, group in _grouped(runs, lambda run: run.load).items():
        rows: list[list[dict[str, Any]]] = [[] for _ in group]
        for column in COLUMNS:
            values = [column.value(run.summary) for run in group]
            best = max(value * column.better for value in values)
            differ = len(set(values)) > 1
            for row, value in zip(rows, values, strict=True):
                marked = bool(column.better) and differ and value * column.better == best
                row.append({"text": format(value, column.form), "best": marked})
        yield {"load": load, "rows": list(zip(group, rows, strict=True))}


# The figures


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an element of a page; ``salt`` is another for each on it."""
    import matplotlib

    text = io.StringIO()
    # Without a salt, ids are random; with the same, those of two figures are equal.
    matplotlib.rcParams["svg.hashsalt"] = salt
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    # Nothing refers to the groups, whose ids are the same in every figure.
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])


def _log_axis(axis: Any) -> None:
    """Milliseconds as plain numbers, at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_rate(runs: Iterable[Run]) -> Iterator[Picture]:
    from matplotlib.figure import Figure

    panels: tuple[tuple[str, Callable[[Summary], float], bool], ...] = (
        ("output tokens/s", lambda s: s.output_throughput, False),
        ("mean TBT, ms", lambda s: s.tbt_ms.mean, False),
        ("p99 TBT, ms", lambda s: s.tbt_ms.p99, False),
        ("mean TTFT, ms", lambda s: s.ttft_ms.mean, True),
        ("p99 TTFT, ms", lambda s: s.ttft_ms.p99, True),
    )
    groups = _grouped(runs, lambda run: (run.setting, run.summary.model_error))
    for (setting, model_error), group in groups.items():
        lines = _grouped(group, lambda run: run.label)
        if all(len({run.load.rate for run in line}) < 2 for line in lines.values()):
            continue
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        axes = figure.subplots(2, 3).flat
        for axis, (title, value, log) in zip(axes, panels, strict=False):
            for label, line in lines.items():
                points = sorted((run.load.rate, value(run.summary)) for run in line)
                rates, values = np.array(points).T
                style = {"color": line[0].colour, "linestyle": line[0].dash, "label": label}
                drawn = np.maximum(values, LEAST_MS) if log else values
                axis.plot(rates, drawn, marker="o", markersize=4, **style)
            axis.set(xlabel="requests/s", ylabel=title)
            axis.grid(alpha=0.3)
            if log:
                axis.set_yscale("log")
                _log_axis(axis.yaxis)
            else:
                axis.set_ylim(bottom=0)
            if title.startswith("p99 TBT"):
                axis.axhline(setting.tbt_slo_ms, color="grey", linestyle="--", linewidth=1)
        handles, names = axes[0].get_legend_handles_labels()
        axes[5].axis("off")
        axes[5].legend(handles, names, loc="upper left", frameon=False)
        caption = f"{setting.trace}, {setting}, forecasts wrong by {model_error:.0%}"
        yield Picture(
            _svg(figure, f"rate {caption}"),
            f"{caption}. The dashed line is the bound.",
            f"Lines over the rate, for {'; '.join(lines)}: output throughput, mean and p99 TBT,"
            " mean and p99 TTFT. The table of runs has their values.",
        )


def _distributions(runs: Iterable[Run]) -> Iterator[Picture]:
    from matplotlib.figure import Figure

    groups = list(_grouped(runs, lambda run: run.load).items())
    chosen = np.unique(np.linspace(0, len(groups) - 1, MAX_CDFS).round().astype(int))
    some = f" {chosen.size} of {len(groups)} loads are shown." if chosen.size < len(groups) else ""
    shares = np.linspace(0, 1, CDF_POINTS)
    for load, group in (groups[i] for i in chosen):
        figure = Figure(figsize=(12, 4), layout="constrained")
        axes, medians = figure.subplots(1, 2), []
        for run in group:
            gaps, firsts = _latencies(run)
            for axis, values in zip(axes, (gaps, firsts), strict=True):
                if values.size:
                    points = np.maximum(np.quantile(values, shares), LEAST_MS)
                    style = {"color": run.colour, "linestyle": run.dash, "label": run.label}
                    axis.plot(points, shares, **style)
            spreads = run.summary.tbt_ms, run.summary.ttft_ms
            medians.append(f"{run.label} {spreads[0].p50:.1f} ms and {spreads[1].p50:,.0f} ms")
        axes[0].axvline(load.setting.tbt_slo_ms, color="grey", linestyle="--", linewidth=1)
        for axis, title in zip(axes, ("TBT", "TTFT"), strict=True):
            axis.set(xlabel=f"{title}, ms", ylabel="share at most", xscale="log", ylim=(0, 1.01))
            axis.grid(alpha=0.3)
            _log_axis(axis.xaxis)
        figure.legend(
            *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
        )
        yield Picture(
            _svg(figure, f"distribution {load}"),
            f"{load}. The dashed line is the bound.{some}",
            f"Cumulative distributions of TBT and TTFT. Medians: {'; '.join(medians)}.",
        )


def _latencies(run: Run) -> tuple[FloatArray, FloatArray]:
    """Every TBT and every TTFT, in ms."""
    gaps, firsts = [np.empty(0)], []
    for request in _read_lines(run.path / "requests.jsonl", Request):
        gaps.append(np.diff(request.token_ms))
        firsts.append(request.ttft_ms)
    return np.concatenate(gaps), np.array(firsts)


def _timelines(runs: Sequence[Run]) -> Iterator[Picture]:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    for run in _typical(runs):
        steps = list(_read_lines(run.path / "steps.jsonl", Step))
        if not steps:
            continue
        start = _busiest(steps)
        end = start + TIMELINE_MS
        shown = [step for step in steps if step.end_ms > start and step.start_ms < end]
        figure = Figure(figsize=(12, 2.4), layout="constrained")
        axis = figure.subplots()
        for (lane, mode), found in _grouped(shown, lambda step: (step.lane, step.mode)).items():
            bars = [(s.start_ms / 1e3, (s.end_ms - s.start_ms) / 1e3) for s in found]
            rows = LANES.index(lane) - 0.4, 0.8
            colour = MODE_COLOURS.get(mode, "grey")
            axis.broken_barh(bars, rows, facecolor=colour, edgecolor="white", linewidth=0.3)
        axis.set(xlim=(start / 1e3, end / 1e3), xlabel="s", ylim=(len(LANES) - 0.5, -0.5))
        axis.set_yticks(range(len(LANES)), LANES)
        modes = sorted({step.mode for step in shown})
        patches = [
            Patch(color=MODE_COLOURS.get(mode, "grey"), label=mode.replace("_", " "))
            for mode in modes
        ]
        figure.legend(handles=patches, loc="outside upper right", ncols=6, frameon=False)
        busy = [f"{lane} {_busy(shown, lane, start, end):.0%}" for lane in LANES]
        yield Picture(
            _svg(figure, f"timeline {run.label}, {run.load}"),
            f"{run.label}: {run.load}.",
            f"Steps from {start / 1e3:.1f} s to {end / 1e3:.1f} s. Busy: {', '.join(busy)}.",
        )


def _typical(runs: Sequence[Run]) -> Iterator[Run]:
    """One run of each scheduler, of the same load where there is one, and with many splits."""
    schedulers = {
        load: len({run.summary.scheduler for run in group})
        for load, group in _grouped(runs, lambda run: run.load).items()
    }
    splits = dict.fromkeys(schedulers, 0)
    for run in runs:
        splits[run.load] += run.summary.steps.split
    for group in _grouped(runs, lambda run: run.summary.scheduler).values():
        yield max(
            group,
            key=lambda run: (schedulers[run.load], splits[run.load], run.summary.steps.split),
        )


def _busiest(steps: Sequence[Step]) -> float:
    """Where the window starts that has the most prefill beside decode, in ms.

    Where nothing was ever side by side, the window with the most of both in one batch.
    """
    sought = (
        [step for step in steps if step.lane == "prefill"]
        or [step for step in steps if step.decodes and step.prefill_tokens]
        or list(steps)
    )
    starts, ends = np.array(sorted((step.start_ms, step.end_ms) for step in sought)).T
    sums = np.concatenate([[0.0], np.cumsum(ends - starts)])
    following = np.searchsorted(starts, starts + TIMELINE_MS)
    return float(starts[np.argmax(sums[following] - sums[:-1])])


def _busy(steps: Iterable[Step], lane: str, start: float, end: float) -> float:
    inside = (min(s.end_ms, end) - max(s.start_ms, start) for s in steps if s.lane == lane)
    return sum(inside) / (end - start)
