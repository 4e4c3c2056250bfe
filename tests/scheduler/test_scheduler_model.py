# SPDX-License-Identifier: Apache-2.0
"""The real scheduler over a modelled device, in drawn lives; see machine.py and device.py.

How many lives are drawn is in DUET_MODEL_RUNS. A nightly run of a million tokens::

    DUET_MODEL_RUNS=25000 pytest tests/scheduler -k any_life
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from scheduler import mutants
from scheduler.machine import SchedulerMachine
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet import scheduler as duet_scheduler
from vllm_duet.scheduler import DuetScheduler

RUNS = int(os.environ.get("DUET_MODEL_RUNS", "2000"))
RUNS_TO_NOTICE = 500
STEPS = 40


def draw(
    runs: int, scheduler_cls: type, phases: tuple[Phase, ...] = (Phase.generate,), **fixed
) -> None:
    machine = type("Machine", (SchedulerMachine,), {"scheduler_cls": scheduler_cls, "fixed": fixed})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize="DUET_MODEL_RUNS" not in os.environ,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=phases,
        ),
    )


def test_any_life_of_a_scheduler():
    draw(RUNS, DuetScheduler, (Phase.generate, Phase.shrink))


def test_stock_vllm_passes():
    """The model asks nothing that vLLM's own scheduler does not do."""
    draw(RUNS // 10, AsyncScheduler)


# What the model has to notice


SYNCHRONOUS = dict(asynchronous=False, mode="split")
ASYNCHRONOUS = dict(asynchronous=True, mode="split")


WRONG_TOKEN = "gets a wrong token"


@pytest.mark.parametrize(
    ("mutant", "error", "fixed"),
    [
        (mutants.ForgetsRowsOfTheAborted, "No free indices", dict(max_num_seqs=3)),
        (mutants.PrefillsOnTheDecodeLane, f"is also of|{WRONG_TOKEN}", ASYNCHRONOUS),
        (mutants.LetsNewcomersOvertake, "is overtaken", ASYNCHRONOUS),
        (mutants.ReadsBeforeItIsDecoded, WRONG_TOKEN, SYNCHRONOUS),
        (mutants.DoesNotReset, "not reset", {}),
        (mutants.KeepsTheId, "duplicate request id", {}),
        (mutants.GivesBlocksAway, "is free|is also of|is lost", {}),
        (mutants.GivesRowsAway, "row of .* is given back", {}),
        (mutants.AdmitsBesidePrefill, f"running at once|{WRONG_TOKEN}|is overtaken", {}),
        (mutants.TrustsAFailedPrefill, WRONG_TOKEN, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_model_notices(mutant, error, fixed, monkeypatch):
    # The scheduler would notice by itself, and nothing would be known of the model.
    monkeypatch.setattr(duet_scheduler, "has_prefill", lambda output: False)
    with pytest.raises(Exception, match=error):
        draw(RUNS_TO_NOTICE, mutant, **fixed)
