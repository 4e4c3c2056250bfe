# SPDX-License-Identifier: Apache-2.0
"""CAPPED steps of a model whose prompts are cut where a Mamba block ends."""

from __future__ import annotations

import pytest
from scheduler.engine import BLOCK_SIZE, NUM_CAPPED_TOKENS, Engine, Shape

from vllm_duet.scheduler import DuetScheduler


class CountsDecodes(DuetScheduler):
    """Takes the decodes' tokens for such that a prompt could have."""

    @property
    def _num_capped_decodes(self):
        return 0

    @_num_capped_decodes.setter
    def _num_capped_decodes(self, value):
        pass


def steps_until_answered(scheduler_cls: type) -> int:
    """For a prompt of two Mamba blocks, each of more tokens than the cap, beside decodes."""
    shape = Shape(max_num_seqs=12, max_num_batched_tokens=64, asynchronous=False, mode="capped")
    engine = Engine(scheduler_cls, shape, seed=0)
    scheduler = engine.scheduler
    scheduler.need_mamba_block_aligned_split = True
    scheduler.cache_config.block_size = 4 * BLOCK_SIZE
    assert NUM_CAPPED_TOKENS < scheduler.cache_config.block_size < NUM_CAPPED_TOKENS + 11
    for number in range(11):
        engine.add([number], max_tokens=60)
    engine.step()
    prompt = engine.clients[engine.add(list(range(32)), max_tokens=2)]
    for step in range(40):
        engine.step()
        if prompt.tokens:
            return step
    raise AssertionError("it starves")


def test_a_prompt_gets_on_beside_decodes():
    assert steps_until_answered(DuetScheduler) < 10


def test_counting_the_decodes_would_starve_it():
    with pytest.raises(AssertionError, match="starves"):
        steps_until_answered(CountsDecodes)
