# SPDX-License-Identifier: Apache-2.0
"""The file that keeps what was measured at start, for the next start on the same machine."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml
from vllm.version import __version__ as vllm_version

from vllm_duet.anchors import Anchor, LaneAnchor, StepShape
from vllm_duet.config import DuetConfig
from vllm_duet.version import __version__

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's


@dataclass(frozen=True)
class Measured:
    """Times of whole steps and of the lanes, how much more the lanes do side by side than one
    after the other, by the SMs of the decode lane, and what speaks against splitting, if
    anything does. ``lanes`` is empty where there were none, or none was worth measuring."""

    anchors: list[Anchor]
    lanes: list[LaneAnchor] = field(default_factory=list)
    gains: dict[int, float] = field(default_factory=dict)
    obstacle: str | None = None

    def paying_lanes(self, margin: float) -> tuple[int, ...]:
        """The decode lanes, by their SMs, beside which more is done than one after the other by
        ``margin``."""
        return tuple(sms for sms, gain in self.gains.items() if gain >= 1 + margin)

    def refusal(self, margin: float) -> str | None:
        """Why no step is to be split, in a clause; None where one may be, or nobody knows."""
        if self.obstacle is not None or not self.gains or self.paying_lanes(margin):
            return self.obstacle
        best = max(self.gains, key=self.gains.__getitem__)
        return (
            f"the lanes side by side do {self.gains[best]:.2f} of what the GPU does one after the"
            f" other, at best (a decode lane of {best} SMs), and {1 + margin:.2f} is needed"
        )


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
            found = json.loads(self.path.read_text())
            return Measured(
                [Anchor(StepShape(**a["shape"]), float(a["ms"])) for a in found["steps"]],
                [LaneAnchor(**{**a, "shape": StepShape(**a["shape"])}) for a in found["lanes"]],
                {int(sms): float(gain) for sms, gain in found["gains"].items()},
                found["obstacle"],
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("vllm-duet cannot read %s, and measures anew: %r", self.path, error)
            return None

    def write(self, found: Measured) -> None:
        """Whole, however many servers start at once."""
        content = {
            "steps": [_as_json(anchor) for anchor in found.anchors],
            "lanes": [_as_json(anchor) for anchor in found.lanes],
            "gains": found.gains,
            "obstacle": found.obstacle,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(content, indent=1))
            new.replace(self.path)
        except OSError as error:
            logger.warning("vllm-duet measures anew at the next start: %s", error)


def _as_json(anchor: Anchor | LaneAnchor) -> dict[str, Any]:
    return {**anchor._asdict(), "shape": anchor.shape._asdict()}


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
