# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of decode steps, captured on the decode lane of one split.

A captured kernel runs on the SMs of the stream it was captured on, whichever stream
its graph is launched on (CUDA programming guide, green contexts). So each split has
graphs of its own, in the memory pool of vLLM's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

MAX_SIZES = 24
"""Batch sizes that a split has graphs for. vLLM has about 50; a decode step takes its time
to read weights and KV cache, and rows of padding have neither."""


class LaneGraphs(ModelCudaGraphManager):  # type: ignore[misc]
    """Full CUDA graphs of decode steps, captured on ``stream``."""

    def __init__(
        self,
        vllm_config: Any,
        device: torch.device,
        decode_query_len: int,
        stream: torch.cuda.Stream,
    ) -> None:
        config = copy.copy(vllm_config)
        config.compilation_config = copy.copy(vllm_config.compilation_config)
        sizes = config.compilation_config.cudagraph_capture_sizes or []
        config.compilation_config.cudagraph_capture_sizes = lane_sizes(sizes)
        super().__init__(config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len)
        self._stream = stream

    def _capture_stream(self, desc: BatchExecutionDescriptor) -> torch.cuda.Stream:
        return self._stream

    def covers(self, num_decodes: int) -> bool:
        """Whether ``num_decodes`` requests, a token each, run as one of the graphs."""
        return self._graphs_captured and (num_decodes, 0) in self._candidates


def lane_sizes(sizes: Sequence[int], max_sizes: int = MAX_SIZES) -> list[int]:
    """At most ``max_sizes`` of vLLM's capture sizes, ascending, the largest among them.

    By a constant ratio, as far as there are sizes: the same share of padding for all.
    """
    if not sizes:
        return []
    known = np.array(sorted(sizes))
    wanted = np.geomspace(known[0], known[-1], max_sizes)
    return sorted(set(known[np.searchsorted(known, wanted.round())].tolist()))
