# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA build on a GPU that is not there, with kernels that compute.

These tests run in an environment and with a preloaded library of their own, so ``make test``
leaves them out. The engines are made once: each takes some 15 seconds.
"""

from __future__ import annotations

import os
import random
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_model import make_tiny_model

if TYPE_CHECKING:
    from engine.harness import Engine

os.environ["OMP_NUM_THREADS"] = "1"  # kernels are tiny
os.environ["TRITON_INTERPRET"] = "1"  # real_kernels.py runs Triton's kernels
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # Inductor's kernels would not compute
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_DUET_MEASURE_AT_START", "never")

DECODE_SMS = (16, 64)
DUET = {"cuda_lanes": True, "mode": "split", "decode_sms": list(DECODE_SMS)}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny-qwen3"))
    from fake_gpu import real_kernels

    import vllm_duet.plugin

    real_kernels.switch_on()
    vllm_duet.plugin.register()
    return folder


def make_engine(model: Path, make: type[Engine] | None = None, **settings: Any) -> Engine:
    from engine.harness import Engine, make_llm

    llm = make_llm(
        model,
        "vllm_duet.DuetScheduler",
        enforce_eager=False,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
            "custom_ops": ["none"],
        },
        additional_config={"duet": DUET},
        **settings,
    )
    return (make or Engine)(llm)


@pytest.fixture(scope="session")
def roomy(tiny_model):
    """Asynchronous scheduling, the default, first come first served, plenty of KV cache."""
    from engine.harness import ROOMY

    return make_engine(tiny_model, **ROOMY)


@pytest.fixture(scope="session")
def cramped(tiny_model):
    """Priorities, and a KV cache that runs out."""
    from engine.harness import CRAMPED

    return make_engine(tiny_model, **CRAMPED)


@pytest.fixture(scope="session")
def full_cache(tiny_model):
    """A KV cache of eight blocks, which ``workloads.cache_filling`` fills."""
    from engine.harness import FULL_CACHE

    return make_engine(tiny_model, **FULL_CACHE)


@pytest.fixture(scope="session")
def zeroing(tiny_model):
    """Zeroes new KV blocks, as vLLM does where layers of another kind share them."""
    from engine.harness import Engine
    from vllm.v1.kv_cache_interface import KVCacheConfig

    @contextmanager
    def zeroed():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KVCacheConfig, "needs_kv_cache_zeroing", True)
            yield

    class ZeroingEngine(Engine):
        def run(self, *args, **kwargs):
            with zeroed():
                return super().run(*args, **kwargs)

    with zeroed():
        return make_engine(tiny_model, ZeroingEngine, num_gpu_blocks_override=128)


@pytest.fixture(scope="session")
def synchronous(tiny_model):
    """Without asynchronous scheduling."""
    return make_engine(tiny_model, num_gpu_blocks_override=64, async_scheduling=False)


@pytest.fixture(autouse=True)
def kernels_raise():
    """A kernel that fails has nobody to raise to but the test."""
    from fake_gpu import real_kernels

    yield
    real_kernels.raise_errors()


@pytest.fixture(autouse=True)
def time_passes(monkeypatch):
    """Who of the host's threads is ahead, and how far the device gets meanwhile, is drawn, too.

    A prefill's thread may queue all of it before the engine's goes on, or nothing until the
    engine's waits for it; while the scheduler asks whether a prefill is done, the device goes on
    for a while.
    """
    from fake_gpu import FakeGpu

    from vllm_duet.lanes.cuda import CudaLanePair, _Launched

    gpu, rng = FakeGpu(), random.Random(0)
    stock_launch, stock_done = CudaLanePair.launch, _Launched.done

    def launch(self, prefill, prefill_sms):
        may_begin = threading.Event()

        def begins_late():
            may_begin.wait()
            return prefill()

        launched = stock_launch(self, begins_late, prefill_sms)
        launched.may_begin = may_begin
        who = rng.choice(["ahead", "ahead", "at once", "behind"])
        if who != "behind":
            may_begin.set()
        if who == "ahead":
            launched.wait_until_queued()
        return launched

    def done(self):
        self.may_begin.set()
        gpu.advance(rng.choice([0, 10, 50]))
        return stock_done(self)

    def beginning(method):
        def run(self):
            self.may_begin.set()
            return method(self)

        return run

    monkeypatch.setattr(CudaLanePair, "launch", launch)
    monkeypatch.setattr(_Launched, "done", done)
    for name in ("wait_until_queued", "result"):
        monkeypatch.setattr(_Launched, name, beginning(getattr(_Launched, name)))
