# SPDX-License-Identifier: Apache-2.0
"""The workers that bring DuetModelRunner; everything else is vLLM's."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_duet.model_runner import DuetCPUModelRunner, DuetModelRunner
from vllm_duet.plugin import make_room_for_two_lanes
from vllm_duet.support import split_blockers

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's


class DuetWorker(Worker):
    """vLLM's GPU worker with a DuetModelRunner."""

    def _init_workspace_and_model_runner(self) -> None:
        if not split_blockers(self.vllm_config):
            make_room_for_two_lanes()
        super()._init_workspace_and_model_runner()

    def _make_model_runner(self) -> Any:
        return DuetModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        available: int = super().determine_available_memory()
        needed = self.model_runner.prefill_activation_bytes
        if not needed or self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own figure is kept
        logger.info(
            "vllm-duet: the prefill lane takes %.2f GiB of the KV cache's %.2f.",
            needed / 2**30,
            available / 2**30,
        )
        self.available_kv_cache_memory_bytes -= needed
        return available - needed


class DuetCPUWorker(CPUWorker):
    """vLLM's CPU worker with a DuetCPUModelRunner."""

    def init_device(self) -> None:
        # The CPU worker has no hook for its runner's class; the one it builds
        # holds no weights or cache yet.
        super().init_device()
        self.model_runner = DuetCPUModelRunner(self.vllm_config, self.device)
