# SPDX-License-Identifier: Apache-2.0
"""Measured at start: steps made by hand, run by the real runner before the first request.

What may live here: building such steps, timing them, and the file that keeps the times. What
follows from them is in anchors.py. A worker calls ``measure_at_start`` when vLLM has captured
its CUDA graphs. Nothing that goes wrong here ends a start.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from vllm import SamplingParams, envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.version import __version__ as vllm_version

from vllm_duet.anchors import (
    Anchor,
    StepLimits,
    StepShape,
    fit,
    mean_error,
    shapes_to_check,
    shapes_to_measure,
    within,
)
from vllm_duet.config import DuetConfig
from vllm_duet.forecast import NoForecastError, roofline_for
from vllm_duet.roofline import NO_ANCHORS, Roofline
from vllm_duet.support import measuring_blockers, report_anchors
from vllm_duet.version import __version__

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

BUDGET_S = 15.0
"""For all steps that are measured. A step that would end later is left out."""

REPEATS = 4
"""Steps of one shape that are timed together, the device busy throughout, as it is in service."""

LONG_STEP_S = 0.5
"""Of a step that takes longer the first is taken as it is."""

TOKEN = 1
"""Every token of every prompt. Which it is does not matter for the time."""


def measure_at_start(worker: Any) -> None:
    """Have the scheduler of this process forecast by steps that ``worker`` has run."""
    vllm_config = worker.vllm_config
    config = DuetConfig.load(vllm_config.additional_config)
    if config.measure_at_start == "never" or measuring_blockers(vllm_config):
        return
    try:
        roofline = _unanchored(vllm_config, config)
    except NoForecastError:
        return  # the scheduler says so
    try:
        file = _file(worker, roofline)
        anchors = _read(file) if config.measure_at_start == "auto" else None
        if anchors is None:
            anchors = _measured(worker, roofline)
            _write(file, anchors)
        else:
            logger.info("vllm-duet forecasts by the step times in %s.", file)
        factors = fit(roofline, anchors)
    except Exception as error:
        logger.warning(
            "vllm-duet could not measure steps at start, and forecasts without: %s: %s",
            type(error).__name__,
            error,
        )
        return
    report_anchors(vllm_config, factors)


def _unanchored(vllm_config: Any, config: DuetConfig) -> Roofline:
    device_name = current_platform.get_device_name()
    return roofline_for(vllm_config, config, device_name, NO_ANCHORS)


def _measured(worker: Any, roofline: Roofline) -> list[Anchor]:
    """Raises: whatever the runner does, or ValueError where its KV cache is of an unknown kind."""
    steps = MeasuredSteps(worker)
    began = time.perf_counter()
    with _random_numbers_kept(worker.device):
        anchors = _run(steps, shapes_to_measure(steps.limits), roofline, BUDGET_S)
        anchored = roofline.anchored(fit(roofline, anchors))
        left_s = BUDGET_S - (time.perf_counter() - began)
        checks = _run(steps, shapes_to_check(steps.limits), anchored, left_s)
    off = f", forecasts of {len(checks)} others are off by {mean_error(anchored, checks):.0%}"
    logger.info(
        "vllm-duet measured %d steps in %.1f s: %s%s.",
        len(anchors),
        time.perf_counter() - began,
        _in_words(anchors),
        off if checks else "",
    )
    return anchors


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whoever draws after the block draws what would have been drawn without it.

    vLLM sets the seed after its own warm-up; Model Runner V2 draws seeds of requests by NumPy.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _run(
    steps: MeasuredSteps, shapes: list[StepShape], roofline: Roofline, budget_s: float
) -> list[Anchor]:
    bar = tqdm(shapes, desc="Measuring steps", leave=False)
    try:
        return list(within(bar, roofline, budget_s, steps.measure, time.perf_counter))
    finally:
        bar.close()


def _in_words(anchors: list[Anchor]) -> str:
    decodes = [a for a in anchors if a.shape.decodes]
    prefills = [a for a in anchors if a.shape.prefill and not a.shape.prefill_context]
    least, most = decodes[0], max(decodes, key=lambda a: a.shape.decodes)
    text = f"one decode takes {least.ms:.1f} ms, {most.shape.decodes} take {most.ms:.1f} ms"
    if prefills:
        text += f", {prefills[-1].shape.prefill} prompt tokens {prefills[-1].ms:.1f} ms"
    return text


class MeasuredSteps:
    """Runs steps of requests that nobody sent, in blocks that nobody has yet.

    The scheduler, made later, knows nothing of them: their rows are given back after each
    shape, and what they leave in the KV cache is overwritten before it is read.
    """

    def __init__(self, worker: Any) -> None:
        """
        Raises:
            ValueError: some layers have no attention over blocks of tokens.
        """
        runner, vllm_config = worker.model_runner, worker.vllm_config
        kv_cache = runner.kv_cache_config
        specs = [group.kv_cache_spec for group in kv_cache.kv_cache_groups]
        if not specs or not all(isinstance(spec, AttentionSpec) for spec in specs):
            raise ValueError("some layers keep another state than keys and values")
        self._worker = worker
        self._block_sizes = [spec.block_size for spec in specs]
        scheduler = vllm_config.scheduler_config
        self.limits = StepLimits(
            max_seqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            max_context=vllm_config.model_config.max_model_len,
            # Block 0 is vLLM's null block; each request may leave most of a block empty.
            cache_tokens=(kv_cache.num_blocks - 1 - scheduler.max_num_seqs)
            * min(self._block_sizes)
            // len(specs),
        )
        self._made = 0

    def measure(self, shape: StepShape) -> Anchor:
        """The time of one step of ``shape``, each as if many of the kind followed each other."""
        self._next_block, self._alive = 1, set[str]()
        try:
            decodes = [self._new(shape.decode_context, 1) for _ in range(shape.decodes)]
            if decodes:
                self._wait(self._step(decodes))
            first_s = self._timed(shape, decodes, 1)
            if first_s > LONG_STEP_S:
                return Anchor(shape, 1e3 * first_s)
            return Anchor(shape, 1e3 * self._timed(shape, decodes, REPEATS))
        finally:
            output = SchedulerOutput.make_empty()
            output.finished_req_ids = self._alive
            self._worker.execute_model(output)

    def _timed(self, shape: StepShape, decodes: list[NewRequestData], steps: int) -> float:
        """Seconds of one of ``steps``, of which two are queued at a time."""
        pending: deque[Any] = deque()
        began = time.perf_counter()
        for _ in range(steps):
            prompts = [self._new(shape.prefill_context, shape.prefill)] if shape.prefill else []
            pending.append(self._step(prompts, decodes))
            if len(pending) > 1:
                self._wait(pending.popleft())
        while pending:
            self._wait(pending.popleft())
        return (time.perf_counter() - began) / steps

    def _new(self, context: int, query: int) -> NewRequestData:
        """A request with ``context`` tokens in the KV cache, that is to compute ``query`` more."""
        self._made += 1
        tokens = [TOKEN] * (context + query)
        blocks = []
        for size in self._block_sizes:
            # With room for the decodes to come.
            count = -(-(len(tokens) + 16) // size)
            blocks.append(list(range(self._next_block, self._next_block + count)))
            self._next_block += count
        if query > 1:
            # The next prompt takes its place.
            self._next_block -= sum(map(len, blocks))
        return NewRequestData(
            req_id=f"vllm-duet-{self._made}",
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=64),
            pooling_params=None,
            block_ids=tuple(blocks),
            num_computed_tokens=context,
            lora_request=None,
            prefill_token_ids=tokens,
        )

    def _step(self, new: list[NewRequestData], cached: list[NewRequestData] | None = None) -> Any:
        output, known = SchedulerOutput.make_empty(), CachedRequestData.make_empty()
        # Prompts of the step before have had their only step.
        output.finished_req_ids = self._alive - {r.req_id for r in cached or ()}
        self._alive -= output.finished_req_ids
        for request in cached or ():
            request.num_computed_tokens += 1
            known.req_ids.append(request.req_id)
            known.new_block_ids.append(None)
            known.num_computed_tokens.append(request.num_computed_tokens)
            known.num_output_tokens.append(
                request.num_computed_tokens - len(request.prompt_token_ids or ()) + 1
            )
            output.num_scheduled_tokens[request.req_id] = 1
        for request in new:
            query = len(request.prompt_token_ids or ()) - request.num_computed_tokens
            output.num_scheduled_tokens[request.req_id] = query
        output.scheduled_new_reqs, output.scheduled_cached_reqs = new, known
        output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
        self._alive |= output.num_scheduled_tokens.keys()
        result = self._worker.execute_model(output)
        return self._worker.sample_tokens(None) if result is None else result

    def _wait(self, result: Any) -> None:
        if isinstance(result, AsyncModelRunnerOutput):
            result.get_output()


# The file


def _file(worker: Any, roofline: Roofline) -> Path:
    """Of everything that the times depend on."""
    vllm_config = worker.vllm_config
    on = [
        current_platform.get_device_name(),
        torch.version.cuda,
        platform.machine(),
        torch.get_num_threads(),
        os.cpu_count(),
        vllm_version,
        __version__,
        vllm_config.compute_hash(),
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.model_config.max_model_len,
        vllm_config.model_config.enforce_eager,
        vllm_config.compilation_config.cudagraph_capture_sizes,
        type(worker.model_runner).__qualname__,
        roofline.profile.name,
    ]
    name = sha256(json.dumps(on, default=str).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "vllm_duet" / f"steps-{name}.json"


def _read(file: Path) -> list[Anchor] | None:
    try:
        return [
            Anchor(StepShape(**a["shape"]), float(a["ms"])) for a in json.loads(file.read_text())
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("vllm-duet cannot read %s, and measures anew: %s", file, error)
        return None


def _write(file: Path, anchors: list[Anchor]) -> None:
    text = json.dumps([{"shape": a.shape._asdict(), "ms": a.ms} for a in anchors], indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(text)
        new.replace(file)  # whole, however many servers start at once
    except OSError as error:
        logger.warning("vllm-duet measures anew at the next start: %s", error)
