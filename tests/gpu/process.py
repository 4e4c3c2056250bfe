# SPDX-License-Identifier: Apache-2.0
"""Tests that run in another process than pytest's, on a GPU of their own choice.

What the fake GPU and vLLM read from the environment counts from a process's start. A test that
asks for the same as the one before it gets the same process, since importing vLLM takes long.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fake_gpu

MEMORY_GB = 8
"""Of a test's GPU. Python has an object for each block of the KV cache, and vLLM's start has
all objects looked through again and again."""
TIMEOUT_S = 400
LAST_LINES = 60
"""Of what the process has said, for whom a test fails."""
FOREIGN = ("FAKECUDA_", "LD_PRELOAD", "PYTEST_", "TORCH", "TRITON_", "VLLM_")
"""Settings of pytest's process that are not for a test's."""
TESTS = Path(__file__).parents[1]


def environment(**options: Any) -> dict[str, str]:
    """For a process on a fake GPU with ``options``, those of ``fake_gpu.environment``."""
    library = Path(os.environ.get("FAKE_GPU", Path(sys.prefix, "fake_gpu")))
    base = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    folders = [str(TESTS), str(TESTS.parent / "examples"), base.get("PYTHONPATH", "")]
    # A test of it asks for it as an option, which goes before.
    base["VLLM_DUET_MEASURE_AT_START"] = "never"
    base["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    options = {"memory_gb": MEMORY_GB, **options}
    return fake_gpu.environment(Path(sys.prefix), library, base=base, **options)


def on_fake_gpu(
    trace: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the test in another process, on a fake GPU with ``options``.

    Its arguments must be JSON, or paths, and what it returns must be JSON. With ``trace``,
    ``own_trace`` gives the trace's lines.
    """

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(**arguments: Any) -> Any:
            return _Process.with_options(trace, options).run(test, arguments)

        return run

    return decorate


def own_trace() -> list[str]:
    """The lines of this process's trace so far."""
    return Path(f"{os.environ['FAKECUDA_TRACE']}.{os.getpid()}").read_text().splitlines()


class _Process:
    """A process that runs tests one by one, until one fails."""

    current: _Process | None = None

    def __init__(self, trace: bool, options: Mapping[str, Any]) -> None:
        self.key = trace, dict(options)
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-tests-")
        self._log = Path(self._folder.name, "log")
        if trace:
            options = {**options, "trace": Path(self._folder.name, "trace")}
        results, results_end = os.pipe()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(results_end)],
                env=environment(**options) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[results_end],
                text=True,
            )
        os.close(results_end)
        self._results = os.fdopen(results)

    @classmethod
    def with_options(cls, trace: bool, options: Mapping[str, Any]) -> _Process:
        if cls.current is None or cls.current.key != (trace, options):
            cls.end_current()
            cls.current = cls(trace, options)
        return cls.current

    @classmethod
    def end_current(cls) -> None:
        current, cls.current = cls.current, None
        if current is not None:
            current._end()

    def run(self, test: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        said_before = self._log.stat().st_size
        assert self._process.stdin is not None
        request = json.dumps([test.__module__, test.__name__, arguments], default=str)
        print(request, file=self._process.stdin, flush=True)
        answered, _, _ = select.select([self._results], [], [], TIMEOUT_S)
        if answered and (result := self._results.readline()):
            return json.loads(result)
        said = self._log.read_bytes()[said_before:].decode(errors="replace").splitlines()
        _Process.end_current()
        why = "failed" if answered else f"took more than {TIMEOUT_S} s"
        raise AssertionError("\n".join([f"The test {why}; it said:", *said[-LAST_LINES:]]))

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._results.close()
        self._folder.cleanup()


atexit.register(_Process.end_current)


def main(results_end: int) -> None:
    """Run the tests that stdin names."""
    with os.fdopen(results_end, "w") as results:
        for line in sys.stdin:
            module, name, arguments = json.loads(line)
            test = getattr(importlib.import_module(module), name)
            gc.freeze()  # or else vLLM would look through all that was imported
            try:
                returned = test.__wrapped__(**arguments)
            except Exception:
                traceback.print_exc()  # before the other end hears of it
                sys.exit(1)
            print(json.dumps(returned), file=results, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
