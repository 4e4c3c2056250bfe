# SPDX-License-Identifier: Apache-2.0
"""The file of measured steps: what they were measured of, and the roofline that follows.

An engine writes it at its start and `vllm-duet calibrate` when it is asked to; the next start
and the simulator read it. It imports neither torch nor vLLM, so any machine can read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_duet.anchors import Anchor, LaneAnchor, fit
from vllm_duet.forecast import unknown_device
from vllm_duet.roofline import GpuProfile, ModelShape, Roofline


class StepsFileError(ValueError):
    """A file that holds no measured steps; the message names it and says what is wrong."""


@dataclass(frozen=True)
class Measured:
    """Times of whole steps and of the lanes, how much more the lanes do side by side than one
    after the other, by the SMs of the decode lane, and what speaks against splitting, if
    anything does. ``lanes`` is empty where there were none, or none was worth measuring. ``checks``
    are mixed steps that were forecast by the anchors before they ran."""

    anchors: list[Anchor]
    lanes: list[LaneAnchor] = field(default_factory=list)
    gains: dict[int, float] = field(default_factory=dict)
    obstacle: str | None = None
    checks: list[Anchor] = field(default_factory=list)

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
class StepsFile:
    """What one engine has measured, and that engine.

    ``device`` is the name that its driver reports, ``device_type`` vLLM's kind of device, and
    ``profile`` the name or path of its GpuProfile, None where it has none. ``model`` is what vLLM
    was asked for, and ``shape`` its sizes. ``max_num_seqs``, ``max_num_batched_tokens`` and
    ``max_model_len`` are vLLM's options, ``kv_cache_tokens`` what its KV cache holds, and
    ``graph_sizes`` the numbers of decodes to which a step is padded.
    """

    device: str
    device_type: str
    profile: str | None
    versions: Mapping[str, str]
    date: str
    model: str
    shape: ModelShape
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_cache_tokens: int
    graph_sizes: tuple[int, ...]
    found: Measured

    @classmethod
    def load(cls, path: Path) -> StepsFile:
        """
        Raises:
            OSError: there is no such file.
            StepsFileError: it is another kind of file.
        """
        try:
            return _PARSER.validate_python(json.loads(path.read_text()))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            reason = f"{where}: {problem['msg']}" if where else problem["msg"]
        except ValueError as error:
            reason = str(error)
        raise StepsFileError(f"{path} holds no measured steps ({reason})")

    def save(self, path: Path) -> None:
        """Write the file as a whole, however many engines do so at once.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(_plain(self), indent=1) + "\n")
        draft.replace(path)

    def unanchored(self) -> Roofline:
        """The roofline that the steps are set against.

        Raises:
            ValueError: the GPU profile that the file names is not there.
        """
        profile = GpuProfile.load(self.profile) if self.profile else None
        return Roofline(self.shape, profile or unknown_device(self.device_type))

    def roofline(self) -> Roofline:
        """Forecasts by the measured times.

        Raises:
            ValueError: see ``unanchored``, or no decode step was measured.
        """
        roofline = self.unanchored()
        return roofline.anchored(fit(roofline, self.found.anchors, self.found.lanes))


_PARSER = TypeAdapter(StepsFile)


def _plain(value: Any) -> Any:
    """As JSON has it: objects, also of named tuples."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
