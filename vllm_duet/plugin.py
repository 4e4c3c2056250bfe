# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point; the only file that changes vLLM's objects.

vLLM calls ``register`` in the API process, the engine core and every worker.
It wraps ``VllmConfig.__post_init__`` and ``Executor.compile_or_warm_up_model``, and the wrappers
do nothing unless the configured scheduler is DuetScheduler; only then is
``StatLoggerManager.__init__`` wrapped too.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm_duet.config import ENV_PREFIX, DuetConfig
from vllm_duet.version import check_vllm_version

WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "vllm_duet.worker.gpu.DuetWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_duet.worker.cpu.DuetCPUWorker",
}
GPU_ENVIRONMENT = {
    # Streams that share a hardware queue wait for each other's launches. CUDA reads it when
    # it starts; its default is 8, and the lanes alone have more streams (CUDA programming
    # guide, environment variables).
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # vLLM runs shared experts on one more stream, which is nobody's SM group.
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",
}
"""Defaults of an engine that splits steps on a GPU; what the user has set stays."""

SCHEDULER_NAMES = ("vllm_duet.DuetScheduler", "vllm_duet.scheduler.DuetScheduler")


def register() -> None:
    """Let ``--scheduler-cls vllm_duet.DuetScheduler`` alone bring all it needs."""
    from vllm import envs
    from vllm.config import VllmConfig

    if hasattr(VllmConfig.__post_init__, "configures_duet"):
        return
    stock_post_init = VllmConfig.__post_init__

    @functools.wraps(stock_post_init)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_post_init(self, *args, **kwargs)
        if uses_duet(self):
            configure(self)

    # vLLM warns of every VLLM_* variable it does not know.
    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            envs.environment_variables.setdefault(name, functools.partial(os.environ.get, name))

    measure_at_start()
    # Stays visible under the wrapper of another plugin, which copies attributes.
    post_init.configures_duet = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = post_init  # type: ignore[method-assign]


def uses_duet(vllm_config: Any) -> bool:
    """Whether the configured scheduler is DuetScheduler or a subclass of it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    chosen = vllm_config.scheduler_config.scheduler_cls
    if isinstance(chosen, str) and chosen not in SCHEDULER_NAMES:
        if chosen.startswith("vllm."):
            return False
        # A subclass goes by a name of its own.
        chosen = resolve_obj_by_qualname(chosen)
    if not isinstance(chosen, type):
        return chosen in SCHEDULER_NAMES
    return any(f"{c.__module__}.{c.__qualname__}" in SCHEDULER_NAMES for c in chosen.__mro__)


def configure(vllm_config: Any) -> None:
    """Check what the user asked for, and name the worker DuetScheduler needs.

    Raises:
        RuntimeError: the installed vLLM is not supported.
        DuetConfigError: an option of vllm-duet is wrong.
    """
    from vllm.platforms import current_platform

    from vllm_duet.support import split_blockers

    if problem := check_vllm_version():
        raise RuntimeError(problem)
    DuetConfig.load(vllm_config.additional_config)
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKERS.get(parallel.worker_cls, parallel.worker_cls)
    add_stat_logger()
    if vllm_config.device_config.device_type == "cuda" and not split_blockers(
        vllm_config, current_platform.get_device_name()
    ):
        for name, value in GPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def make_room_for_two_lanes() -> None:
    """In a worker's process: a workspace for the prefill lane, and deeper buffer pools.

    vLLM's pools of pinned buffers last for the steps in flight, one preparation each; a
    step that launches a prefill prepares two batches.
    """
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu import model_runner

    if hasattr(gpu_worker._num_workspace_lanes, "has_prefill_lane"):
        return
    stock_lanes = gpu_worker._num_workspace_lanes
    stock_depth = model_runner.set_default_max_concurrency

    @functools.wraps(stock_lanes)
    def num_lanes(*args: Any, **kwargs: Any) -> int:
        return int(stock_lanes(*args, **kwargs)) + 1

    @functools.wraps(stock_depth)
    def set_depth(steps: int) -> None:
        stock_depth(2 * max(2, steps))

    num_lanes.has_prefill_lane = True  # type: ignore[attr-defined]
    gpu_worker._num_workspace_lanes = num_lanes
    model_runner.set_default_max_concurrency = set_depth


def add_stat_logger() -> None:
    """Put DuetStatLogger before the other loggers of every engine that uses DuetScheduler.

    Not through the entry points ``vllm.stat_logger_plugins``: one installed there
    turns statistics on for every engine, whatever its scheduler.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    if hasattr(StatLoggerManager.__init__, "adds_duet_stat_logger"):
        return
    stock_init = StatLoggerManager.__init__

    @functools.wraps(stock_init)
    def init(
        self: Any,
        vllm_config: Any,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if uses_duet(vllm_config):
            from vllm_duet.metrics import DuetStatLogger

            custom_stat_loggers = [DuetStatLogger, *(custom_stat_loggers or [])]
        stock_init(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    init.adds_duet_stat_logger = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = init  # type: ignore[method-assign]


def measure_at_start() -> None:
    """In the engine core: have steps measured when vLLM has warmed up, before it makes its
    scheduler. The executor is what runs them, and no hook of vLLM's is given it by then."""
    from vllm.v1.executor.abstract import Executor

    stock_warm_up = Executor.compile_or_warm_up_model

    @functools.wraps(stock_warm_up)
    def warm_up(self: Any) -> None:
        stock_warm_up(self)
        if uses_duet(self.vllm_config):
            from vllm_duet.start import measure_at_start

            measure_at_start(self)

    Executor.compile_or_warm_up_model = warm_up  # type: ignore[method-assign]
