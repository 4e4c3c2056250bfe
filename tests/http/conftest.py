# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import failing_lane
import pytest
from cpu_server import CpuServer, duet_options
from tiny_model import make_tiny_model

LIMITS = "--dtype float32 --max-model-len 1024 --max-num-batched-tokens 256 --max-num-seqs 16"
HOLD_STEPS = 8


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="session")
def hold_steps() -> int:
    """For how many decode steps the server ``split`` keeps each prefill in flight."""
    return HOLD_STEPS


@pytest.fixture(scope="module")  # five servers take a third of a small machine's memory
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of servers of one model: stock vLLM, always split, random plans, plans by
    forecast, and always split with a prefill lane that fails. No gap is within the bound."""
    one_process = ["--distributed-executor-backend", "uni"]  # for engine core and worker
    duet = {
        "stock": one_process,
        "split": duet_options(mode="split", tbt_slo_ms=0.01, serial_hold_steps=HOLD_STEPS),
        "auto": one_process + duet_options(gpu_profile="h100-sxm", tbt_slo_ms=0.01),
        "random": one_process + duet_options(mode="random", seed=1, serial_timing="threaded"),
        "failing": duet_options(mode="split", serial_hold_steps=HOLD_STEPS),
    }
    failing = failing_lane.install(tmp_path_factory.mktemp("plugin"))
    with ExitStack() as stack:
        # Start all before waiting for any.
        started = {
            name: stack.enter_context(
                CpuServer(
                    model,
                    ["--skip-tokenizer-init", *LIMITS.split(), *options],
                    environment=failing if name == "failing" else None,
                )
            )
            for name, options in duet.items()
        }
        for server in started.values():
            server.wait_until_ready()
        yield {name: server.url for name, server in started.items()}
