# SPDX-License-Identifier: Apache-2.0
"""A multimodal model on vLLM's CUDA build: text is CAPPED, a prompt with an image left whole."""

from __future__ import annotations

import random

import pytest
from engine.harness import Arrival
from engine.scenarios import compare
from engine.workloads import random_mix, tokens
from gpu.real_tokens.conftest import make_engine
from PIL import Image
from tiny_families import IMAGE, VISION_END, VISION_START, qwen25_vl
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_duet.plan import Mode
from vllm_duet.scheduler import DuetScheduler


@pytest.fixture(scope="session")
def sees(tiny_model, tmp_path_factory):
    """Kept, as ``make_llm`` says; ``tiny_model`` switches the kernels on."""
    model = qwen25_vl(tmp_path_factory.mktemp("tiny-qwen2.5-vl"))
    settings = dict(skip_tokenizer_init=False, skip_mm_profiling=True)
    return make_engine(model, num_gpu_blocks_override=256, **settings)


def with_images(seed: int) -> list[Arrival]:
    """Some of the prompts have an image among their tokens."""
    rng = random.Random(seed)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    arrivals = []
    for number in range(8):
        text = [tokens(rng, rng.randint(5, 90)) for _ in range(2)]
        prompt = {"prompt_token_ids": [i % 400 + 3 for i in text[0] + text[1]]}
        if number % 4 == 3:
            image = Image.effect_noise((32, 32), 80 + number).convert("RGB")
            marks = [VISION_START, IMAGE, VISION_END]
            prompt["prompt_token_ids"][len(text[0]) : len(text[0])] = marks
            prompt["multi_modal_data"] = {"image": image}
        arrivals.append(Arrival(f"r{number}", prompt, greedy, step=number))
    return arrivals


@pytest.mark.parametrize("arrivals", [random_mix(1, num_requests=5, longest=150), with_images(2)])
def test_tokens_are_stocks(sees, arrivals):
    stock = sees.run(arrivals, AsyncScheduler)
    capped = 0
    for seed in range(2):
        sees.vllm_config.additional_config = {"duet": {"mode": "random", "seed": seed}}
        answers = sees.run(arrivals, DuetScheduler)
        for request_id, answer in stock.items():
            compare(answer, answers[request_id])
        capped += sees.core.scheduler.totals.steps[Mode.CAPPED]
    assert capped > 0
