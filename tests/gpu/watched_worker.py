# SPDX-License-Identifier: Apache-2.0
"""What a server's worker says of its process, by way of vLLM's /collective_rpc."""

from __future__ import annotations

import sys

OF_THE_CPU = (
    "vllm.v1.worker.cpu.shm",
    "vllm.v1.worker.cpu_worker",
    "vllm_duet.worker.cpu",
)
"""Modules that replace torch's streams and events when they are imported."""


class WatchedWorker:
    """For ``--worker-extension-cls``: vLLM adds it to the worker's bases."""

    def imported_of_the_cpu(self) -> list[str]:
        return [name for name in OF_THE_CPU if name in sys.modules]
