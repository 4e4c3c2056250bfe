# SPDX-License-Identifier: Apache-2.0
"""The workers that bring DuetModelRunner; everything else is vLLM's."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_duet.model_runner import DuetCPUModelRunner, DuetModelRunner
from vllm_duet.plugin import make_room_for_two_lanes
from vllm_duet.support import split_blockers


class DuetWorker(Worker):
    """vLLM's GPU worker with a DuetModelRunner."""

    def _init_workspace_and_model_runner(self) -> None:
        if not split_blockers(self.vllm_config):
            make_room_for_two_lanes()
        super()._init_workspace_and_model_runner()

    def _make_model_runner(self) -> Any:
        return DuetModelRunner(self.vllm_config, self.device)


class DuetCPUWorker(CPUWorker):
    """vLLM's CPU worker with a DuetCPUModelRunner."""

    def init_device(self) -> None:
        # The CPU worker has no hook for its runner's class; the one it builds
        # holds no weights or cache yet.
        super().init_device()
        self.model_runner = DuetCPUModelRunner(self.vllm_config, self.device)
