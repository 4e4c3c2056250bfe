# SPDX-License-Identifier: Apache-2.0
"""The same on a model that people know: text, stop strings, structured output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import smollm2
import torch
from engine.harness import Arrival, Engine, make_llm
from engine.scenarios import CountingScheduler, compare, serve
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

STORY = "Once upon a time there was a small town by the sea, where "
COUNT = " ".join(str(i) for i in range(1, 31)) + " "
QUESTION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def engine():
    llm = make_llm(
        smollm2.prepare(),
        "vllm_duet.DuetScheduler",
        skip_tokenizer_init=False,
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=8,
        num_gpu_blocks_override=128,
        structured_outputs_config={"backend": "xgrammar"},
    )
    engine = Engine(llm)
    engine.runner.structured_outputs_worker.apply_grammar_bitmask = apply_grammar_bitmask
    return engine


def apply_grammar_bitmask(logits, input_batch, grammar_req_ids, grammar_bitmask):
    """vLLM's kernel of this name does not run in Triton's interpreter."""
    for request_id, bits in zip(grammar_req_ids, grammar_bitmask, strict=True):
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: logits.shape[1]]
        row = input_batch.req_ids.index(request_id)
        logits[row].masked_fill_(torch.from_numpy(allowed == 0), float("-inf"))


@pytest.fixture(scope="module")
def arrivals():
    greedy = SamplingParams(temperature=0, max_tokens=10)
    made = {
        "capital": (QUESTION.format("What is the capital of France?"), greedy),
        "long": (STORY * 10, greedy),
        "stop string": (COUNT, SamplingParams(temperature=0, max_tokens=20, stop=["34"])),
        "regex": (
            QUESTION.format("Name a number."),
            SamplingParams(
                temperature=0,
                max_tokens=8,
                structured_outputs=StructuredOutputsParams(regex="[0-9]{3}-[0-9]{2}"),
            ),
        ),
        "seeded": (
            QUESTION.format("Tell me a joke. " * 12),
            SamplingParams(temperature=0.9, seed=3, max_tokens=10, logprobs=2),
        ),
    }
    return [
        Arrival(name, prompt, params, step=3 * i)
        for i, (name, (prompt, params)) in enumerate(made.items())
    ]


@pytest.fixture(scope="module")
def stock(engine, arrivals):
    return engine.run(arrivals, AsyncScheduler)


def test_stock_makes_sense(stock):
    assert "Paris" in stock["capital"].text[0]
    assert stock["stop string"].finish_reason[0] == "stop"
    assert len(stock["regex"].text[0]) == 6 and stock["regex"].text[0][3] == "-"


@pytest.mark.parametrize("seed, timing", [(0, "late"), (1, "early"), (3, "threaded")])
def test_random_plans(engine, arrivals, stock, seed, timing):
    before = CountingScheduler.seen["joins"]
    answers = serve(engine, arrivals, timing, 2 + seed, mode="random", seed=seed)
    for name, answer in stock.items():
        compare(answer, answers[name])
    assert CountingScheduler.seen["joins"] > before


def test_structured_output_keeps_its_own_prefill_whole(engine, arrivals, stock):
    regex = next(a for a in arrivals if a.request_id == "regex")
    others = [replace(a, step=0) for a in arrivals if a.request_id == "capital"]
    answers = serve(engine, [*others, replace(regex, step=2)], "late", 2, mode="split")
    assert answers["regex"].text == stock["regex"].text
    assert engine.core.scheduler.totals.launched == 0
