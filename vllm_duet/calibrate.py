# SPDX-License-Identifier: Apache-2.0
"""The work behind ``vllm-duet calibrate``: what an engine measures at its start, by hand.

The engine runs in this process, so that what it raises and what it has measured can be had here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Both are read when vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_duet.config import DuetConfig, DuetConfigError
from vllm_duet.start import found_at_start
from vllm_duet.steps_file import StepsFile
from vllm_duet.support import measuring_blockers


class CalibrationError(RuntimeError):
    """Nothing was measured; the message says why, in one sentence."""


def calibrate(model: str, engine_options: Sequence[str]) -> StepsFile:
    """Start an engine for ``model`` as ``vllm serve`` would, and have it measure its steps.

    Raises:
        CalibrationError: vLLM does not start so, or the steps of such an engine are not measured.
    """
    try:
        args = _engine_args(model, engine_options)
        # By default vLLM's budget depends on who asks.
        engine = LLMEngine.from_engine_args(args, UsageContext.OPENAI_API_SERVER)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"vLLM does not start with {model}: {_first_line(error)}") from error
    try:
        found = found_at_start(engine.vllm_config)
        if isinstance(found, StepsFile):
            return found
        why = found or " and ".join(measuring_blockers(engine.vllm_config))
        raise CalibrationError(f"The steps of this engine are not measured: {why}")
    finally:
        engine.engine_core.shutdown()


def default_path(model: str) -> Path:
    """Where the file goes, unless told otherwise."""
    return Path(f"steps-{Path(model).name}.json")


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CalibrationError(f"vLLM does not take these options: {message}")


def _engine_args(model: str, options: Sequence[str]) -> EngineArgs:
    parser = EngineArgs.add_cli_args(_Parser(add_help=False))
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options]))
    more: dict[str, Any] = dict(args.additional_config or {})
    try:
        DuetConfig.load(more)
    except DuetConfigError as error:
        raise CalibrationError(str(error)) from error
    args.additional_config = more | {"duet": {**more.get("duet", {}), "measure_at_start": "always"}}
    args.scheduler_cls = "vllm_duet.DuetScheduler"
    return args


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
