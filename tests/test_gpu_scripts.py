# SPDX-License-Identifier: Apache-2.0
"""eval/gpu: what compares whole engines, up to the engines, and what needs a GPU, without one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "eval" / "gpu"
sys.path.insert(0, str(FOLDER))

import engines  # noqa: E402
import exactness  # noqa: E402
import serve_ab  # noqa: E402

from vllm_duet.sim.traces import TraceRequest  # noqa: E402

COUNTERS = """\
# TYPE vllm_duet:steps counter
vllm_duet:steps_total{mode="split",engine="0"} 7
# TYPE vllm_duet:split_seconds counter
vllm_duet:split_seconds_total{engine="0"} 2.5
# TYPE vllm_duet:lane_busy_seconds counter
vllm_duet:lane_busy_seconds_total{lane="decode",engine="0"} 2
# TYPE vllm_duet:step_time_ratio gauge
vllm_duet:step_time_ratio{kind="decode_lane",engine="0"} 1.08
# TYPE vllm_duet:split_possible gauge
vllm_duet:split_possible{reason="",engine="0"} 1
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0"} 9
"""


@asynccontextmanager
async def server(behaviour: str) -> AsyncIterator[str]:
    """Streams tokens as vLLM does, over a real socket; one of its requests goes wrong."""
    hangs = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            text = COUNTERS.encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
        else:
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            if behaviour == "busy":
                writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
                for token in range(body["max_tokens"]):
                    data = json.dumps({"choices": [{"token_ids": [token]}]})
                    writer.write(f"data: {data}\n\n".encode())
                    await writer.drain()
                    if behaviour == "hangs" and body["max_tokens"] == 4:
                        await hangs.wait()
                    if behaviour == "breaks off" and token == 2:
                        writer.transport.abort()
                        return
                writer.write(b"data: [DONE]\n\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"http://{host}:{port}"
        hangs.set()


def ask(behaviour: str, seconds: float = 60.0) -> list[serve_ab.Answer]:
    async def run() -> list[serve_ab.Answer]:
        requests = [TraceRequest(10.0 * n, 5 + n, 4 + n) for n in range(3)]
        async with server(behaviour) as url:
            answers, counted, ratios = await serve_ab.run(url, requests, 100, seconds, "test")
        # What this run added.
        assert counted == {"steps split": 0, "split_seconds": 0, "lane_busy_seconds decode": 0}
        assert ratios == {"decode_lane": 1.08}
        return answers

    return asyncio.run(run())


def test_every_token_is_noted_as_it_arrives() -> None:
    answers = ask("streams")
    assert [a.outcome for a in answers] == ["finished"] * 3
    assert [len(a.token_s) for a in answers] == [4, 5, 6]
    for number, answer in enumerate(answers):
        # Open loop: nobody is sent before its time.
        assert 0.01 * number <= answer.sent_s <= answer.token_s[0]
        assert answer.token_s == sorted(answer.token_s)
    figures = serve_ab.figures([answers], 100.0)
    assert figures["outcomes"] == {"finished": 3}
    assert figures["ttft_ms"]["mean"] > 0 and 0 <= figures["tbt_within_slo"] <= 1


def test_a_request_that_does_not_end_is_cut_off_and_counted() -> None:
    answers = ask("hangs", seconds=serve_ab.DRAIN_S + 3.0)
    assert [a.outcome for a in answers] == ["cut off", "finished", "finished"]
    assert len(answers[0].token_s) == 1


def test_a_connection_that_breaks_is_counted() -> None:
    answers = ask("breaks off")
    assert not any(a.outcome in ("finished", "cut off") or len(a.token_s) > 3 for a in answers)
    assert serve_ab.figures([ask("busy")], 100.0) | {"sent_late_ms": 0} == {
        "outcomes": {"HTTP 503": 3},
        "output_tokens_per_s": 0.0,
        "ttft_ms": None,
        "tbt_ms": None,
        "e2e_ms": None,
        "tbt_within_slo": None,
        "sent_late_ms": 0,
    }


def test_what_the_lanes_did_is_told_by_their_counters() -> None:
    did = serve_ab.what_duet_did(
        {
            "steps split": 30.0,
            "steps capped": 2.0,
            "split_seconds": 4.0,
            "lane_busy_seconds decode": 3.0,
            "lane_busy_seconds prefill": 3.6,
            "prefills_failed": 1.0,
        }
    )
    assert did["steps_by_mode"] == {"split": 30, "capped": 2} and did["split_s"] == 4
    assert did["lane_utilization"] == {"decode": 0.75, "prefill": 0.9}
    assert did["prefills_failed"] == 1
    stock = serve_ab.what_duet_did({})
    assert not stock["steps_by_mode"] and not stock["lane_utilization"]


def test_figures_are_those_of_the_gaps() -> None:
    request = TraceRequest(1000.0, 5, 4)
    leg = [serve_ab.Answer(request, 1.0, [1.5, 1.6, 1.8, 2.0], "finished")]
    figures = serve_ab.figures([leg, leg], 150.0)
    assert figures["ttft_ms"]["mean"] == pytest.approx(500)
    assert figures["tbt_ms"]["max"] == pytest.approx(200)
    assert figures["tbt_within_slo"] == pytest.approx(1 / 3)
    assert figures["e2e_ms"]["p50"] == pytest.approx(1000)
    assert figures["output_tokens_per_s"] == pytest.approx(8 / 4)  # two runs of 2 s


@pytest.mark.parametrize("script", ["serve_ab.py", "exactness.py"])
def test_a_dry_run_says_what_it_would_do(script: str, tmp_path: Path) -> None:
    rates = ["--rates", "2 4"] if script == "serve_ab.py" else []
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / script), "--dry-run", "--out", str(out), *rates]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "requests" in shown.stdout and "qwen3-8b" in shown.stdout
    assert not out.exists()


def test_facts_without_a_gpu_are_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "microbench.py"), "--out", str(out)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 2 and not out.exists()
    assert "finds no NVIDIA GPU" in shown.stderr and shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "0"], "numbers above 0"),
        (["--rates", "1", "--order", "stock,mine"], "not mine"),
        (["--rates", "1", "--synthetic", "many"], "many"),
        (["--rates", "1", "--duet-config", "[1]"], "takes a JSON object"),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_sentence(arguments: list[str], said: str) -> None:
    command = [sys.executable, str(FOLDER / "serve_ab.py"), *arguments]
    shown = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert shown.returncode == 2 and said in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_checkout_that_is_not_installed_brings_its_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "entry_points", lambda group: [])
    code = (
        "from importlib.metadata import distribution as d;"
        "print([e.load().__module__ for e in d('vllm-duet-checkout').entry_points])"
    )
    with engines.environment(EXTRA="1") as variables:
        assert variables["EXTRA"] == "1"
        shown = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
    assert shown.stdout.strip() == "['vllm_duet.plugin']", shown.stderr


def verdict(
    control: list[list[int]],
    runs: list[list[list[int]] | None],
    split: int,
    spoiled: Sequence[list[int]] = ([9, 9, 9], [4, 5]),
) -> int:
    stock = [[1, 2, 3], [4, 5]]
    rows = [
        {"error": "it\nfailed"}
        if found is None
        else {**exactness.compare(stock, found), "steps_by_mode": {"split": split}}
        for found in runs
    ]
    controls = {
        "control": exactness.compare(stock, control),
        "spoiled": exactness.compare(stock, spoiled),
    }
    return exactness.report(controls | {"runs": rows}, 2)


def test_the_verdict_is_the_exit_code() -> None:
    equal, other = [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6]]
    assert exactness.compare(equal, other) == {"equal": 1, "parts_at": [(1, 1)]}
    assert exactness.compare(equal, [[1, 2], [4, 5]])["parts_at"] == [(0, 2)]
    assert verdict(equal, [equal, equal], split=5) == exactness.EQUAL
    assert verdict(equal, [equal, other], split=5) == exactness.DIFFERENT
    assert verdict(equal, [equal, None], split=5) == exactness.DIFFERENT
    # What decides nothing is not passed off as equal.
    assert verdict(other, [equal], split=5) == exactness.UNDECIDED
    assert verdict(equal, [equal], split=0) == exactness.UNDECIDED
    assert verdict(equal, [equal], split=5, spoiled=equal) == exactness.UNDECIDED


def test_requests_are_the_same_every_time_and_share_prefixes() -> None:
    made = exactness.make_requests(12, 500, 2048, 1.0)
    assert made == exactness.make_requests(12, 500, 2048, 1.0)
    assert all(max(prompt) < 500 and len(prompt) <= 1920 for prompt, _ in made)
    shared = [made[n][0][:2] == made[n - 1][0][:2] for n in range(2, 12, 3)]
    assert any(shared)
    assert {sampling["temperature"] for _, sampling in made} == {0.0, 0.8}
