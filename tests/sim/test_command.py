# SPDX-License-Identifier: Apache-2.0
"""The commands `simulate` and `report`, on files."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from made_up_steps import steps_file
from sim.harness import MODEL
from typer.testing import CliRunner

from vllm_duet.cli import app

FILES = {"summary.json", "requests.jsonl", "steps.jsonl", "trace.json"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "<some> trace.jsonl"
    rows = [
        {"timestamp": 150 * i, "input_length": 3000 + 500 * (i % 4), "output_length": 40}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simulate(trace: Path, out: Path, *options: str):
    command = ["simulate", "--trace", trace, "--model", MODEL, "--out", out, *options]
    return CliRunner().invoke(app, [str(part) for part in command])


def said(result) -> str:
    """What a command printed, without the box and the line breaks in it."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def runs(trace, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for scheduler in ("stock", "duet"):
        for rate in ("5", "9"):
            out = folder / f"{scheduler}-{rate}"
            result = simulate(trace, out, "--scheduler", scheduler, "--rate", rate)
            assert result.exit_code == 0, result.output
            made.append(out)
    return made


def test_the_files_agree(runs, trace):
    for run in runs:
        assert {file.name for file in run.iterdir()} == FILES
        summary = json.loads((run / "summary.json").read_text())
        requests = [json.loads(line) for line in (run / "requests.jsonl").open()]
        steps = [json.loads(line) for line in (run / "steps.jsonl").open()]
        assert summary["label"] == "simulated"
        assert summary["trace"]["name"] == trace.stem
        assert summary["finished_requests"] == len(requests) == 24
        assert all(len(r["token_ms"]) == r["output_length"] for r in requests)
        gaps = [b - a for r in requests for a, b in pairwise(r["token_ms"])]
        assert summary["tbt_ms"]["max"] == pytest.approx(max(gaps), abs=2e-3)
        assert summary["ttft_ms"]["max"] == pytest.approx(
            max(r["ttft_ms"] for r in requests), abs=2e-3
        )
        assert sum(s["prefill_tokens"] for s in steps) == sum(r["input_length"] for r in requests)
        events = json.loads((run / "trace.json").read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == len(steps)


def test_the_limits_say_which_requests_are_good(trace, runs, tmp_path):
    requests = [json.loads(line) for line in (runs[-1] / "requests.jsonl").open()]
    assert max(b - a for r in requests for a, b in pairwise(r["token_ms"])) <= 100
    middle = sorted(r["ttft_ms"] for r in requests)[len(requests) // 2] + 0.01
    in_time = sum(r["ttft_ms"] <= middle for r in requests)
    for limit, good in ((0.001, 0), (middle, in_time), (1e6, len(requests))):
        out = tmp_path / str(limit)
        options = ["--scheduler", "duet", "--rate", "9", "--ttft-slo-ms", str(limit)]
        result = simulate(trace, out, *options)
        summary = json.loads((out / "summary.json").read_text())
        assert summary["ttft_slo_ms"] == limit
        assert summary["good_requests_share"] == good / len(requests)
        assert f"{good / len(requests):.2%} of requests good" in said(result)


def test_the_same_command_gives_the_same_files(runs, trace, tmp_path):
    again = tmp_path / "again"
    assert simulate(trace, again, "--scheduler", "duet", "--rate", "9").exit_code == 0
    for name in FILES - {"summary.json"}:
        assert (again / name).read_bytes() == (runs[-1] / name).read_bytes()
    first, second = (json.loads((run / "summary.json").read_text()) for run in (runs[-1], again))
    assert first.pop("command") and second.pop("command")
    assert first == second


def test_the_summary_says_what_was_simulated(trace, tmp_path):
    options = "--scheduler stock --no-async-scheduling --truth roofline --tensor-parallel-size 2"
    options += " --kv-cache-dtype fp8 --concurrency 3 --frontend-ms 4 --tokenizer-us 1.5"
    options += " --prefix-length 512 --num-prefixes 2 --num-requests 9 --enable-expert-parallel"
    options += " --moe-backend marlin"
    result = simulate(trace, tmp_path / "out", *options.split())
    assert result.exit_code == 0, result.output
    assert "9 requests from 3 clients" in said(result)
    assert "GPU's times: the roofline" in said(result)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = {
        "truth": "the roofline",
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "moe_backend": "marlin",
        "kv_dtype": "fp8",
        "concurrency": 3,
        "prefixes": {"count": 2, "tokens": 512},
        "async_scheduling": False,
        "front_end": {"request_ms": 4.0, "token_us": 1.5},
    }
    assert {key: summary[key] for key in expected} == expected
    assert summary["host_costs"]["launch_ms"] == 0.3 and "assumed" in str(summary["disturbances"])
    requests = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").open()]
    assert {r["input_length"] - 512 for r in requests} == {3000, 3500, 4000, 4500}


@pytest.fixture
def measured_here(tmp_path) -> Path:
    """What calibrate wrote on an L40S that takes 1.4 times as long as its profile says."""
    path = tmp_path / "steps.json"
    steps_file().save(path)
    return path


def test_the_times_are_those_of_the_users_own_file(trace, tmp_path, measured_here):
    runs = {"file": str(measured_here), "profile": "l40s"}
    own = "--max-num-seqs 64 --max-num-batched-tokens 2048 --max-model-len 8192 --truth roofline"
    summaries, steps = {}, {}
    for name, gpu in runs.items():
        out = tmp_path / name
        options = ["--gpu", gpu, "--scheduler", "duet", "--rate", "1"]
        result = simulate(trace, out, *options, *(own.split() if name == "profile" else []))
        assert result.exit_code == 0, result.output
        summaries[name] = json.loads((out / "summary.json").read_text())
        steps[name] = [json.loads(line) for line in (out / "steps.jsonl").open()]
    found = summaries["file"]
    assert found["gpu"] == "NVIDIA L40S" and found["kv_cache_tokens"] == 120_000
    assert "steps measured on NVIDIA L40S with vLLM 0.32.0" in found["truth"]
    # Without being told, the engine is the one that was measured.
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (64, 2048)
    first = {name: steps[name][0]["end_ms"] - steps[name][0]["start_ms"] for name in runs}
    assert steps["file"][0]["prefill_tokens"] == steps["profile"][0]["prefill_tokens"]
    assert first["file"] / first["profile"] == pytest.approx(1.4, rel=0.05)


def test_a_cpus_file_is_capped_and_never_split(trace, tmp_path):
    path = tmp_path / "steps.json"
    steps_file(profile=None).save(path)
    for scheduler in ("duet", "paper", "stock"):
        out = tmp_path / scheduler
        result = simulate(trace, out, "--gpu", path, "--scheduler", scheduler, "--rate", "1")
        assert result.exit_code == 0, result.output
        summary = json.loads((out / "summary.json").read_text())
        assert summary["gpu"] == "cpu" and not summary["steps"]["split"]
        assert (summary["steps"]["capped"] > 0) == (scheduler == "duet")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kv-cache-dtype", "fp8"], "calibrate with it"),
        (["--tensor-parallel-size", "2"], "calibrate with it"),
        (["--scheduler", "disaggregated"], "no profile"),
        (["--scheduler", "fixed-split"], "decode_sms"),
        (["--model", "another"], "another one"),
        (["--gpu", "absent.json"], "absent.json"),
        (["--gpu", "config.json"], "holds no measured steps"),
    ],
)
def test_what_a_file_does_not_tell_is_a_sentence(trace, tmp_path, options, named):
    path = tmp_path / "steps.json"
    steps_file(profile=None).save(path)
    if options == ["--model", "another"]:
        config = json.loads((MODEL / "config.json").read_text()) | {"hidden_size": 128}
        options = ["--model", tmp_path / "config.json"]
        options[1].write_text(json.dumps(config))
    if options == ["--gpu", "config.json"]:
        options = ["--gpu", MODEL / "config.json"]
    result = simulate(trace, tmp_path / "out", "--gpu", path, *options)
    assert result.exit_code == 2
    assert named in said(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--scheduler", "fastest"], "fastest"),
        (["--gpu", "abacus"], "abacus"),
        (["--gpu", "l40s", "--max-num-batched-tokens", "4000000"], "does not fit"),
        (["--max-model-len", "100"], "longer than 100"),
        (["--rate", "-1"], "rate"),
        (["--no-async-scheduling"], "asynchronous"),
        (["--scheduler", "disaggregated", "--concurrency", "2"], "closed loop"),
        (["--tensor-parallel-size", "3"], "3 ranks"),
        (["--kv-cache-dtype", "fp6"], "fp6"),
    ],
)
def test_a_wrong_option_writes_nothing(trace, tmp_path, options, named):
    result = simulate(trace, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert named in said(result)
    assert not (tmp_path / "out").exists()


def test_a_malformed_line_is_named_and_nothing_is_written(trace, tmp_path):
    broken = tmp_path / "t.jsonl"
    broken.write_text(trace.read_text() + '{"timestamp": 5000, "input_length": "many"}\n')
    result = simulate(broken, tmp_path / "out")
    assert result.exit_code == 2
    assert "line 25" in said(result)
    assert not (tmp_path / "out").exists()


def test_the_schedulers_are_listed():
    result = CliRunner().invoke(app, ["simulate", "--list-schedulers"])
    assert result.exit_code == 0
    listed = {line.split()[0] for line in result.output.splitlines() if line.strip()}
    assert listed >= {"stock", "duet", "paper", "fixed-split", "disaggregated"}


class Page(HTMLParser):
    """Collects the text, the links, and whether every tag that has to be is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.links, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag in ("table", "figure", "svg", "body", "html", "td"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def report(folders, out: Path):
    return CliRunner().invoke(app, ["report", *map(str, folders), "--out", str(out)])


def test_the_page_has_every_run_and_needs_nothing_else(runs, tmp_path):
    out = tmp_path / "report.html"
    assert report(runs, out).exit_code == 0
    text = out.read_text()
    page = Page(text)
    assert not page.open
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text and "<script" not in text
    assert "<some>" not in text and "<some> trace" in page.text
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert f"{summary['ttft_ms']['p99']:,.0f}" in page.text
        assert summary["command"] in page.text
    for words in ("Against the rate", "Distributions", "Timelines", "Simulated."):
        assert words in page.text


def test_equal_runs_give_equal_pages(runs, tmp_path):
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    assert report(runs, pages[0]).exit_code == 0
    assert report(reversed(runs), pages[1]).exit_code == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_one_run_is_enough(runs, tmp_path):
    out = tmp_path / "report.html"
    assert report(runs[:1], out).exit_code == 0
    assert "Against the rate" not in out.read_text()


def test_a_folder_that_holds_no_run_is_named(runs, tmp_path):
    out = tmp_path / "report.html"
    result = report([*runs, tmp_path], out)
    assert result.exit_code == 2
    assert "summary.json" in said(result)
    assert not out.exists()


def test_a_broken_line_of_a_run_is_named(runs, tmp_path):
    broken = tmp_path / "run"
    broken.mkdir()
    for file in runs[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    lines = (broken / "requests.jsonl").read_text().splitlines()
    lines[4] = "{"
    (broken / "requests.jsonl").write_text("\n".join(lines))
    result = report([broken], tmp_path / "report.html")
    assert result.exit_code == 2
    assert "line 5" in said(result)
