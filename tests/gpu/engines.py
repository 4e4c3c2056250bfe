# SPDX-License-Identifier: Apache-2.0
"""An engine on the fake GPU, in this process. Its weights are dummies and its tokens garbage;
how many there are is what vLLM decided."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine.harness import Answer, Arrival, Engine, make_llm
from engine.scenarios import CountingScheduler, assert_blocks_kept
from engine.workloads import in_flight, tokens
from fake_gpu import FakeGpu
from gpu.watched_worker import OF_THE_CPU
from tiny_model import make_tiny_config
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.sampler import Sampler

SPLIT = {"cuda_lanes": True, "mode": "split", "decode_sms": [16, 64]}
UNCOMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Starts in half the time. Prefills run the same kernels but for those that Inductor makes."""


class GpuEngine(Engine):
    """``said``: what vllm-duet logged while it started, a line each."""

    def __init__(self, llm: Any, gpu: FakeGpu, said: list[str]) -> None:
        super().__init__(llm)
        self._options = self.vllm_config.additional_config["duet"]
        self.gpu, self._log = gpu, said
        self.said = [line for line in said if line.startswith("vllm-duet")]

    @property
    def log(self) -> str:
        """What vLLM and vllm-duet have said since the start."""
        return "\n".join(self._log)

    @property
    def totals(self) -> Any:
        return self.core.scheduler.totals

    def serve(self, arrivals: Sequence[Arrival], **duet: Any) -> dict[str, Answer]:
        """The answers under the options ``duet``, beside those of the start.

        Each client has as many tokens as it asked for, unless it has left or its prefill has
        failed; and nothing has leaked.
        """
        self.vllm_config.additional_config = {"duet": self._options | duet}
        answers = self.run(arrivals, CountingScheduler, assert_blocks_kept)
        for arrival in arrivals:
            answer = answers[arrival.request_id]
            if not answer.aborted and answer.finish_reason != {0: "error"}:
                assert answer.finish_reason == {0: "length"}
                assert len(answer.tokens[0]) == arrival.params.max_tokens
        return answers


@contextmanager
def _log_kept_in(messages: list[str]) -> Iterator[None]:
    # A handler would not do: vLLM sets its own up again and again.
    stock = logging.Logger.handle

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        if logger.name.startswith("vllm"):
            messages.append(record.getMessage())
        stock(logger, record)

    with patch.object(logging.Logger, "handle", handle):
        yield


@contextmanager
def _all_tokens_the_same() -> Iterator[None]:
    # No kernel has written them, and NumPy refuses what is no token. What sets memory is real.
    stock = Sampler.__call__

    def sample(sampler: Sampler, *args: Any, **kwargs: Any) -> Any:
        output = stock(sampler, *args, **kwargs)
        output.sampled_token_ids.zero_()
        return output

    with patch.object(Sampler, "__call__", sample):
        yield


@contextmanager
def running(folder: str, duet: Mapping[str, Any] = SPLIT, **overrides: Any) -> Iterator[GpuEngine]:
    """An engine of DuetScheduler with the options ``duet``. Afterwards none of its lanes is
    left, and neither the fake GPU nor vllm-duet has anything to complain about."""
    gpu, said = FakeGpu(), list[str]()
    settings: dict[str, Any] = dict(
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=False,
        compilation_config=UNCOMPILED,
        block_size=16,
        gpu_memory_utilization=0.2,  # of engines that a process has one after the other
        distributed_executor_backend=None,
        additional_config={"duet": dict(duet)},
    )
    model = make_tiny_config(Path(folder) / "model", **overrides.pop("model", {}))
    with _log_kept_in(said), _all_tokens_the_same():
        llm = make_llm(model, "vllm_duet.DuetScheduler", **(settings | overrides))
        try:
            yield GpuEngine(llm, gpu, said)
        finally:
            llm.llm_engine.engine_core.shutdown()
    assert gpu.count("green_contexts") == 0
    assert gpu.reports() == []
    assert not set(OF_THE_CPU) & set(sys.modules)


def clients(seed: int, count: int = 16, longest: int = 600, leaving: float = 0.0) -> list[Arrival]:
    """``count`` requests within a few steps. A share of ``leaving`` leaves at random, and as
    large a one while its prefill is in flight."""
    rng = random.Random(seed)
    arrivals = []
    for i in range(count):
        params = SamplingParams(
            max_tokens=rng.choice([1, 5, 20, 40]),
            temperature=rng.choice([0.0, 0.8]),
            ignore_eos=True,
            detokenize=False,
        )
        step, fate = rng.randint(0, 12), rng.random()
        arrivals.append(
            Arrival(
                f"r{i}",
                tokens(rng, rng.randint(1, longest)),
                params,
                step=step,
                abort_at=step + rng.randint(0, 20) if fate < leaving else None,
                abort_when=in_flight(f"r{i}") if fate > 1 - leaving else None,
            )
        )
    return arrivals
