# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers on this machine's CPU, for the demo, the tests and eval/cpu_serving.py.

    with CpuServer(model, duet_options(mode="split")) as server:
        server.wait_until_ready()
        httpx.get(f"{server.url}/metrics")

CpuServer is for tokens: Model Runner V2 runs as on a GPU, with its Triton kernels in Triton's
interpreter; tests/triton_interpreter must be installed. PlainServer is for times: vLLM's
CPU build as users have it, out of the environment that `make test` keeps for it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx

PLAIN_PYTHON = Path(__file__).parent.parent / ".venv-plain/bin/python"

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several servers may share the cores
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_OPTIONS = ("--enforce-eager", "--block-size", "32")
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 5  # while it starts, vLLM does not heed SIGTERM


class ServerError(RuntimeError):
    """The server ended, or did not answer in time; the message says why."""


def duet_options(**options: Any) -> list[str]:
    """The options of a vLLM server that uses DuetScheduler with these of its own."""
    config = json.dumps({"duet": options})
    return ["--scheduler-cls", "vllm_duet.DuetScheduler", "--additional-config", config]


def provide_plugin(folder: Path, name: str, entry_point: str) -> None:
    """Let vLLM find a plugin that is not installed, where ``folder`` is on PYTHONPATH.

    ``entry_point`` as in "vllm_duet.plugin:register".
    """
    info = folder / f"vllm_{name}_checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm-{name}-checkout\nVersion: 0\n"
    )
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {entry_point}\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def port_is_busy(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


class VllmServer:
    """Starts with the ``with`` block; when that ends, no process of it is left.

    ``options`` are those of ``vllm serve``, ``environment`` is added to this process's.
    """

    python: ClassVar[str] = sys.executable
    machine_options: ClassVar[Sequence[str]] = ()
    machine_environment: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        model: Path,
        options: Sequence[str] = (),
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*self.program(), str(model), "--served-model-name", "model"]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        self.command += [*self.machine_options, *options]
        self._environment = dict(environment or {})

    def program(self) -> list[str]:
        # `vllm serve` asks for a distribution called vllm, which vllm-cpu is not.
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model"]

    def environment(self) -> dict[str, str]:
        """All variables that the server starts with."""
        return {**os.environ, **self.machine_environment, **self._environment}

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(prefix="vllm-server-", suffix=".log")
        self._process = subprocess.Popen(
            self.command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Its engine core is a process too: stop them as one group.
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def is_ready(self) -> bool:
        """Whether the server answers.

        Raises:
            ServerError: it has ended.
        """
        if self._process.poll() is not None:
            raise ServerError(f"The vLLM server ended while starting; it said:\n{self.log()}")
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return once the server answers.

        Raises:
            ServerError: it ended, or does not answer within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The vLLM server did not start in {timeout_s:.0f} s; it said:\n{self.log()}"
                )
            time.sleep(0.2)

    def log(self, lines: int = 15) -> str:
        """The last ``lines`` of what the server has said."""
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


class CpuServer(VllmServer):
    """On this machine's CPU, with Model Runner V2."""

    machine_options = CPU_OPTIONS
    machine_environment: ClassVar = ENVIRONMENT | {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


class PlainServer(VllmServer):
    """On this machine's CPU, with vLLM's own runner for it."""

    python = str(PLAIN_PYTHON)
    machine_environment = ENVIRONMENT
