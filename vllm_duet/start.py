# SPDX-License-Identifier: Apache-2.0
"""Measured at start: steps made by hand, run by the executor before the first request.

What may live here: building such steps, timing them, and the file that keeps the times. What
follows from them is in anchors.py. They run in the engine core, by its executor, as its own
loop does: with one worker or several, under either model runner.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import deque
from concurrent.futures import Future, wait
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from vllm import SamplingParams, envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.version import __version__ as vllm_version

from vllm_duet.anchors import (
    DECODE_ROOM,
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
from vllm_duet.forecast import NoForecastError, model_shape, profile_for, unknown_device
from vllm_duet.roofline import ModelShape, Roofline
from vllm_duet.support import can_measure, report_roofline
from vllm_duet.version import __version__

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

BUDGET_S = 15.0
"""For all steps that are measured. A step that would end later is left out."""

STEPS = 6
"""Of each shape; fewer than DECODE_ROOM."""

LONG_STEP_S = 0.5
"""A step that takes longer is not run again."""


def measure_at_start(executor: Any) -> None:
    """Have the scheduler of this process forecast by steps that ``executor`` runs now.

    ``executor`` is the engine core's, ready to serve. Whatever goes wrong is one sentence in the
    log, and forecasts are as they are without measured steps.
    """
    vllm_config = executor.vllm_config
    config = DuetConfig.load(vllm_config.additional_config)
    if config.measure_at_start == "never" or not can_measure(vllm_config):
        return
    try:
        roofline = _unanchored(executor, config)
        file = _file(vllm_config, roofline)
        anchors = _read(file) if config.measure_at_start == "auto" else None
        if anchors is None:
            anchors = _measured(executor, roofline)
            _write(file, anchors)
        else:
            logger.info("vllm-duet forecasts by the step times in %s.", file)
        report_roofline(vllm_config, roofline.anchored(fit(roofline, anchors)))
    except Exception as error:
        logger.warning(
            "vllm-duet could not measure steps at start, and forecasts without: %s: %s",
            type(error).__name__,
            str(error).partition("\n")[0],  # CUDA's go on about how to find out more
        )


def _unanchored(executor: Any, config: DuetConfig) -> Roofline:
    """What measured steps are set against: only its ratios count."""
    vllm_config = executor.vllm_config
    try:
        shape = model_shape(vllm_config)
    except NoForecastError:
        shape = executor.collective_rpc(_loaded_shape)[0]
    profile = profile_for(config, current_platform.get_device_name())
    return Roofline(shape, profile or unknown_device(vllm_config.device_config.device_type))


def _measured(executor: Any, roofline: Roofline) -> list[Anchor]:
    """Raises: whatever the executor does, or ValueError where the KV cache is of another kind."""
    steps = MeasuredSteps(executor)
    began = time.perf_counter()
    try:
        shapes = shapes_to_measure(steps.limits)
        steps.measure(shapes[0])  # what comes first pays for what is made once
        anchors = _run(steps, shapes, roofline, BUDGET_S)
        anchored = roofline.anchored(fit(roofline, anchors))
        left_s = BUDGET_S - (time.perf_counter() - began)
        checks = _run(steps, shapes_to_check(steps.limits), anchored, left_s)
    finally:
        executor.collective_rpc(_seed)
    off = f", forecasts of {len(checks)} others are off by {mean_error(anchored, checks):.0%}"
    logger.info(
        "vllm-duet measured %d steps in %.1f s: %s%s.",
        len(anchors),
        time.perf_counter() - began,
        _in_words(anchors),
        off if checks else "",
    )
    return anchors


def _run(
    steps: MeasuredSteps, shapes: list[StepShape], roofline: Roofline, budget_s: float
) -> list[Anchor]:
    bar = tqdm(shapes, desc="Measuring steps", leave=False, disable=not steps.shows_progress)
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

    The scheduler, made later, never hears of them: their rows are given back after each shape,
    and what they leave in the KV cache is overwritten before it is read.
    """

    def __init__(self, executor: Any) -> None:
        """
        Raises:
            ValueError: some layers have no attention over blocks of tokens.
        """
        vllm_config = executor.vllm_config
        num_blocks, block_sizes = executor.collective_rpc(_kv_cache)[0]
        if not block_sizes:
            raise ValueError("some layers keep another state than keys and values")
        self._executor = executor
        self._block_sizes = block_sizes
        self._vocabulary_size = vllm_config.model_config.get_vocab_size()
        self._depth = vllm_config.max_concurrent_batches
        self.shows_progress = vllm_config.load_config.use_tqdm_on_load
        scheduler, groups = vllm_config.scheduler_config, len(block_sizes)
        # Block 0 is vLLM's null block, and each request may leave most of a block empty.
        num_blocks -= 1 + groups * (scheduler.max_num_seqs + 1)
        self.limits = StepLimits(
            max_seqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            max_context=vllm_config.model_config.max_model_len,
            cache_tokens=num_blocks // groups * min(block_sizes),
        )
        self._made = 0

    def measure(self, shape: StepShape) -> Anchor:
        """The median time of some steps of ``shape``, as many queued as in vLLM's own loop.

        A step lasts from the later of its own start and the end of the step before, as in
        step_times.py.
        """
        self._next_block, self._alive = 1, set[str]()
        queue: deque[tuple[float, _Queued]] = deque()
        times_s, ended_at, left = list[float](), 0.0, STEPS
        try:
            decodes = [self._new(shape.decode_context, 1) for _ in range(shape.decodes)]
            if decodes:
                self._step(decodes).result()
            while left or queue:
                if left and len(queue) < self._depth:
                    left -= 1
                    began = time.perf_counter()
                    prompts = []
                    if shape.prefill:
                        prompts = [self._new(shape.prefill_context, shape.prefill)]
                    queue.append((began, self._step(prompts, decodes)))
                    continue
                began, step = queue.popleft()
                step.result()
                began, ended_at = max(began, ended_at), time.perf_counter()
                times_s.append(ended_at - began)
                if times_s[-1] > LONG_STEP_S:
                    left = 0
        finally:
            wait([step.sampled for _, step in queue])
            self._executor.collective_rpc(_forget_half_a_step)
            output = SchedulerOutput.make_empty()
            output.finished_req_ids = self._alive
            self._executor.execute_model(output)
        # The first may have had to make something, once.
        return Anchor(shape, 1e3 * median(times_s[1:] or times_s))

    def _new(self, context: int, query: int) -> NewRequestData:
        """A request with ``context`` tokens in the KV cache, that is to compute ``query`` more."""
        self._made += 1
        # Tokens that differ, or a mixture of experts would run a few of its experts only.
        tokens = [(self._made + 7919 * n) % self._vocabulary_size for n in range(context + query)]
        blocks, first = [], self._next_block
        for size in self._block_sizes:
            count = -(-(len(tokens) + DECODE_ROOM) // size)
            blocks.append(list(range(self._next_block, self._next_block + count)))
            self._next_block += count
        if query > 1:
            self._next_block = first  # the next prompt may have its blocks
        return NewRequestData(
            req_id=f"vllm-duet-{self._made}",
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=DECODE_ROOM, ignore_eos=True),
            pooling_params=None,
            block_ids=tuple(blocks),
            num_computed_tokens=context,
            lora_request=None,
            prefill_token_ids=tokens,
        )

    def _step(
        self, new: list[NewRequestData], cached: list[NewRequestData] | None = None
    ) -> _Queued:
        output, known = SchedulerOutput.make_empty(), CachedRequestData.make_empty()
        # The prompt of the step before has had its only step.
        output.finished_req_ids = self._alive - {request.req_id for request in cached or ()}
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
        output.num_common_prefix_blocks = [0] * len(self._block_sizes)
        self._alive |= output.num_scheduled_tokens.keys()
        executed = self._executor.execute_model(output, non_block=True)
        return _Queued(executed, self._executor.sample_tokens(None, non_block=True))


class _Queued(NamedTuple):
    """A step that the executor has been given."""

    executed: Future[Any]
    sampled: Future[Any]

    def result(self) -> None:
        """Raises: what the step has raised. Sampling then finds nothing, and returns None."""
        if self.sampled.result() is None:
            self.executed.result()


# In every worker


def _kv_cache(worker: Any) -> tuple[int, list[int]]:
    """Blocks of the cache, and tokens of a block in each group; none where a group is no cache
    of keys and values."""
    config = worker.model_runner.kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    if not all(isinstance(spec, AttentionSpec) for spec in specs):
        return config.num_blocks, []
    return config.num_blocks, [spec.block_size for spec in specs]


def _loaded_shape(worker: Any) -> ModelShape:
    from vllm_duet.worker.loaded_shape import loaded_shape

    return loaded_shape(worker.get_model(), worker.vllm_config)


def _forget_half_a_step(worker: Any) -> None:
    # Of a step that has failed between execute_model and sample_tokens.
    worker.model_runner.execute_model_state = None


def _seed(worker: Any) -> None:
    # As vLLM does after its own warm-up: sampling has drawn random numbers.
    set_random_seed(worker.model_config.seed, worker.parallel_config.data_parallel_index)


# The file


def _file(vllm_config: Any, roofline: Roofline) -> Path:
    """Of everything that the times depend on."""
    on = [
        current_platform.get_device_name(),
        torch.version.cuda,
        platform.processor() or platform.machine(),
        len(os.sched_getaffinity(0)),
        os.environ.get("OMP_NUM_THREADS"),
        vllm_version,
        __version__,
        vllm_config.compute_hash(),
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.model_config.max_model_len,
        vllm_config.model_config.enforce_eager,
        vllm_config.compilation_config.cudagraph_capture_sizes,
        vllm_config.use_v2_model_runner,
        roofline.profile.name,
    ]
    name = sha256(json.dumps(on, default=str).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "vllm_duet" / f"steps-{name}.json"


def _read(file: Path) -> list[Anchor] | None:
    try:
        found = json.loads(file.read_text())
        return [Anchor(StepShape(**anchor["shape"]), float(anchor["ms"])) for anchor in found]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("vllm-duet cannot read %s, and measures anew: %r", file, error)
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
