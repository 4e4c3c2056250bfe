# SPDX-License-Identifier: Apache-2.0
"""A vLLM plugin for a server whose prefill lane runs out of memory over prompts with MARK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARK = 511


def install(folder: Path) -> dict[str, str]:
    """Make vLLM find ``register``; returns the environment that it takes."""
    from cpu_server import provide_plugin

    provide_plugin(folder, "failing_lane", "failing_lane:register")
    return {
        "PYTHONPATH": f"{folder}:{Path(__file__).parent}",
        "VLLM_PLUGINS": "duet,failing_lane",
    }


def register() -> None:
    """Called by vLLM in each of its processes, the worker's among them."""
    import torch

    from vllm_duet.worker.lane_state import RecordedForward
    from vllm_duet.worker.runner import DuetModelRunnerMixin

    stock = DuetModelRunnerMixin._run_prefill

    def run_prefill(runner: Any, lanes: Any, forward: RecordedForward) -> Any:
        if (forward.inputs["input_ids"] == MARK).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return stock(runner, lanes, forward)

    DuetModelRunnerMixin._run_prefill = run_prefill  # type: ignore[method-assign]
