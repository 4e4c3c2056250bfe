# SPDX-License-Identifier: Apache-2.0
"""The page of `vllm-duet report`, of small runs made up here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vllm_duet import report
from vllm_duet.report import ReportError, write_report

STEPS = {"aggregated": 3, "capped": 2, "split": 4, "decode_only": 50, "prefill_only": 1}
BARS = {"stock": [("gpu", "mixed")], "duet": [("decode", "split"), ("prefill", "split")]}
VOID = {"br", "hr", "img", "input", "link", "meta"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action"}


def make_run(folder: Path, scheduler: str = "duet", rate: float = 4.0, **changes: Any) -> Path:
    spread = {"mean": 20.0, "p50": 18.0, "p90": 30.0, "p99": 45.0, "max": 60.0}
    summary = {
        "label": "simulated",
        "command": f"vllm-duet simulate --scheduler {scheduler} --rate {rate}",
        "date": "2026-01-02",
        "versions": {"python": "3.11.7", "vllm": "0.32.0"},
        "trace": {
            "name": "azure",
            "requests": 3,
            "mean_input_length": 800.0,
            "mean_output_length": 4.0,
        },
        "model": "qwen3-8b",
        "gpu": "h100-sxm",
        "scheduler": scheduler,
        "rate": rate,
        "tbt_slo_ms": 100.0,
        "ttft_slo_ms": 2000.0,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "seed": 0,
        "model_error": 0.0,
        "output_throughput": 1234.0,
        "ttft_ms": {key: 10 * value for key, value in spread.items()},
        "tbt_ms": spread,
        "tbt_within_slo": 0.9876,
        "good_requests_share": 0.9543,
        "request_goodput": 3.21,
        "steps": STEPS,
        "preemptions": 7,
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    requests = [
        {"ttft_ms": 200.0 + i, "token_ms": [200.0 + i, 220.0 + 2 * i, 250.0 + 3 * i]}
        for i in range(3)
    ]
    write_lines(folder / "requests.jsonl", requests)
    steps = [
        {
            "lane": lane,
            "mode": mode,
            "start_ms": 30.0 * i,
            "end_ms": 30.0 * i + 25,
            "decodes": int(lane != "prefill"),
            "prefill_tokens": 512 * (lane != "decode"),
            "sms": 66,
        }
        for i in range(8)
        for lane, mode in BARS.get(scheduler, BARS["stock"])
    ]
    write_lines(folder / "steps.jsonl", steps)
    return folder


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two schedulers at three rates; duet is the better one in everything but throughput."""
    slow = {"mean": 31.0, "p50": 21.0, "p99": 61.0}
    stock = {"output_throughput": 2345.0, "tbt_ms": slow, "tbt_within_slo": 0.9}
    stock |= {"good_requests_share": 0.8, "request_goodput": 2.5}
    return [
        make_run(tmp_path / f"{name}-{rate}", name, rate, **changes)
        for name, changes in (("stock", stock), ("duet", {}))
        for rate in (2.0, 4.0, 6.0)
    ]


class Page(HTMLParser):
    """The page's rows, figures, links and ids; an unclosed or mismatched tag is an error."""

    def __init__(self, folders: Iterable[Path], out: Path) -> None:
        super().__init__()
        write_report(list(folders), out)
        self.source = out.read_text(encoding="utf-8")
        self.text, self.rows, self.best, self.descriptions = "", [], [], []
        self.links, self.ids, self.tags, self._open = [], [], [], []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "td" and ("class", "best") in attrs:
            self.best.append((len(self.rows) - 1, len(self.rows[-1]) - 1))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in LOADING]
        self.ids += [value for name, value in attrs if name == "id"]
        self.descriptions += [value for name, value in attrs if name == "aria-label"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        (row,) = (row for row in self.rows if row[0] == label)
        return row

    def section(self, title: str) -> str:
        """The source from a heading to the next."""
        return self.source.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def test_the_table_has_the_right_numbers(tmp_path):
    run = make_run(tmp_path / "run", model_error=0.1, max_num_batched_tokens=2048)
    page = Page([run], tmp_path / "report.html")
    expected = ["10%", "2,048", "1,234", "200", "180", "450", "20.0", "45.0", "98.76%"]
    expected += ["95.4%", "3.21"]
    assert page.row("duet")[1:] == [*expected, "3", "2", "4", "50", "1", "7"]
    titles = page.row("scheduler")
    assert titles[3:7] == ["output tokens/s", "mean", "p50", "p99"]
    assert titles[10:12] == ["share", "vllm bench, /s"]
    assert titles[12:17] == ["aggregated", "capped", "split", "decode only", "prefill only"]


def test_the_best_of_a_load_is_marked(tmp_path, runs):
    page = Page(runs, tmp_path / "report.html")
    marked = {(page.rows[row][0], page.row("scheduler")[cell], cell) for row, cell in page.best}
    assert marked == {
        ("stock", "output tokens/s", 3),
        ("duet", "mean", 7),
        ("duet", "p99", 8),
        ("duet", "within bound", 9),
        ("duet", "share", 10),
        ("duet", "vllm bench, /s", 11),
    }
    assert len(page.best) == 3 * len(marked), "at each of three rates"


def test_runs_of_different_loads_are_not_compared(tmp_path):
    others = [{"gpu": "h200"}, {"rate": 5.0}, {"tbt_slo_ms": 50.0}, {"model": "qwen3-14b"}]
    others.append({"ttft_slo_ms": 500.0})
    folders = [make_run(tmp_path / "run")]
    for number, other in enumerate(others):
        folders.append(make_run(tmp_path / str(number), output_throughput=9.0, **other))
    page = Page(folders, tmp_path / "report.html")
    assert [row for row in page.rows if row[0] == "duet"]
    assert not page.best


def test_the_page_needs_nothing_else(tmp_path, runs):
    page = Page(runs, tmp_path / "report.html")
    assert any(link.startswith("#") for link in page.links), "figures refer to their parts"
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert not {"script", "link", "iframe", "img", "base"} & set(page.tags)
    assert "@import" not in page.source
    assert all(target[0] == "#" for target in re.findall(r"url\((.)", page.source))


def test_no_two_parts_of_the_page_share_an_id(tmp_path, runs):
    page = Page(runs, tmp_path / "report.html")
    assert page.tags.count("figure") == 1 + 3 + 2
    assert len(set(page.ids)) == len(page.ids)


def test_every_figure_is_described(tmp_path, runs):
    page = Page(runs, tmp_path / "report.html")
    lines, *distributions, duet, stock = page.descriptions
    assert "duet; stock" in lines
    assert len(distributions) == 3
    assert all("duet 18.0 ms and 180 ms" in text for text in distributions)
    # Eight steps of 25 ms each in a window of two seconds.
    assert "gpu 0%, decode 10%, prefill 10%" in duet
    assert "gpu 10%, decode 0%, prefill 0%" in stock


def test_the_page_says_that_it_is_simulated_and_how_it_was_made(tmp_path, runs):
    page = Page(runs, tmp_path / "report.html")
    assert "Simulated." in page.text and "not measured on a GPU" in page.text
    for run in runs:
        assert json.loads((run / "summary.json").read_text())["command"] in page.text
    assert "python 3.11.7, vllm 0.32.0" in page.text


def test_equal_runs_give_equal_bytes(tmp_path, runs):
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    runs.append(make_run(tmp_path / "again", "duet", 2.0, output_throughput=1.0))
    write_report(runs, first)
    write_report([*reversed(runs), runs[0]], second)
    assert first.read_bytes() == second.read_bytes()


def test_the_users_matplotlib_settings_neither_count_nor_change(tmp_path, runs):
    import matplotlib

    write_report(runs, tmp_path / "plain.html")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        write_report(runs, tmp_path / "changed.html")
        assert matplotlib.rcParams["font.size"] == 30
        assert matplotlib.rcParams["svg.fonttype"] == "path"
    assert (tmp_path / "plain.html").read_bytes() == (tmp_path / "changed.html").read_bytes()


def test_names_are_text_wherever_they_come(tmp_path):
    scheduler = '"><script>alert(1)</script> $\\frac{1}$ &amp;'
    trace = {"requests": 3, "mean_input_length": 1.0, "mean_output_length": 1.0}
    hostile = {"trace": trace | {"name": "<img src=http://example.com/a.png onerror=x>"}}
    folders = [make_run(tmp_path / str(rate), scheduler, rate, **hostile) for rate in (2.0, 4.0)]
    page = Page(folders, tmp_path / "report.html")
    assert not {"script", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert hostile["trace"]["name"] in page.text
    assert [row[0] for row in page.rows].count(scheduler) == 2
    # Legends too: the two distributions, and the lines against the rate.
    for title, count in (("Against the rate", 1), ("Distributions", 2)):
        texts = re.findall(r"<text[^>]*>(.*?)</text>", page.section(title))
        assert sum("&lt;script&gt;" in text and "$\\frac{1}$" in text for text in texts) == count


def test_one_run_alone(tmp_path):
    page = Page([make_run(tmp_path / "run")], tmp_path / "report.html")
    assert page.row("duet")
    assert not page.best
    assert "<h2>Against the rate</h2>" not in page.source
    assert "<svg" in page.section("Distributions") and "<svg" in page.section("Timelines")


def test_a_run_without_steps_or_requests_has_a_row(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "steps.jsonl").write_text("")
    (run / "requests.jsonl").write_text("")
    page = Page([run], tmp_path / "report.html")
    assert page.row("duet")
    assert "<h2>Timelines</h2>" not in page.source


def test_a_scheduler_keeps_its_colour_and_its_options_are_told_apart(tmp_path):
    folders = [
        make_run(tmp_path / f"{name}-{budget}-{rate}", name, rate, max_num_batched_tokens=budget)
        for name, budgets in (("stock", (512, 2048)), ("duet", (8192,)))
        for budget in budgets
        for rate in (2.0, 4.0)
    ]
    page = Page(folders, tmp_path / "report.html")
    assert {row[0] for row in page.rows} >= {"duet", "stock, 512 tokens", "stock, 2048 tokens"}
    for title in ("Against the rate", "Distributions"):
        section = page.section(title)
        assert report.COLOURS[0] in section and report.COLOURS[1] in section
        assert report.COLOURS[2] not in section, "a colour for each scheduler, not each run"
        dashed = re.findall(rf"stroke-dasharray[^\"]*stroke: {report.COLOURS[1]}", section)
        assert dashed, "the second budget"


def test_many_runs_stay_small_and_only_what_is_drawn_is_read(tmp_path, monkeypatch):
    folders = [
        make_run(tmp_path / f"{name}-{rate}", name, float(rate))
        for name in ("stock", "duet", "paper")
        for rate in range(1, 21)
    ]
    rows = [{"ttft_ms": 9.0, "token_ms": [9.0 + 0.3 * i * i for i in range(3000)]}]
    for folder in folders:
        write_lines(folder / "requests.jsonl", rows)
    read: list[str] = []
    lines = report._read_lines
    monkeypatch.setattr(
        report, "_read_lines", lambda file, kind: read.append(file.name) or lines(file, kind)
    )
    page = Page(folders, tmp_path / "report.html")
    assert len(page.source) < 2e6
    assert read.count("steps.jsonl") == 3, "one timeline a scheduler"
    assert read.count("requests.jsonl") == 3 * report.MAX_CDFS
    assert "6 of 20 loads" in page.text


def test_a_timeline_shows_the_busiest_two_seconds(tmp_path):
    run = make_run(tmp_path / "run")

    def step(lane: str, start: float, end: float) -> dict[str, Any]:
        times = {"start_ms": start, "end_ms": end}
        return {"lane": lane, "mode": "split", "decodes": 1, "prefill_tokens": 1, **times}

    calm = [step("prefill", 1000.0 * i, 1000.0 * i + 100) for i in range(20)]
    busy = [step("prefill", 30_000 + 400.0 * i, 30_400 + 400.0 * i) for i in range(5)]
    after = [step("decode", 90_000.0, 95_000.0)]
    write_lines(run / "steps.jsonl", [*calm, *busy, *after])
    page = Page([run], tmp_path / "report.html")
    assert "Steps from 30.0 s to 32.0 s" in page.descriptions[-1]
    assert "prefill 100%" in page.descriptions[-1]


def test_timelines_are_of_one_load_where_there_is_one(tmp_path):
    folders = [
        make_run(tmp_path / "a", "duet", 2.0),
        make_run(tmp_path / "b", "duet", 9.0, steps=STEPS | {"split": 1000}),
        make_run(tmp_path / "c", "stock", 2.0),
    ]
    section = Page(folders, tmp_path / "report.html").section("Timelines")
    assert section.count("at 2 requests/s") == 2
    assert "at 9 requests/s" not in section


# Errors: one sentence that names the file, and nothing is written


def refusal(tmp_path: Path, *folders: Path) -> str:
    out = tmp_path / "report.html"
    with pytest.raises(ReportError) as caught:
        write_report(folders, out)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_folder_at_all(tmp_path):
    assert "nothing to report" in refusal(tmp_path)


def test_a_folder_without_a_run(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} has no summary.json" in refusal(tmp_path, make_run(tmp_path / "run"), empty)


@pytest.mark.parametrize("name", ["requests.jsonl", "steps.jsonl"])
def test_a_file_is_missing(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    assert f"{run} has no {name}" in refusal(tmp_path, run)


def test_a_summary_that_is_not_json(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text('{\n"rate": 4,\n"model" "x"\n}')
    assert f"{run / 'summary.json'}, line 3: not JSON" in refusal(tmp_path, run)


def test_a_summary_that_is_no_text(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_bytes(b'{"rate": "\xff\xff"}')
    assert f"{run / 'summary.json'}: not JSON" in refusal(tmp_path, run)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"rate": "fast"}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"tbt_ms": {"mean": 1.0, "p50": 1.0}}, "tbt_ms.p99"),
        ({"steps": 3}, "steps"),
        ({"trace": None}, "trace"),
    ],
)
def test_a_summary_with_a_wrong_value(tmp_path, changes, place):
    run = make_run(tmp_path / "run", **changes)
    assert f"{run / 'summary.json'}: {place}: " in refusal(tmp_path, run)


def test_a_summary_that_is_a_list(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text("[]")
    assert str(run / "summary.json") in refusal(tmp_path, run)


@pytest.mark.parametrize("name", ["requests.jsonl", "steps.jsonl"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [("{", "not JSON"), ("[1]", "object"), ("{}", "required"), ("", "not JSON")],
)
def test_a_broken_line(tmp_path, name, line, problem):
    run = make_run(tmp_path / "run")
    file = run / name
    lines = file.read_text().splitlines()
    lines[1] = line
    file.write_text("\n".join(lines))
    message = refusal(tmp_path, run)
    assert f"{file}, line 2: " in message
    assert problem in message


def test_a_lane_that_does_not_exist(tmp_path):
    run = make_run(tmp_path / "run")
    file = run / "steps.jsonl"
    file.write_text(file.read_text().replace('"prefill"', '"third"', 1))
    assert f"{file}, line 2: lane: " in refusal(tmp_path, run)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(tmp_path, make_run(tmp_path / "run"))
    assert package in message
    assert "pip install 'vllm-duet[sim]'" in message
