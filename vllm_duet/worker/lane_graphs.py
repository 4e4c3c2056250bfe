# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of decode steps, captured on the decode lane of one split.

A captured kernel runs on the SMs of the stream it was captured on, whichever stream
its graph is launched on (CUDA programming guide, green contexts). So each split has
graphs of its own, in the memory pool of vLLM's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from vllm_duet.support import lane_sizes


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
        config.compilation_config.cudagraph_capture_sizes = lane_sizes(vllm_config)
        super().__init__(config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len)
        self._stream = stream

    def _capture_stream(self, desc: BatchExecutionDescriptor) -> torch.cuda.Stream:
        return self._stream

    @property
    def most_decodes(self) -> int:
        """How many requests, a token each, the largest captured graph takes; 0 without one."""
        if not self._graphs_captured:
            return 0
        return max((desc.num_reqs or 0 for desc in self.graphs), default=0)
