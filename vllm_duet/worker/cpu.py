# SPDX-License-Identifier: Apache-2.0
"""The worker and the model runner of a machine without a GPU.

Never imported in a GPU's process: vLLM's CPU worker replaces parts of torch at import.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_duet.config import DuetConfig
from vllm_duet.lanes.serial import SerialLanePair
from vllm_duet.support import split_blockers
from vllm_duet.worker.runner import DuetModelRunnerMixin


class DuetCPUWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, with a DuetCPUModelRunner where steps can be split."""

    def init_device(self) -> None:
        super().init_device()
        if not split_blockers(self.vllm_config, current_platform.get_device_name()):
            # The CPU worker has no hook for its runner's class; the one it builds
            # holds no weights or cache yet.
            self.model_runner = DuetCPUModelRunner(self.vllm_config, self.device)


class DuetCPUModelRunner(DuetModelRunnerMixin, CPUModelRunner):  # type: ignore[misc]
    """Lanes that run one after the other."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = DuetConfig.load(vllm_config.additional_config)
        self.lanes = SerialLanePair(config.serial_timing, config.serial_hold_steps)
