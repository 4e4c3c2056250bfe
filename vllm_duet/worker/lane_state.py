# SPDX-License-Identifier: Apache-2.0
"""What a prefill owns from its launch to its join, so that decode steps cannot disturb it.

What may live here: the lane's own copies of what a forward reads, what stands in for the
model and the CUDA graphs while a batch is prepared into them, and the check that nobody
else has written to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.utils import AttentionGroup
from vllm.v1.worker.workspace import (
    current_workspace_manager,
    is_workspace_manager_initialized,
    use_workspace_lane,
)

SLOT_MAPPINGS = "slot_mappings"
NUM_DIRTY_ROWS = "_num_dirty_rows"
"""Since vLLM 0.33, how many rows of its block tables are of an earlier batch."""


def prefill_workspace_lane() -> int:
    """vLLM's workspace lane of the prefill: the last, which ``make_room_for_two_lanes`` adds.

    A CPU has no workspaces, and the number means nothing there.
    """
    if not is_workspace_manager_initialized():
        return 0
    return int(current_workspace_manager()._num_lanes) - 1


class PrefillLaneState:
    """Everything a prefill reads between its launch and its join.

    The decode lane overwrites its own copies of these at every step; sharing
    any of them is a silent data race (design, rule 2).
    """

    def __init__(self, runner: Any) -> None:
        self.input_buffers = InputBuffers(
            max_num_reqs=runner.max_num_reqs,
            max_num_tokens=runner.max_num_tokens,
            device=runner.device,
        )
        tables = runner.block_tables
        self.block_tables = tuple(torch.zeros_like(t) for t in tables.input_block_tables)
        self.block_table_ptrs = tables._make_ptr_tensor(self.block_tables)
        self.slot_mappings = torch.zeros_like(tables.slot_mappings)
        self.num_dirty_rows = 0
        with use_workspace_lane(prefill_workspace_lane()):  # where some builders reserve memory
            self.attn_groups = [
                [_with_own_builders(group, runner) for group in groups]
                for groups in runner.attn_groups
            ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a prefill reads, by name; all of it is the lane's own."""
        named = {
            name: value
            for name, value in vars(self.input_buffers).items()
            if isinstance(value, torch.Tensor)
        }
        named |= {f"block table {i}": table for i, table in enumerate(self.block_tables)}
        return named | {SLOT_MAPPINGS: self.slot_mappings}

    @contextmanager
    def installed(self, runner: Any, model: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Let ``runner`` prepare a batch into this state, with ``model`` for its model."""
        of_runner = {
            "input_buffers": self.input_buffers,
            "attn_groups": self.attn_groups,
            "cudagraph_manager": EagerDispatch(),
            "model": model,
        }
        of_tables = {
            "input_block_tables": list(self.block_tables),
            "input_block_table_ptrs": self.block_table_ptrs,
            "slot_mappings": self.slot_mappings,
        }
        tables = runner.block_tables
        if hasattr(tables, NUM_DIRTY_ROWS):
            of_tables[NUM_DIRTY_ROWS] = self.num_dirty_rows
        with _replaced(runner, of_runner), _replaced(tables, of_tables):
            yield
            self.num_dirty_rows = getattr(tables, NUM_DIRTY_ROWS, 0)


class LaneCheck:
    """VLLM_DUET_CHECK=1: nobody has written to a lane's buffers while its prefill was in
    flight, and nobody reads them afterwards and gets away with it (rule 2).

    Made when the prefill has been prepared. Costs a copy of the buffers and waits for the
    device, so it is for tests and for hunting races.
    """

    def __init__(self, state: PrefillLaneState) -> None:
        self._tensors = state.tensors()
        self._copies = {name: tensor.clone() for name, tensor in self._tensors.items()}

    def verify(self, launch_id: int) -> None:
        """Compare the buffers with what they were, then poison them.

        Raises:
            RuntimeError: one has changed; names it.
        """
        for name, tensor in self._tensors.items():
            if not torch.equal(tensor, self._copies[name]):
                raise RuntimeError(
                    f"VLLM_DUET_CHECK: {name} of prefill {launch_id} changed while it was in flight"
                )
        for name, tensor in self._tensors.items():
            # Wrong, and yet in bounds: block 0 is vLLM's null block, slot -1 its padding.
            tensor.fill_(-1 if name == SLOT_MAPPINGS else 0)


class RecordedForward(NamedTuple):
    inputs: dict[str, Any]
    context: ForwardContext


class GivingWay(dict[str, Any]):
    """Attention metadata by layer. Whoever asks for a layer's lets decode steps go first.

    Attention is where Python gets a word in between the layers, compiled or not.
    """

    def __init__(self, by_layer: Mapping[str, Any], give_way: Callable[[], None]) -> None:
        super().__init__(by_layer)
        self._give_way = give_way

    def __getitem__(self, layer: str) -> Any:
        self._give_way()
        return super().__getitem__(layer)


class ForwardRecorder:
    """Stands in for the model while a prefill is prepared; keeps its arguments."""

    def __init__(self) -> None:
        self.recorded: RecordedForward | None = None

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.recorded = RecordedForward(inputs, get_forward_context())
        return torch.empty(0)


class EagerDispatch:
    """Stands in for the CUDA graph manager: a prefill on its lane runs eagerly.

    Kernels captured on another stream would run on that stream's SMs (CUDA
    programming guide, green contexts).
    """

    def dispatch(
        self, num_reqs: int, num_tokens: int, *args: Any, num_active_loras: int = 0, **kwargs: Any
    ) -> BatchExecutionDescriptor:
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_active_loras=num_active_loras,
        )


@contextmanager
def _replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Have other ``attributes`` in ``owner`` within the block."""
    own = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(own)


def _with_own_builders(group: AttentionGroup, runner: Any) -> AttentionGroup:
    # Metadata builders keep persistent buffers, so the lane gets its own set.
    own = replace(group, metadata_builders=[])
    own.create_metadata_builders(
        runner.vllm_config,
        runner.device,
        kernel_block_size=runner.kernel_block_sizes[group.kv_cache_group_id],
    )
    return own
