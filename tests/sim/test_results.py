# SPDX-License-Identifier: Apache-2.0
"""Which requests are good, on records made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics

from vllm_duet.sim import results
from vllm_duet.sim.engine import RequestRecord
from vllm_duet.sim.simulation import Outcome

TBT_SLO_MS, TTFT_SLO_MS = 50.0, 2000.0


def record(ttft_ms: float, gaps_ms: Sequence[float], arrival_ms: float = 0.0) -> RequestRecord:
    times = (arrival_ms + np.cumsum([ttft_ms, *gaps_ms])).tolist()
    return RequestRecord("r", arrival_ms, 100, len(times), times)


def figures(*records: RequestRecord, num_gpus: int = 1) -> dict[str, float]:
    outcome = Outcome(list(records), [], 0, 1000, 0, {}, num_gpus)
    return results.figures(outcome, TBT_SLO_MS, TTFT_SLO_MS)


def share(*records: RequestRecord) -> float:
    return figures(*records)["good_requests_share"]


STALLED = record(300, [15_000] + [20] * 511)
"""Its KV cache had to wait for room: 15 s between the first and the second token."""


def test_a_stall_is_not_hidden_by_the_gaps_of_the_others() -> None:
    """p99 over all gaps does not see one gap of 15 s in each request, nor does mean TPOT."""
    ran = figures(*[STALLED] * 300)
    assert ran["tbt_ms"]["p99"] == pytest.approx(20)
    assert ran["ttft_ms"]["p99"] <= TTFT_SLO_MS
    assert ran["request_goodput"] == pytest.approx(ran["request_throughput"])
    assert ran["good_requests_share"] == 0.0


def test_the_share_is_of_the_requests_that_finished() -> None:
    good = record(300, [20] * 511)
    assert share(*[good] * 99, STALLED) == pytest.approx(0.99)
    assert share(good) == 1.0


@pytest.mark.parametrize(
    ("ttft_ms", "gaps_ms", "is_good"),
    [
        (2000, [50] * 9, True),
        (2000.1, [50] * 9, False),
        (10, [50.1] * 9, False),
        # One gap in 200 is beyond the 99th percentile; up to three times the bound it may be.
        (10, [20] * 199 + [150], True),
        (10, [20] * 199 + [150.1], False),
        # One gap in 29 is not.
        (10, [20] * 28 + [149], False),
        # p99 lies between the second longest gap and the longest: here 99 % of the way up.
        (10, [20, 50.2], True),
        (10, [20, 50.5], False),
        # Requests of one token have no gap.
        (2000, [], True),
        (2001, [], False),
    ],
)
def test_when_a_request_is_good(ttft_ms: float, gaps_ms: list[float], is_good: bool) -> None:
    assert share(record(ttft_ms, gaps_ms)) == float(is_good)


def test_ttft_counts_from_arrival() -> None:
    assert share(record(1500, [20] * 5, arrival_ms=9000)) == 1.0


def test_request_goodput_is_what_vllm_bench_prints() -> None:
    records = [
        record(1000, [9, 90]),  # the mean is within 50 ms, though one gap is not
        record(1000, [11, 90]),
        record(1999, []),  # one token: its TTFT alone decides
        record(2001, [10, 20]),
        record(500, [20] * 40, arrival_ms=700),
    ]
    outputs = [
        RequestFuncOutput(
            success=True,
            ttft=(r.token_ms[0] - r.arrival_ms) / 1e3,
            latency=(r.token_ms[-1] - r.arrival_ms) / 1e3,
            itl=(np.diff(r.token_ms) / 1e3).tolist(),
            output_tokens=len(r.token_ms),
            start_time=r.arrival_ms / 1e3,
        )
        for r in records
    ]
    duration_s = max(r.token_ms[-1] for r in records) / 1e3
    limits = {"ttft": TTFT_SLO_MS, "tpot": TBT_SLO_MS}
    theirs, _ = calculate_metrics([], outputs, duration_s, None, [99.0], limits)
    assert theirs.request_goodput == pytest.approx(3 / duration_s)
    assert figures(*records)["request_goodput"] == pytest.approx(theirs.request_goodput)
    # Rates are for one GPU.
    assert figures(*records, num_gpus=2)["request_goodput"] == pytest.approx(1.5 / duration_s)
