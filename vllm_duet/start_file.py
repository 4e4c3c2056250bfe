# SPDX-License-Identifier: Apache-2.0
"""Where what was measured at start is kept, for the next start on the same machine."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml
from vllm.version import __version__ as vllm_version

from vllm_duet.config import DuetConfig
from vllm_duet.steps_file import Measured, StepsFile, StepsFileError
from vllm_duet.version import __version__

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's


@dataclass(frozen=True, slots=True)
class StartFile:
    """At ``path``, whose name is made of everything that the times depend on."""

    path: Path

    @classmethod
    def of(cls, vllm_config: Any) -> StartFile:
        """The one of an engine."""
        config = DuetConfig.load(vllm_config.additional_config)
        on = [
            current_platform.get_device_name(),
            torch.version.cuda,
            _driver(),
            platform.processor() or platform.machine(),
            len(os.sched_getaffinity(0)),
            os.environ.get("OMP_NUM_THREADS"),
            vllm_version,
            __version__,
            vllm_config.compute_hash(),
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            vllm_config.model_config.enforce_eager,
            vllm_config.compilation_config.cudagraph_capture_sizes,
            vllm_config.use_v2_model_runner,
            config.gpu_profile,
            config.decode_sms,
            config.prefill_launch,
        ]
        name = sha256(json.dumps(on, default=str).encode()).hexdigest()[:16]
        return cls(Path(envs.VLLM_CACHE_ROOT) / "vllm_duet" / f"steps-{name}.json")

    def read(self) -> Measured | None:
        """What an earlier start has written; None where there is nothing that can be read."""
        try:
            return StepsFile.load(self.path).found
        except FileNotFoundError:
            return None
        except (OSError, StepsFileError) as error:
            logger.warning("vllm-duet cannot read %s, and measures anew: %s", self.path, error)
            return None

    def write(self, steps: StepsFile) -> None:
        """For the next start."""
        try:
            steps.save(self.path)
        except OSError as error:
            logger.warning("vllm-duet measures anew at the next start: %s", error)


def _driver() -> str | None:
    """The NVIDIA driver's version; None where nobody tells."""
    pynvml = import_pynvml()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
