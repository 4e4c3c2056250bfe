# SPDX-License-Identifier: Apache-2.0
"""Request traces: reading them, scaling them to a rate, making synthetic ones."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

HASH_BLOCK_TOKENS = 512
"""The tokens that one of Mooncake's hash_ids stands for (kvcache-ai/Mooncake, README)."""

_HASH_TOKENS = 1 << 40
"""Token ids of shared blocks start here, and those of tokens nobody shares at 0."""

_PREFIX_TOKENS = 1 << 50
"""Token ids of the prefixes of ``with_prefixes`` start here."""


class TraceError(ValueError):
    """A trace that cannot be used; names the file and the line."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: when it arrives, and its prompt's and answer's tokens.

    Requests whose ``hash_ids`` start alike share as many blocks of HASH_BLOCK_TOKENS
    tokens at the start of their prompts. Before these, all with the same ``prefix`` share
    ``prefix_length`` tokens.
    """

    arrival_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    prefix: int = 0
    prefix_length: int = 0


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a trace, by arrival; the first arrives at 0.

    Three formats: CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens
    (Azure/AzurePublicDataset), JSONL with timestamp in ms, input_length, output_length
    and hash_ids (kvcache-ai/Mooncake), and the same JSONL without hash_ids.

    Raises:
        TraceError: a line is malformed, or there are no requests.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        parse = _azure if path.suffix.lower() == ".csv" else _jsonl
        try:
            requests = sorted(parse(lines, path), key=lambda request: request.arrival_ms)
        except UnicodeDecodeError as error:
            raise TraceError(f"{path} is not text: {error}") from None
    if not requests:
        raise TraceError(f"{path} has no requests")
    first = requests[0].arrival_ms
    return [replace(request, arrival_ms=request.arrival_ms - first) for request in requests]


def at_rate(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests at ``rate`` a second on average; order and burstiness stay.

    Raises:
        TraceError: all arrive at once, which no scaling turns into a rate.
    """
    span_ms = requests[-1].arrival_ms - requests[0].arrival_ms
    if span_ms <= 0:
        raise TraceError("requests that all arrive at once cannot be scaled to a rate")
    scale = 1e3 * len(requests) / rate / span_ms
    return [replace(request, arrival_ms=request.arrival_ms * scale) for request in requests]


def rate_of(requests: Sequence[TraceRequest]) -> float:
    """Requests a second on average; 0 where all arrive at once."""
    span_ms = requests[-1].arrival_ms - requests[0].arrival_ms
    return 1e3 * len(requests) / span_ms if span_ms else 0.0


def synthetic(
    count: int, rate: float, input_length: int, output_length: int, seed: int, spread: float = 0.25
) -> list[TraceRequest]:
    """Poisson arrivals at ``rate`` a second, with lengths of the given means.

    Lengths are uniform within ``spread`` of the mean on either side.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1e3 / rate, count)
    arrivals = np.cumsum(gaps) - gaps[0]

    def lengths(mean: int) -> list[int]:
        around = random.uniform(1 - spread, 1 + spread, count) * mean
        return [max(1, round(length)) for length in around]

    rows = zip(arrivals.tolist(), lengths(input_length), lengths(output_length), strict=True)
    return [TraceRequest(*row) for row in rows]


def with_prefixes(
    requests: Iterable[TraceRequest], length: int, count: int, seed: int
) -> list[TraceRequest]:
    """The same requests, each behind one of ``count`` prefixes of ``length`` tokens more.

    As in vLLM's data sets ``random`` (one prefix) and ``prefix_repetition``.
    """
    random = np.random.default_rng(seed)
    return [
        replace(
            request,
            input_length=request.input_length + length,
            prefix=int(random.integers(count)),
            prefix_length=length,
        )
        for request in requests
    ]


def prompts(requests: Iterable[TraceRequest]) -> Iterator[list[int]]:
    """Each request's prompt: equal tokens where a prefix or hash_ids are shared, else no two
    alike."""
    unused = 0
    for request in requests:
        first = _PREFIX_TOKENS + request.prefix * request.prefix_length
        tokens = list(range(first, first + request.prefix_length))
        for hash_id in request.hash_ids:
            first = _HASH_TOKENS + hash_id * HASH_BLOCK_TOKENS
            tokens += range(first, first + HASH_BLOCK_TOKENS)
        del tokens[request.input_length :]
        rest = request.input_length - len(tokens)
        tokens += range(unused, unused + rest)
        unused += rest
        yield tokens


def _azure(lines: Iterable[str], path: Path) -> Iterator[TraceRequest]:
    reader = csv.DictReader(lines)
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise TraceError(f"{path}, line 1: there is no column {missing[0]}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # line_num counts lines that were read whole.
            raise TraceError(f"{path}, line {reader.line_num + 1}: not CSV ({error})") from None
        yield _request(
            path,
            reader.line_num,
            row,
            arrival=("TIMESTAMP", _timestamp_ms),
            lengths=("ContextTokens", "GeneratedTokens"),
            whole=_digits,
        )


def _jsonl(lines: Iterable[str], path: Path) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise TraceError(f"{path}, line {number}: not a JSON object")
        request = _request(
            path,
            number,
            row,
            arrival=("timestamp", _number),
            lengths=("input_length", "output_length"),
            whole=_integer,
        )
        hash_ids = row.get("hash_ids", [])
        if not isinstance(hash_ids, list) or not all(_is_count(i) for i in hash_ids):
            raise TraceError(f"{path}, line {number}: hash_ids is not a list of whole numbers")
        yield replace(request, hash_ids=tuple(hash_ids))


def _request(
    path: Path,
    line: int,
    row: dict[str, Any],
    arrival: tuple[str, Callable[[Any], float]],
    lengths: tuple[str, str],
    whole: Callable[[Any], int],
) -> TraceRequest:
    def value(key: str, parse: Callable[[Any], Any], expected: str) -> Any:
        if key not in row:
            raise TraceError(f"{path}, line {line}: {key} is missing")
        try:
            return parse(row[key])
        except (TypeError, ValueError, OverflowError):
            raise TraceError(
                f"{path}, line {line}: {key} is {row[key]!r}, not {expected}"
            ) from None

    arrival_ms = value(*arrival, "a time")
    tokens = [value(key, whole, "a whole number of at least 1") for key in lengths]
    return TraceRequest(arrival_ms, *tokens)


def _timestamp_ms(text: str) -> float:
    # Seven digits of a second are one more than datetime takes.
    moment, _, fraction = text.partition(".")
    if fraction and not (fraction.isascii() and fraction.isdigit()):
        raise ValueError
    seconds = datetime.fromisoformat(moment + "+00:00").timestamp()
    return 1e3 * seconds + (1e3 * float(f"0.{fraction}") if fraction else 0.0)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _integer(value: Any) -> int:
    if not _is_count(value) or value < 1:
        raise TypeError
    return int(value)


def _digits(text: str) -> int:
    return _integer(int(text))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
