# SPDX-License-Identifier: Apache-2.0
"""Traces: what is read, what is refused, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_duet.sim.traces import (
    HASH_BLOCK_TOKENS,
    TraceError,
    TraceRequest,
    at_rate,
    prompts,
    rate_of,
    read_trace,
    synthetic,
    with_prefixes,
)

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROW = "2023-11-16 18:15:46.6805900,374,44"
REQUEST = {"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def azure(*rows: str) -> str:
    return "\n".join([HEADER, *rows])


def jsonl(**changes: object) -> str:
    return json.dumps(REQUEST | changes)


# Reading


@pytest.mark.parametrize("end_of_line", ["\n", "\r\n"])
def test_azure_rows_are_read_by_arrival(write: Write, end_of_line: str) -> None:
    lines = [
        HEADER,
        "2023-11-16 18:15:50.9951690,396,109",
        "",
        "2023-11-16 18:15:46.6805909,374,44",
        "2023-11-16 18:15:47,91,16",
        "",
    ]
    requests = read_trace(write("trace.csv", end_of_line.join(lines)))
    assert [(r.input_length, r.output_length) for r in requests] == [
        (374, 44),
        (91, 16),
        (396, 109),
    ]
    # To the seventh digit, or what floats of today in ms keep of it: 0.0002 ms.
    expected = [0.0, 319.4091, 4314.5781]
    assert [r.arrival_ms for r in requests] == pytest.approx(expected, abs=3e-4)
    assert all(r.hash_ids == () for r in requests)


def test_azure_columns_may_come_in_any_order_and_with_others(write: Write) -> None:
    text = "GeneratedTokens,Model,TIMESTAMP,ContextTokens\n44,a,2023-11-16 18:15:46.6805900,374"
    assert read_trace(write("trace.CSV", text)) == [TraceRequest(0.0, 374, 44)]


def test_azure_time_crosses_midnight(write: Write) -> None:
    rows = ("2023-12-31 23:59:59.9000000,1,1", "2024-01-01 00:00:00.1000000,2,2")
    requests = read_trace(write("trace.csv", azure(*rows)))
    assert requests[1].arrival_ms == pytest.approx(200.0, abs=2e-4)


@pytest.mark.parametrize("end_of_line", ["\n", "\r\n"])
def test_mooncake_lines_are_read_by_arrival(write: Write, end_of_line: str) -> None:
    lines = ["", jsonl(), "   ", jsonl(timestamp=9482.5, hash_ids=[46, 3]), ""]
    requests = read_trace(write("trace.jsonl", end_of_line.join(lines)))
    assert requests == [
        TraceRequest(0.0, 600, 52, (46, 3)),
        TraceRequest(18000 - 0.5, 600, 52, (46, 47)),
    ]


def test_json_lines_need_no_hash_ids(write: Write) -> None:
    line = '{"timestamp": -3, "output_length": 1, "input_length": 2, "model": "any"}'
    assert read_trace(write("trace.jsonl", line)) == [TraceRequest(0.0, 2, 1)]


def test_equal_arrivals_keep_their_order(write: Write) -> None:
    lines = [jsonl(input_length=n) for n in (5, 3, 9, 1)]
    requests = read_trace(write("trace.jsonl", "\n".join(lines)))
    assert [r.input_length for r in requests] == [5, 3, 9, 1]


# Refusing. The malformed line is the third of four.


@pytest.mark.parametrize(
    ("row", "culprit"),
    [
        ("2023-11-16 18:15:46.6805900,374", "GeneratedTokens"),
        ("2023-11-16 18:15:46.6805900", "ContextTokens"),
        ("2023-11-16 18:15:46.6805900,many,44", "ContextTokens"),
        ("2023-11-16 18:15:46.6805900,374,4.0", "GeneratedTokens"),
        ("2023-11-16 18:15:46.6805900,nan,44", "ContextTokens"),
        ("2023-11-16 18:15:46.6805900,-374,44", "ContextTokens"),
        ("2023-11-16 18:15:46.6805900,374,0", "GeneratedTokens"),
        ("2023-11-16 18:15:46.6805900,True,44", "ContextTokens"),
        ("2023-11-16 18:15:46.6805900,,44", "ContextTokens"),
        ("2023-11-16 18:15:46.6805900," + "9" * 5000 + ",44", "ContextTokens"),
        ("yesterday,374,44", "TIMESTAMP"),
        (",374,44", "TIMESTAMP"),
        ("1700158546,374,44", "TIMESTAMP"),
        ("2023-11-16 25:15:46.6805900,374,44", "TIMESTAMP"),
        ("2023-11-16 18:15:46.-5,374,44", "TIMESTAMP"),
        ("2023-11-16 18:15:46.nan,374,44", "TIMESTAMP"),
    ],
)
def test_a_malformed_azure_row_is_named(write: Write, row: str, culprit: str) -> None:
    path = write("trace.csv", azure(ROW, row, ROW))
    with pytest.raises(TraceError, match=rf"trace\.csv, line 3: {culprit}\b"):
        read_trace(path)


@pytest.mark.parametrize("column", HEADER.split(","))
def test_a_missing_azure_column_is_named(write: Write, column: str) -> None:
    header = ",".join(name for name in HEADER.split(",") if name != column)
    with pytest.raises(TraceError, match=rf"trace\.csv, line 1: .*{column}"):
        read_trace(write("trace.csv", f"{header}\n1,2\n"))


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        *(
            (json.dumps({k: v for k, v in REQUEST.items() if k != key}), key)
            for key in ("timestamp", "input_length", "output_length")
        ),
        *((jsonl(timestamp=value), "timestamp") for value in ("0", None, True, [1])),
        (jsonl(timestamp=float("nan")), "timestamp"),
        (jsonl(timestamp=float("inf")), "timestamp"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}', "timestamp"),
        *((jsonl(input_length=value), "input_length") for value in (0, -1, 1.0, "1", True, None)),
        *((jsonl(output_length=value), "output_length") for value in (0, -1, 2.5, "1", False)),
        (jsonl(output_length=float("nan")), "output_length"),
        *((jsonl(hash_ids=ids), "hash_ids") for ids in (None, 3, "3", {"3": 3})),
        *((jsonl(hash_ids=[0, i]), "hash_ids") for i in (-1, 1.0, "1", True, None, [1])),
        ('{"timestamp": 0, "input_length": 1, "output_len', "JSON"),
        ("timestamp=0", "JSON"),
        ("[0, 1, 1]", "JSON object"),
        ("7", "JSON object"),
        ("null", "JSON object"),
    ],
)
def test_a_malformed_json_line_is_named(write: Write, line: str, culprit: str) -> None:
    # A blank line counts, as in an editor.
    path = write("trace.jsonl", "\n".join([jsonl(), "", line, jsonl()]))
    with pytest.raises(TraceError, match=rf"trace\.jsonl, line 3: .*{culprit}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", ""),
        ("empty.jsonl", ""),
        ("blank.jsonl", "\n  \n"),
        ("header.csv", HEADER + "\n\n"),
        ("latin.csv", azure("2023-11-16 18:15:46,1,1\u00e9").encode("latin-1")),
        ("latin.jsonl", jsonl().encode() + b'\n{"timestamp": "\xe9"}'),
        ("utf16.csv", azure(ROW).encode("utf-16")),
        ("utf16.jsonl", jsonl().encode("utf-16")),
        ("zip.csv", b"PK\x03\x04\x00\xff\x00\x00"),
    ],
)
def test_a_file_without_requests_is_named(write: Write, name: str, content: str | bytes) -> None:
    with pytest.raises(TraceError, match=name.replace(".", r"\.")):
        read_trace(write(name, content))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        pytest.param("trace.jsonl", [jsonl(), jsonl(timestamp=10**400)], id="huge-number"),
        pytest.param("trace.jsonl", [jsonl(), "[" * 200_000], id="deep"),
        pytest.param("trace.csv", [HEADER, ROW + "9" * 200_000], id="huge-field"),
        pytest.param("trace.csv", [HEADER, "2023-11-16 18:15:46.1e999,374,44"], id="exponent"),
    ],
)
def test_an_odd_second_line_is_named(write: Write, name: str, lines: list[str]) -> None:
    with pytest.raises(TraceError, match="line 2"):
        read_trace(write(name, "\n".join(lines)))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read_trace(tmp_path / "nowhere.csv")


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".jsonl"]))
def test_no_bytes_raise_anything_but_a_trace_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    prefix = (HEADER + "\n").encode() if suffix == ".csv" else b""
    path.write_bytes(prefix + data)
    try:
        requests = read_trace(path)
    except TraceError as error:
        assert str(path) in str(error)
    else:
        assert requests


# Rates

traces = st.lists(
    st.builds(
        TraceRequest,
        st.floats(0, 1e6),
        st.integers(1, 3000),
        st.integers(1, 100),
        st.lists(st.integers(0, 5), max_size=6).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@given(trace=traces, rate=st.floats(0.01, 1e3))
def test_at_rate_scales_the_arrivals_alone(trace: list[TraceRequest], rate: float) -> None:
    trace.sort(key=lambda r: r.arrival_ms)
    span_ms = trace[-1].arrival_ms - trace[0].arrival_ms
    assume(span_ms > 1e-3)
    scaled = at_rate(trace, rate)
    assert rate_of(scaled) == pytest.approx(rate)
    assert [(r.input_length, r.output_length, r.hash_ids) for r in scaled] == [
        (r.input_length, r.output_length, r.hash_ids) for r in trace
    ]
    scaled_span_ms = scaled[-1].arrival_ms - scaled[0].arrival_ms
    for (a, b), (c, d) in zip(pairwise(trace), pairwise(scaled), strict=True):
        assert d.arrival_ms >= c.arrival_ms
        share = (b.arrival_ms - a.arrival_ms) / span_ms
        assert (d.arrival_ms - c.arrival_ms) / scaled_span_ms == pytest.approx(share, abs=1e-6)


def test_requests_that_arrive_at_once_have_no_rate() -> None:
    trace = [TraceRequest(5.0, 1, 1), TraceRequest(5.0, 2, 2)]
    assert rate_of(trace) == 0
    with pytest.raises(TraceError, match="at once"):
        at_rate(trace, 10)


def test_synthetic_has_the_means_asked_for() -> None:
    trace = synthetic(4000, rate=5.0, input_length=1000, output_length=40, seed=1)
    assert len(trace) == 4000 and trace[0].arrival_ms == 0
    gaps = [b.arrival_ms - a.arrival_ms for a, b in pairwise(trace)]
    assert min(gaps) >= 0
    # Three standard errors of a mean of 4000 exponentials are 5 %, of uniforms 1 %.
    assert mean(gaps) == pytest.approx(200, rel=0.05)
    assert mean(r.input_length for r in trace) == pytest.approx(1000, rel=0.01)
    assert mean(r.output_length for r in trace) == pytest.approx(40, rel=0.01)
    assert min(r.input_length for r in trace) >= 750
    assert max(r.input_length for r in trace) <= 1250
    # Exponential gaps: the share longer than the mean is 1/e, not one half.
    assert mean(gap > 200 for gap in gaps) == pytest.approx(0.368, abs=0.03)


def test_synthetic_is_the_same_for_a_seed() -> None:
    one, same, other = (synthetic(50, 5.0, 1000, 40, seed) for seed in (1, 1, 2))
    assert one == same != other


def test_synthetic_lengths_are_at_least_one() -> None:
    trace = synthetic(200, 5.0, 1, 1, seed=3, spread=0.9)
    assert min(r.input_length for r in trace) == min(r.output_length for r in trace) == 1


# Prompts


def common_prefix(one: tuple[int, ...] | list[int], other: tuple[int, ...] | list[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


@given(trace=traces)
def test_prompts_share_what_their_hash_ids_share(trace: list[TraceRequest]) -> None:
    made = list(prompts(trace))
    assert [len(tokens) for tokens in made] == [r.input_length for r in trace]
    for i, one in enumerate(trace):
        for j, other in enumerate(trace[:i]):
            blocks = common_prefix(one.hash_ids, other.hash_ids)
            shared = min(blocks * HASH_BLOCK_TOKENS, one.input_length, other.input_length)
            assert common_prefix(made[i], made[j]) == shared


@given(trace=traces)
def test_tokens_beyond_the_hash_ids_are_nobody_elses(trace: list[TraceRequest]) -> None:
    made = list(prompts(trace))
    for i, request in enumerate(trace):
        own = set(made[i][len(request.hash_ids) * HASH_BLOCK_TOKENS :])
        assert len(own) == max(0, request.input_length - len(request.hash_ids) * HASH_BLOCK_TOKENS)
        for j, tokens in enumerate(made):
            assert i == j or own.isdisjoint(tokens)


@given(ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True))
def test_different_hash_ids_have_no_token_in_common(ids: list[int]) -> None:
    trace = [TraceRequest(0.0, HASH_BLOCK_TOKENS, 1, (i,)) for i in ids]
    tokens = [token for prompt in prompts(trace) for token in prompt]
    assert len(set(tokens)) == len(tokens)


@given(trace=traces, length=st.integers(1, 300), count=st.integers(1, 5))
def test_a_prefix_stands_before_each_prompt(
    trace: list[TraceRequest], length: int, count: int
) -> None:
    longer = with_prefixes(trace, length, count, seed=1)
    assert longer == with_prefixes(trace, length, count, seed=1)
    prefixes: dict[int, list[int]] = {}
    for request, plain, tokens, rest in zip(
        longer, trace, prompts(longer), prompts(trace), strict=True
    ):
        assert request.input_length == plain.input_length + length == len(tokens)
        assert 0 <= request.prefix < count
        assert prefixes.setdefault(request.prefix, tokens[:length]) == tokens[:length]
        assert tokens[length:] == rest
    firsts = [tokens[0] for tokens in prefixes.values()]
    assert len(set(firsts)) == len(firsts)
