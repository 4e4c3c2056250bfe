# SPDX-License-Identifier: Apache-2.0
"""vllm-duet's Prometheus series, beside vLLM's own on ``/metrics``.

The scheduler counts in the engine core; ``/metrics`` is in the API process. What
crosses is vLLM's SchedulerStats, encoded field by field, so the counts travel in
the one field that is a mapping of names to numbers,
``num_kv_fetch_reqs_by_stage``, under keys that begin with ``PREFIX``.
DuetStatLogger takes them out again before vLLM's own loggers see the stats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_duet.plan import Mode
from vllm_duet.policy import DECODE_ONLY
from vllm_duet.step_times import StepTimes

PREFIX = "vllm_duet:"

_STEPS = f"{PREFIX}steps"
_STEPS_HELP = "Steps in which decodes and prefill competed, by how they were executed."
_LAUNCHED = f"{PREFIX}prefills_launched"
_JOINED = f"{PREFIX}prefills_joined"
_FAILED = f"{PREFIX}prefills_failed"
_SPLIT_US = f"{PREFIX}split_us"
_LANE_BUSY_US = f"{PREFIX}lane_busy_us"
_RATIO_PPM = f"{PREFIX}step_time_ratio_ppm"
_SPLIT_POSSIBLE = f"{PREFIX}split_possible"
_LATE_GAPS = f"{PREFIX}late_gaps"
_LANE_IN_USE = f"{PREFIX}lane_in_use"
_LANE_TAKEN_OUT = f"{PREFIX}lane_taken_out"
_SPEEDUP_PPM = f"{PREFIX}split_speedup_ppm"

Lane = Literal["decode", "prefill"]


@dataclass(slots=True)
class DuetTotals:
    """What DuetScheduler counts, from its start.

    ``steps`` are those in which decodes and prefill competed, by what became of them.
    ``split_ms`` is the time in which a prefill was in flight, ``lane_busy_ms`` how much of
    it each lane was busy: their ratio is the lane's utilization.
    """

    steps: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(Mode, 0))
    launched: int = 0
    joined: int = 0
    failed: int = 0
    split_ms: float = 0.0
    lane_busy_ms: dict[Lane, float] = field(
        default_factory=lambda: dict.fromkeys(get_args(Lane), 0.0)
    )


def steps_by_mode(scheduler: Any) -> dict[str, int]:
    """``DuetTotals.steps`` of a DuetScheduler; of any other, nothing."""
    totals: DuetTotals | None = getattr(scheduler, "totals", None)
    return {str(mode): steps for mode, steps in totals.steps.items()} if totals else {}


class DuetCounters:
    """Turns DuetScheduler's totals into entries for its next stats.

    An entry is what a total grew by since the stats before: where several API
    processes share an engine, each gets some of the stats, and the series they
    expose are added up.
    """

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}

    def entries(
        self, totals: DuetTotals, blockers: Sequence[str], times: StepTimes
    ) -> dict[str, int]:
        """Entries for ``num_kv_fetch_reqs_by_stage``; must be sent.

        ``blockers`` say why steps cannot be split, a clause each.
        """
        now = {f"{_STEPS}:{mode}": steps for mode, steps in totals.steps.items()}
        now |= {_LAUNCHED: totals.launched, _JOINED: totals.joined, _FAILED: totals.failed}
        now[_SPLIT_US] = int(1e3 * totals.split_ms)
        for lane, busy_ms in totals.lane_busy_ms.items():
            now[f"{_LANE_BUSY_US}:{lane}"] = int(1e3 * busy_ms)
        now |= {f"{_LATE_GAPS}:{mode}": gaps for mode, gaps in times.late_gaps.items()}
        if (watch := times.watch) is not None:
            for (sms, reason), count in watch.taken_out.items():
                now[f"{_LANE_TAKEN_OUT}:{sms}:{reason}"] = count
        sent, self._sent = self._sent, now
        entries = {key: total - sent.get(key, 0) for key, total in now.items()}
        entries = {key: increment for key, increment in entries.items() if increment}
        ratios = times.correction.factors() if times.correction is not None else {}
        for kind, ratio in ratios.items():
            entries[f"{_RATIO_PPM}:{kind}"] = int(1e6 * ratio)
        if watch is not None:
            entries |= {f"{_LANE_IN_USE}:{sms}": int(used) for sms, used in watch.in_use.items()}
            if (speedup := watch.split_speedup) is not None:
                entries[_SPEEDUP_PPM] = int(1e6 * speedup)
        return entries | {f"{_SPLIT_POSSIBLE}:{'; '.join(blockers)}": int(not blockers)}


class DuetStatLogger(AggregateStatLoggerBase):
    """One for all engines of an API process: ``engine`` is a label of every series.

    It must be asked before vLLM's loggers: they would take our entries for
    requests that wait for a KV connector.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        unregister()
        model_name = vllm_config.model_config.served_model_name
        engines = {index: (model_name, str(index)) for index in engine_indexes or [0]}
        labels = ["model_name", "engine"]
        steps = Counter(_STEPS, _STEPS_HELP, ["mode", *labels])
        launched = Counter(_LAUNCHED, "Prefills launched beside decode steps.", labels)
        joined = Counter(_JOINED, "Prefills joined after running beside decode steps.", labels)
        failed = Counter(_FAILED, "Prefills joined that ended in an error.", labels)
        split = Counter(
            f"{PREFIX}split_seconds", "Time in which a prefill ran beside decode steps.", labels
        )
        busy = Counter(
            f"{PREFIX}lane_busy_seconds",
            "Time in which a lane was busy while steps were split.",
            ["lane", *labels],
        )
        self._split_possible = Gauge(
            _SPLIT_POSSIBLE,
            "1 if the engine can split steps, 0 if it only runs whole ones, for the reason given.",
            ["reason", *labels],
            multiprocess_mode="mostrecent",
        )
        self._reasons = dict[int, str]()
        late = Counter(
            _LATE_GAPS,
            "Gaps between two tokens of a request that were longer than the bound.",
            ["mode", *labels],
        )
        self._taken_out = Counter(
            _LANE_TAKEN_OUT,
            "Times that a decode lane was taken out of use.",
            ["decode_sms", "reason", *labels],
        )
        # By the beginning of the key they travel under, after which come their labels.
        self._gauges = {
            _RATIO_PPM: Gauge(
                f"{PREFIX}step_time_ratio",
                "Measured over forecast time of a step, as learned; it corrects forecasts.",
                ["kind", *labels],
                multiprocess_mode="mostrecent",
            ),
            _LANE_IN_USE: Gauge(
                _LANE_IN_USE,
                "1 if steps may be split by the decode lane, 0 while it is out of use.",
                ["decode_sms", *labels],
                multiprocess_mode="mostrecent",
            ),
            _SPEEDUP_PPM: Gauge(
                f"{PREFIX}split_speedup",
                "What split steps did lately, over what whole ones would have done in the time.",
                labels,
                multiprocess_mode="mostrecent",
            ),
        }
        self._label_values = engines
        # By the key they travel under; made here, so that each starts at 0.
        self._counters = {
            index: {
                **{f"{_STEPS}:{mode}": steps.labels(mode, *values) for mode in Mode},
                **{
                    f"{_LATE_GAPS}:{mode}": late.labels(mode, *values)
                    for mode in (*Mode, DECODE_ONLY)
                },
                _LAUNCHED: launched.labels(*values),
                _JOINED: joined.labels(*values),
                _FAILED: failed.labels(*values),
                _SPLIT_US: split.labels(*values),
                **{
                    f"{_LANE_BUSY_US}:{lane}": busy.labels(lane, *values) for lane in get_args(Lane)
                },
            }
            for index, values in engines.items()
        }

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step's counts to the series, and remove them from ``scheduler_stats``."""
        if scheduler_stats is None:
            return
        entries = scheduler_stats.num_kv_fetch_reqs_by_stage
        counters, engine = self._counters[engine_idx], self._label_values[engine_idx]
        for key in [key for key in entries if key.startswith(PREFIX)]:
            value = entries.pop(key)
            if key.startswith(_SPLIT_POSSIBLE):
                self._set_split_possible(key.removeprefix(f"{_SPLIT_POSSIBLE}:"), value, engine_idx)
                continue
            series, labels = _series_of(key)
            if series in self._gauges:
                in_ppm = series in (_RATIO_PPM, _SPEEDUP_PPM)
                gauge = self._gauges[series].labels(*labels, *engine)
                gauge.set(1e-6 * value if in_ppm else value)
            elif series == _LANE_TAKEN_OUT:
                self._taken_out.labels(*labels, *engine).inc(value)
            else:
                in_us = series in (_SPLIT_US, _LANE_BUSY_US)
                counters[key].inc(1e-6 * value if in_us else value)

    def _set_split_possible(self, reason: str, value: int, engine_idx: int) -> None:
        engine, before = self._label_values[engine_idx], self._reasons.get(engine_idx)
        if before is not None and before != reason:
            self._split_possible.remove(before, *engine)
        self._reasons[engine_idx] = reason
        self._split_possible.labels(reason, *engine).set(value)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the scheduler has said at start-up what it cannot split."""


def _series_of(key: str) -> tuple[str, list[str]]:
    """``vllm_duet:steps:split`` is ``vllm_duet:steps`` and its labels."""
    name, *labels = key.removeprefix(PREFIX).split(":")
    return PREFIX + name, labels


def unregister() -> None:
    """Remove our series from Prometheus's registry, as vLLM does with its own for a new engine."""
    for collector in list(REGISTRY._collector_to_names):
        if str(getattr(collector, "_name", "")).startswith(PREFIX):
            REGISTRY.unregister(collector)
