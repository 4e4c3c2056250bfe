# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

# The engine core runs in the test's own process, so tests can step it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model with experts. vLLM makes its groups once, for the first engine of the process,
    which may have had none."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        monkeypatch.setattr(parallel_state, "_EP", parallel_state.get_world_group())


@pytest.fixture(scope="session")
def async_scheduling() -> Callable[[], AbstractContextManager[None]]:
    """The GPU's engine loop: the CPU platform turns asynchronous scheduling off."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    @contextmanager
    def turned_on() -> Iterator[None]:
        CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
        try:
            yield
        finally:
            CpuPlatform.check_and_update_config = classmethod(stock)

    return turned_on


@pytest.fixture(scope="session")
def roomy(tiny_model):
    """The synchronous engine loop, first come first served, plenty of KV cache."""
    from engine.harness import ROOMY, Engine, make_llm

    return Engine(make_llm(tiny_model, "vllm_duet.DuetScheduler", **ROOMY))


@pytest.fixture(scope="session")
def cramped(tiny_model, async_scheduling):
    """The GPU's asynchronous loop, priorities, and a KV cache that runs out."""
    from engine.harness import CRAMPED, Engine, make_llm

    with async_scheduling():
        llm = make_llm(tiny_model, "vllm_duet.DuetScheduler", **CRAMPED)
    return Engine(llm)


@pytest.fixture(scope="session")
def full_cache(tiny_model):
    """A KV cache of eight blocks, which ``workloads.cache_filling`` fills."""
    from engine.harness import FULL_CACHE, Engine, make_llm

    return Engine(make_llm(tiny_model, "vllm_duet.DuetScheduler", **FULL_CACHE))


@pytest.fixture(scope="session")
def few_rows(tiny_model, async_scheduling):
    """The GPU's asynchronous loop with four request rows, so that they run out."""
    from engine.harness import Engine, make_llm

    with async_scheduling():
        llm = make_llm(
            tiny_model,
            "vllm_duet.DuetScheduler",
            num_gpu_blocks_override=60,
            max_model_len=512,
            max_num_batched_tokens=96,
            max_num_seqs=4,
        )
    return Engine(llm)
