# SPDX-License-Identifier: Apache-2.0
import logging
import os

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# Model Runner V2 on the CPU: its Triton kernels run in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_PLUGINS", "duet")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every start would take seconds longer. Tests of it ask for it as an option, which goes before.
os.environ.setdefault("VLLM_DUET_MEASURE_AT_START", "never")

# For vLLM's CUDA build, in an environment of its own: tests/fake_gpu/README.md.
collect_ignore = ["gpu"]

# The first example pays for Numba's compilation.
settings.register_profile("duet", deadline=None)
settings.load_profile("duet")


class ServersAlone(LoadFileScheduling):
    """A file's tests run in one process; those that start servers all in the same, or they would
    need more memory at once than there is."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "servers" if file.startswith(("tests/http/", "tests/plain_cpu/")) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ServersAlone:
    return ServersAlone(config, log)


@pytest.fixture
def vllm_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What vLLM's handlers are given, at every level."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="vllm")
    return caplog
