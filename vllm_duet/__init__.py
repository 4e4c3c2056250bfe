# SPDX-License-Identifier: Apache-2.0
"""vllm-duet: prefill and decode side by side on one GPU, as a vLLM plugin.

Importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_duet.version import __version__

_HOMES = {
    "DuetScheduler": "vllm_duet.scheduler",
    "DuetConfig": "vllm_duet.config",
    "register": "vllm_duet.plugin",
}

__all__ = ["DuetConfig", "DuetScheduler", "__version__", "register"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
