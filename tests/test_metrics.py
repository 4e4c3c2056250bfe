# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from vllm.config import DeviceConfig, VllmConfig
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import (
    AggregatedLoggingStatLogger,
    LoggingStatLogger,
    PrometheusStatLogger,
    StatLoggerManager,
)
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_duet import metrics, plugin
from vllm_duet.metrics import PREFIX, DuetCounters, DuetStatLogger, DuetTotals
from vllm_duet.plan import DuetPlan, Mode
from vllm_duet.roofline import StepTimeCorrection
from vllm_duet.step_times import StepTimes
from vllm_duet.watch import LaneWatch


@pytest.fixture(autouse=True)
def _clean_registry() -> Iterator[None]:
    yield
    metrics.unregister()
    unregister_vllm_metrics()


@pytest.fixture
def stock_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM as it is without the plugin, whatever ran in this process before."""
    init = StatLoggerManager.__init__
    monkeypatch.setattr(StatLoggerManager, "__init__", getattr(init, "__wrapped__", init))


def config(scheduler_cls: str | None = None) -> Any:
    made = VllmConfig(device_config=DeviceConfig("cpu"))
    made.scheduler_config.scheduler_cls = scheduler_cls
    made.model_config = SimpleNamespace(
        served_model_name="tiny", max_model_len=64, is_diffusion=False
    )
    return made


def stats(**counts: Any) -> SchedulerStats:
    """Statistics as the API process gets them: encoded, sent and decoded."""
    return crossed(entries(DuetCounters(), **counts))


def entries(
    counters: DuetCounters,
    launched: int = 0,
    joined: int = 0,
    blockers: Sequence[str] = (),
    **steps: int,
) -> Any:
    by_mode = {mode: steps.get(mode, 0) for mode in Mode}
    return counters.entries(DuetTotals(by_mode, launched, joined), blockers, StepTimes(None))


def crossed(entries: dict[str, int]) -> SchedulerStats:
    made = SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage=entries)
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=made))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent)
    return received.scheduler_stats


def series(name: str, **labels: str) -> float | None:
    labels = {"model_name": "tiny", "engine": "0"} | labels
    return prometheus_client.REGISTRY.get_sample_value(PREFIX + name, labels)


def test_an_entry_is_what_a_total_grew_by():
    counters = DuetCounters()
    assert entries(counters, launched=1, split=2, blockers=["LoRA", "no: room"]) == {
        "vllm_duet:steps:split": 2,
        "vllm_duet:prefills_launched": 1,
        "vllm_duet:split_possible:LoRA; no: room": 0,
    }
    assert entries(counters, launched=1, joined=1, split=5) == {
        "vllm_duet:steps:split": 3,
        "vllm_duet:prefills_joined": 1,
        "vllm_duet:split_possible:": 1,
    }
    assert entries(counters, launched=1, joined=1, split=5) == {"vllm_duet:split_possible:": 1}


def test_totals_become_series():
    logger = DuetStatLogger(config())
    assert series("steps_total", mode="split") == 0
    counters = DuetCounters()
    for step in range(1, 4):
        sent = entries(counters, launched=step, joined=step - 1, split=2 * step, aggregated=step)
        logger.record(crossed(sent), None)
    logger.record(None, None)
    assert series("steps_total", mode="split") == 6
    assert series("steps_total", mode="aggregated") == 3
    assert series("steps_total", mode="capped") == 0
    assert series("prefills_launched_total") == 3
    assert series("prefills_joined_total") == 2
    assert series("split_possible", reason="") == 1
    logger.record(stats(blockers=["LoRA", "no: room"]), None)
    assert series("split_possible", reason="LoRA; no: room") == 0
    assert series("split_possible", reason="") is None


def test_the_time_lanes_were_busy_becomes_seconds():
    logger = DuetStatLogger(config())
    counters, totals = DuetCounters(), DuetTotals()
    for _ in range(3):
        totals.failed += 1
        totals.split_ms += 250.0
        totals.lane_busy_ms["decode"] += 0.4
        totals.lane_busy_ms["prefill"] += 200.0
        sent = counters.entries(totals, blockers=[], times=StepTimes(None))
        logger.record(crossed(sent), None)
    assert series("prefills_failed_total") == 3
    assert series("split_seconds_total") == pytest.approx(0.75)
    assert series("lane_busy_seconds_total", lane="decode") == pytest.approx(0.0012)
    assert series("lane_busy_seconds_total", lane="prefill") == pytest.approx(0.6)


def test_how_far_forecasts_are_off_is_told_by_kind_of_step():
    logger = DuetStatLogger(config())
    counters = DuetCounters()
    for ratio in (1.25, 1.5):
        times = StepTimes(StepTimeCorrection(min_samples=1))
        times.correction.observe(1.0, ratio, "decode_lane")
        times.correction.observe(1.0, 0.9, "aggregated")
        logger.record(crossed(counters.entries(DuetTotals(), [], times)), None)
    assert series("step_time_ratio", kind="decode_lane") == pytest.approx(1.5)
    assert series("step_time_ratio", kind="aggregated") == pytest.approx(0.9)
    assert series("step_time_ratio", kind="prefill_lane") is None


def test_lanes_and_late_gaps_become_series():
    logger, counters, now = DuetStatLogger(config()), DuetCounters(), [0.0]
    watch = LaneWatch([16, 32], lambda _: None, None, lambda: now[0])
    times = StepTimes(None, watch=watch)
    assert series("late_gaps_total", mode="capped") == 0
    assert series("late_gaps_total", mode="decode_only") == 0

    def record() -> None:
        logger.record(crossed(counters.entries(DuetTotals(), [], times)), None)

    times.late_gaps[Mode.CAPPED] += 3
    record()
    assert series("late_gaps_total", mode="capped") == 3
    assert series("lane_in_use", decode_sms="16") == series("lane_in_use", decode_sms="32") == 1
    assert series("split_speedup") is None  # there was no split
    plan = DuetPlan(Mode.SPLIT, "", decode_sms=16, whole_step_ms=800.0, whole_prefill_ms=1.0)
    for _ in range(70):
        watch.step(plan, 0.0, 1000.0, decodes=True)
    record()
    assert series("split_speedup") == pytest.approx(0.8)
    now[0] += 100
    watch.look()
    for _ in range(2):
        record()
    assert series("lane_in_use", decode_sms="16") == series("lane_in_use", decode_sms="32") == 0
    reason = {"reason": "does_not_pay"}
    assert series("lane_taken_out_total", decode_sms="32", **reason) == 1


def test_the_names_are_those_of_the_documentation():
    DuetStatLogger(config())
    text = prometheus_client.generate_latest().decode()
    assert 'vllm_duet:steps_total{engine="0",mode="capped",model_name="tiny"} 0.0' in text


def test_each_engine_has_its_own_series():
    logger = DuetStatLogger(config(), [0, 1])
    logger.record(stats(launched=4), None, engine_idx=1)
    assert series("prefills_launched_total") == 0
    assert series("prefills_launched_total", engine="1") == 4


def test_a_second_engine_in_the_process_starts_anew():
    DuetStatLogger(config()).record(stats(launched=1), None)
    DuetStatLogger(config())
    assert series("prefills_launched_total") == 0


def test_a_crossing_keeps_every_entry():
    made = stats(joined=5)
    assert made.num_running_reqs == 3
    assert made.num_kv_fetch_reqs_by_stage == {
        "vllm_duet:prefills_joined": 5,
        "vllm_duet:split_possible:": 1,
    }


@pytest.mark.parametrize("logger", [LoggingStatLogger, AggregatedLoggingStatLogger])
def test_vllms_log_line_takes_leftover_entries(logger: Any, vllm_log: Any):
    """As when DuetStatLogger was left out: a clause too many, and no error."""
    made = logger(config(), [0] if logger is AggregatedLoggingStatLogger else 0)
    made.record(stats(joined=5), None)
    made.log()
    assert "Running: 3 reqs" in vllm_log.text


def test_vllms_series_take_leftover_entries():
    made = PrometheusStatLogger(config(), [0])
    made.record(stats(joined=5), None)
    text = prometheus_client.generate_latest().decode()
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 3.0' in text
    assert PREFIX not in text


def test_duets_engine_gets_the_logger_first(stock_manager: None, vllm_log: Any):
    plugin.add_stat_logger()
    plugin.add_stat_logger()
    manager = StatLoggerManager(config("vllm_duet.DuetScheduler"))
    assert [type(logger) for logger in manager.stat_loggers].count(DuetStatLogger) == 1
    assert isinstance(manager.stat_loggers[0], DuetStatLogger)
    manager.record(stats(launched=2, joined=1), None)
    manager.log()
    assert series("prefills_launched_total") == 2
    assert "Running: 3 reqs" in vllm_log.text
    assert "KV fetch" not in vllm_log.text


def test_another_scheduler_gets_vllms_loggers_alone(stock_manager: None):
    plugin.add_stat_logger()
    manager = StatLoggerManager(config())
    assert not any(isinstance(logger, DuetStatLogger) for logger in manager.stat_loggers)
    assert PREFIX not in prometheus_client.generate_latest().decode()


def test_loggers_of_the_user_stay(stock_manager: None):
    plugin.add_stat_logger()
    for arguments in ({"custom_stat_loggers": [LoggingStatLogger]}, {}):
        manager = StatLoggerManager(
            config("vllm_duet.DuetScheduler"), [0, 1], enable_default_loggers=False, **arguments
        )
        assert isinstance(manager.stat_loggers[0], DuetStatLogger)
        assert len(manager.stat_loggers) == 2 + len(arguments)
