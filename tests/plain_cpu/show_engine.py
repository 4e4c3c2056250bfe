# SPDX-License-Identifier: Apache-2.0
"""Starts an engine in this process; prints its runner's class and vllm-duet's worker modules."""

import sys
import tempfile
from pathlib import Path

from vllm import LLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_model import make_tiny_model

with tempfile.TemporaryDirectory() as folder:
    llm = LLM(
        str(make_tiny_model(Path(folder))),
        scheduler_cls="vllm_duet.DuetScheduler",
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        dtype="float32",
        max_model_len=256,
    )
runner = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner)
print(f"{runner.__module__}.{runner.__qualname__}")
print(*sorted(name for name in sys.modules if name.startswith("vllm_duet.worker")))
