# SPDX-License-Identifier: Apache-2.0
"""CAPPED steps of models whose prompts cannot be cut anywhere: where a Mamba block ends, or not
within an image."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from scheduler.engine import BLOCK_SIZE, NUM_CAPPED_TOKENS, Engine, Shape
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from vllm_duet.plan import Mode
from vllm_duet.scheduler import DuetScheduler


class CountsDecodes(DuetScheduler):
    """Takes the decodes' tokens for such that a prompt could have."""

    @property
    def _capped_decode_tokens(self):
        return 0

    @_capped_decode_tokens.setter
    def _capped_decode_tokens(self, value):
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


IMAGE_TOKENS = 20
assert IMAGE_TOKENS > NUM_CAPPED_TOKENS


class CutsImages(DuetScheduler):
    """Takes a prompt with an image for text."""

    def _decide(self, *args, **kwargs):
        with patch.object(Request, "has_encoder_inputs", False):
            return super()._decide(*args, **kwargs)


def image_at(offset: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem.dummy(),
        modality="image",
        identifier="an image",
        mm_position=PlaceholderRange(offset=offset, length=IMAGE_TOKENS),
    )


def ends_of_chunks(scheduler_cls: type) -> list[int]:
    """Of a prompt of 30 tokens, an image from the fifth on, beside decodes and behind text."""
    shape = Shape(max_num_seqs=12, max_num_batched_tokens=64, asynchronous=False, mode="capped")
    engine = Engine(scheduler_cls, shape, seed=0)
    scheduler = engine.scheduler
    scheduler.max_num_encoder_input_tokens = 2 * IMAGE_TOKENS
    scheduler.encoder_cache_manager = EncoderCacheManager(2 * IMAGE_TOKENS)
    for number in range(10):
        engine.add([number], max_tokens=60)
    engine.step()
    text = engine.clients[engine.add(list(range(3 * NUM_CAPPED_TOKENS)), max_tokens=2)]
    while not text.tokens:
        engine.step()
    assert scheduler.totals.steps[Mode.CAPPED] >= 3
    prompt = engine.clients[engine.add(list(range(30)), max_tokens=2, mm_features=[image_at(4)])]
    ends = []
    while not prompt.tokens:
        engine.step()
        ends.append(prompt.request.num_computed_tokens)
    return ends


def test_a_prompt_with_an_image_is_left_whole():
    assert ends_of_chunks(DuetScheduler) == [30]


def test_taken_for_text_its_image_would_be_cut():
    assert any(4 < end < 4 + IMAGE_TOKENS for end in ends_of_chunks(CutsImages))
