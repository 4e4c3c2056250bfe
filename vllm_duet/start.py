# SPDX-License-Identifier: Apache-2.0
"""Measured at start: steps made by hand, run by the executor before the first request.

What may live here: running such steps, timing them, and what is concluded from the times for this
engine. What follows from them for a forecast is in anchors.py, the steps are hand_made.py's, and
the file that keeps the times is start_file.py's. They run in the engine core, by its executor, as
its own loop does: with one worker or several, under either model runner.

Where the worker has made lanes on a GPU, these are proved first (worker/proof.py) and then
measured: alone, and side by side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tqdm import tqdm
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.version import __version__ as vllm_version

from vllm_duet.anchors import (
    DECODE_ROOM,
    LANE_ROOM,
    Anchor,
    LaneAnchor,
    StepShape,
    fit,
    lane_gains,
    lane_shapes,
    mean_error,
    shapes_to_check,
    shapes_to_measure,
    within,
)
from vllm_duet.config import DuetConfig
from vllm_duet.forecast import (
    NoForecastError,
    lane_profile,
    model_shape,
    profile_for,
    unknown_device,
)
from vllm_duet.hand_made import HandMadeRequest, HandMadeSteps
from vllm_duet.plan import Join, JoinedPrefill, PrefillLaunch, StepDirective
from vllm_duet.policy import decode_lanes
from vllm_duet.roofline import GpuProfile, ModelShape, Roofline
from vllm_duet.start_file import StartFile
from vllm_duet.steps_file import Measured, StepsFile
from vllm_duet.support import (
    measuring_blockers,
    report_lanes,
    report_roofline,
    reported_lanes,
)
from vllm_duet.version import __version__
from vllm_duet.worker.proof import Proof, prove_lanes

logger = init_logger(f"vllm.{__name__}")  # with the handlers and the level of vLLM's

BUDGET_S = 12.0
"""For all steps on the whole device. A step that would end later is left out."""

STEPS = 6
"""Of each shape; fewer than DECODE_ROOM."""

LAUNCHES = 3
"""Of a prefill on a lane, of which the first is not counted."""

LONG_STEP_S = 0.5
"""A step that takes longer is not run again."""


def measure_at_start(executor: Any) -> None:
    """Have the scheduler of this process forecast by steps that ``executor`` runs now, and split
    steps only on lanes that have been proved.

    ``executor`` is the engine core's, ready to serve. Whatever goes wrong is one sentence in the
    log, and forecasts are as they are without measured steps.
    """
    vllm_config = executor.vllm_config
    config = DuetConfig.load(vllm_config.additional_config)
    if config.measure_at_start == "never" or measuring_blockers(vllm_config):
        return
    try:
        file, stored = StartFile.of(vllm_config), None
        if config.measure_at_start == "auto":
            stored = file.read()
        found = stored or Measured([])
        roofline = _unanchored(executor, config)
        steps = MeasuredSteps(executor)
        try:
            if not found.anchors:
                anchors, checks = _measured(steps, roofline)
                found = replace(found, anchors=anchors, checks=checks)
            if _has_lanes(vllm_config) and not found.lanes:
                found = replace(found, **_lanes(steps, config)._asdict())
        finally:
            executor.collective_rpc(_seed)
        kept = steps.file(roofline, found)
        if found == stored:
            logger.info("vllm-duet forecasts by the step times in %s.", file.path)
        else:
            file.write(kept)
        _found[vllm_config.instance_id] = kept
        _use_lanes(executor, config, found)
        factors = fit(roofline, found.anchors, found.lanes)
        report_roofline(vllm_config, roofline.anchored(factors))
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # CUDA's go on
        _found[vllm_config.instance_id] = what
        logger.warning(
            "vllm-duet could not measure steps at start, and forecasts without: %s", what
        )
        if config.cuda_lanes == "auto":
            _stay_whole(executor, f"steps could not be measured at start: {what}")


_found: dict[str, StepsFile | str] = {}
"""By the ``instance_id`` of a VllmConfig, as in support.py."""


def found_at_start(vllm_config: Any) -> StepsFile | str | None:
    """What was measured when the engine of this process started, or a clause that says why that
    failed; None where it was not tried."""
    return _found.get(vllm_config.instance_id)


def _has_lanes(vllm_config: Any) -> bool:
    on_gpu = vllm_config.device_config.device_type != "cpu"
    return on_gpu and reported_lanes(vllm_config).obstacle is None


def _unanchored(executor: Any, config: DuetConfig) -> Roofline:
    """What measured steps are set against: only its ratios count."""
    vllm_config = executor.vllm_config
    try:
        shape = model_shape(vllm_config)
    except NoForecastError:
        shape = executor.collective_rpc(_loaded_shape)[0]
    profile = profile_for(config, current_platform.get_device_name())
    return Roofline(shape, profile or unknown_device(vllm_config.device_config.device_type))


def _profile_name(config: DuetConfig) -> str | None:
    if config.gpu_profile is None:
        profile = GpuProfile.detect(current_platform.get_device_name())
        return profile.name if profile else None
    path = Path(config.gpu_profile)
    return str(path.resolve()) if path.is_file() else config.gpu_profile


def _measured(steps: MeasuredSteps, roofline: Roofline) -> tuple[list[Anchor], list[Anchor]]:
    """Anchors, and checks of them. Raises: whatever the executor does."""
    began = time.perf_counter()
    shapes = shapes_to_measure(steps.limits)
    steps.measure(shapes[0])  # what comes first pays for what is made once
    anchors = _run(steps, shapes, roofline, BUDGET_S)
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
    return anchors, checks


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


# The lanes


class _Lanes(NamedTuple):
    """What came of them; fields of Measured."""

    lanes: list[LaneAnchor]
    gains: dict[int, float]
    obstacle: str | None = None


def _lanes(steps: MeasuredSteps, config: DuetConfig) -> _Lanes:
    """Prove the lanes and measure them, but for what stands in the way."""
    began = time.perf_counter()
    profile = lane_profile(config, current_platform.get_device_name())
    splits = {sms: profile.num_sms - sms for sms in decode_lanes(profile, config.decode_sms)}
    obstacle, runs = steps.prove_lanes(splits)
    if not runs:
        steps.give_lanes_up(obstacle or "")
    if obstacle is not None and (config.cuda_lanes == "auto" or not runs):
        return _Lanes([], {}, obstacle)
    decodes, prefill = lane_shapes(steps.limits, steps.most_decodes)
    if prefill is None:
        return _Lanes([], {}, "the KV cache or a step is too small to measure the lanes in")
    alone = [*decodes, prefill]
    pairs = [shape._replace(prefill=prefill.prefill) for shape in decodes]
    whole = {shape: steps.measure(shape).ms for shape in alone}
    work = [(sms, shape) for sms in splits for shape in (*alone, *pairs)]
    bar = tqdm(work, desc="Measuring lanes", leave=False, disable=not steps.shows_progress)
    try:
        lanes = [steps.measure_lane(sms, splits[sms], shape) for sms, shape in bar]
    finally:
        bar.close()
    gains = lane_gains(whole, lanes)
    logger.info(
        "vllm-duet measured its lanes in %.1f s: side by side they do %s of what the GPU does one"
        " after the other.",
        time.perf_counter() - began,
        ", ".join(f"{gain:.2f} ({sms} SMs)" for sms, gain in gains.items()),
    )
    return _Lanes(lanes, gains, obstacle)


def _use_lanes(executor: Any, config: DuetConfig, found: Measured) -> None:
    """Have the lanes that pay used, or none, as ``cuda_lanes`` says."""
    vllm_config, margin = executor.vllm_config, config.throughput_margin
    if not _has_lanes(vllm_config):
        return
    refusal = found.refusal(margin)
    if config.cuda_lanes != "auto":
        if refusal is not None:
            logger.warning("vllm-duet splits steps, since cuda_lanes says so, but %s.", refusal)
        return
    if refusal is not None:
        _stay_whole(executor, refusal)
        return
    paying = found.paying_lanes(margin)
    for sms in found.gains.keys() - set(paying):
        logger.info(
            "vllm-duet leaves the decode lane of %d SMs out: side by side it does %.2f of what the"
            " GPU does one after the other.",
            sms,
            found.gains[sms],
        )
    report_lanes(vllm_config, replace(reported_lanes(vllm_config), decode_sms=paying))


def _stay_whole(executor: Any, obstacle: str, written_blocks: int = 0) -> None:
    if _has_lanes(executor.vllm_config):
        executor.collective_rpc(_without_lanes, args=(obstacle, written_blocks))


class MeasuredSteps:
    """Runs steps of requests that nobody sent, and takes their time."""

    def __init__(self, executor: Any) -> None:
        """
        Raises:
            ValueError: some layers keep neither keys and values nor a state.
        """
        vllm_config = executor.vllm_config
        self._executor = executor
        self._steps = HandMadeSteps(vllm_config, executor.collective_rpc(_kv_cache_config)[0])
        self._depth = vllm_config.max_concurrent_batches
        self._launches = 0
        self.most_decodes = reported_lanes(vllm_config).most_decodes
        self.limits = self._steps.limits
        self.shows_progress = vllm_config.load_config.use_tqdm_on_load

    def file(self, roofline: Roofline, found: Measured) -> StepsFile:
        """``found``, and what it was found of."""
        config = self._executor.vllm_config
        model, scheduler = config.model_config, config.scheduler_config
        graphs = config.compilation_config
        sizes = graphs.cudagraph_capture_sizes if graphs.cudagraph_mode else None
        return StepsFile(
            device=current_platform.get_device_name(),
            device_type=config.device_config.device_type,
            profile=_profile_name(DuetConfig.load(config.additional_config)),
            versions={"vllm": vllm_version, "vllm-duet": __version__},
            date=time.strftime("%Y-%m-%d"),
            model=model.model,
            shape=roofline.shape,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_model_len=model.max_model_len,
            kv_cache_tokens=self._steps.kv_cache_tokens,
            graph_sizes=tuple(sizes or ()),
            found=found,
        )

    def prove_lanes(self, splits: Mapping[int, int]) -> Proof:
        """Whether split steps compute what whole ones do, see worker/proof.py."""
        arguments = self._steps, splits, self.most_decodes
        proof: Proof = self._executor.collective_rpc(prove_lanes, args=arguments)[0]
        return proof

    def give_lanes_up(self, obstacle: str) -> None:
        """For lanes that do not run, and may still be busy."""
        _stay_whole(self._executor, obstacle, self._steps.most_blocks)

    def measure(self, shape: StepShape) -> Anchor:
        """The median time of some steps of ``shape``, as many queued as in vLLM's own loop.

        A step lasts from the later of its own start and the end of the step before, as in
        step_times.py.
        """
        times_s = list[float]()
        prompt: HandMadeRequest | None = None
        with _Queue(self._executor, self._steps, self._depth) as queue:
            decodes = self._decodes(queue, shape)
            left = STEPS
            while left or queue:
                if left and not queue.is_full:
                    left -= 1
                    ended = [prompt] if prompt else []
                    if shape.prefill:
                        prompt = self._prompt(shape, prompt)
                    queue.put(self._steps.step([prompt] if prompt else [], decodes, ended))
                    continue
                times_s.append(queue.take().s)
                if times_s[-1] > LONG_STEP_S:
                    left = 0
        # The first may have had to make something, once.
        return Anchor(shape, 1e3 * median(times_s[1:] or times_s))

    def measure_lane(self, decode_sms: int, prefill_sms: int, shape: StepShape) -> LaneAnchor:
        """The decodes of ``shape`` on one lane beside its prompt on the other; or one of them."""
        with _Queue(self._executor, self._steps, self._depth) as queue:
            decodes = self._decodes(queue, shape, LANE_ROOM)
            if not shape.prefill:
                steps_ms = self._decode_lane(queue, decodes, decode_sms)
                return LaneAnchor(decode_sms, shape, median(steps_ms[1:]), 0.0)
            return self._pair(queue, decodes, decode_sms, prefill_sms, shape)

    def _decodes(
        self, queue: _Queue, shape: StepShape, room: int = DECODE_ROOM
    ) -> list[HandMadeRequest]:
        """The decodes of ``shape``, each of which has computed a token by now."""
        made = [
            self._steps.request(shape.decode_context, 1, room=room) for _ in range(shape.decodes)
        ]
        if made:
            queue.put(self._steps.step(made))
            queue.take()
        return made

    def _prompt(self, shape: StepShape, before: HandMadeRequest | None) -> HandMadeRequest:
        """The next prompt, in the blocks of the one before, which has ended."""
        return self._steps.request(shape.prefill_context, shape.prefill, like=before)

    def _decode_lane(
        self, queue: _Queue, decodes: Sequence[HandMadeRequest], decode_sms: int
    ) -> list[float]:
        times_ms = []
        for _ in range(STEPS):
            output = self._steps.step(decodes=decodes)
            output.duet = StepDirective(decode_sms=decode_sms)
            queue.put(output)
            if queue.is_full:
                times_ms.append(1e3 * queue.take().s)
        while queue:
            times_ms.append(1e3 * queue.take().s)
        return times_ms

    def _pair(
        self,
        queue: _Queue,
        decodes: Sequence[HandMadeRequest],
        decode_sms: int,
        prefill_sms: int,
        shape: StepShape,
    ) -> LaneAnchor:
        """One prefill after the other, each launched when the one before has joined."""
        steps_ms, launching_ms, prefills_ms = list[float](), list[float](), list[float]()
        prompt: HandMadeRequest | None = None
        joined_at, steps_until = list[float](), list[int]()
        in_flight, taken, beside = False, 0, 0
        while len(prefills_ms) < LAUNCHES:
            while not queue.is_full:
                output = self._steps.step((), decodes, [prompt] if prompt and not in_flight else ())
                launch, beside = None, beside + 1
                if not in_flight:
                    prompt, in_flight, beside = self._prompt(shape, prompt), True, 0
                    launch = PrefillLaunch(
                        self._launches, self._steps.step([prompt]), decode_sms, prefill_sms
                    )
                    self._launches += 1
                # As one waits without decodes, so does the last that there is room for.
                is_last = beside > LANE_ROOM // LAUNCHES - 2 * self._depth
                join = Join.WAIT if not decodes or is_last else Join.IF_DONE
                output.duet = StepDirective(
                    launch, None if launch and decodes else join, decode_sms
                )
                queue.put(output)
            step = queue.take()
            taken += bool(decodes)
            if step.joined is not None:
                in_flight = False
                prefills_ms.append(step.joined.prefill_busy_ms)
                joined_at.append(step.ended_at)
                steps_until.append(taken)
            elif step.launches:
                launching_ms.append(1e3 * step.s)
            elif in_flight:
                steps_ms.append(1e3 * step.s)
        while queue:
            queue.take()
        cycles = len(joined_at) - 1
        return LaneAnchor(
            decode_sms,
            shape,
            # A prefill may end before any step but the one that has launched it.
            median(steps_ms or launching_ms) if decodes else 0.0,
            median(prefills_ms[1:] or prefills_ms),
            1e3 * (joined_at[-1] - joined_at[0]) / cycles,
            (steps_until[-1] - steps_until[0]) / cycles,
        )


class _Step(NamedTuple):
    """A step that has ended: seconds, when, whether it launched a prefill, and the one that it
    joined."""

    s: float
    ended_at: float
    launches: bool
    joined: JoinedPrefill | None


class _Queue:
    """Steps that the executor has been given, as vLLM's loop keeps them; afterwards all their
    requests are gone."""

    def __init__(self, executor: Any, steps: HandMadeSteps, depth: int) -> None:
        self._executor = executor
        self._steps = steps
        self._depth = depth
        self._queued = deque[tuple[float, bool, list[Future[Any]]]]()
        self._ended_at = 0.0

    def __enter__(self) -> _Queue:
        return self

    def __bool__(self) -> bool:
        return bool(self._queued)

    @property
    def is_full(self) -> bool:
        return len(self._queued) >= self._depth

    def put(self, output: Any) -> None:
        began = time.perf_counter()
        futures = [self._executor.execute_model(output, non_block=True)]
        if output.total_num_scheduled_tokens:
            futures.append(self._executor.sample_tokens(None, non_block=True))
        directive: StepDirective | None = getattr(output, "duet", None)
        launches = directive is not None and directive.launch is not None
        self._queued.append((began, launches, futures))

    def take(self) -> _Step:
        """Raises: what the step has raised. Sampling then finds nothing, and returns None."""
        began, launches, futures = self._queued.popleft()
        output = futures[-1].result()
        if output is None:
            futures[0].result()
        began, self._ended_at = max(began, self._ended_at), time.perf_counter()
        return _Step(
            self._ended_at - began, self._ended_at, launches, getattr(output, "duet", None)
        )

    def __exit__(self, *error: object) -> None:
        wait([step[-1][-1] for step in self._queued])
        self._executor.collective_rpc(_forget_half_a_step)
        self._executor.execute_model(self._steps.end())


# In every worker


def _kv_cache_config(worker: Any) -> Any:
    return worker.model_runner.kv_cache_config


def _loaded_shape(worker: Any) -> ModelShape:
    from vllm_duet.worker.loaded_shape import loaded_shape

    return loaded_shape(worker.get_model(), worker.vllm_config)


def _forget_half_a_step(worker: Any) -> None:
    # Of a step that has failed between execute_model and sample_tokens.
    worker.model_runner.execute_model_state = None


def _without_lanes(worker: Any, obstacle: str, written_blocks: int) -> None:
    worker.model_runner.stay_whole(obstacle, written_blocks)


def _seed(worker: Any) -> None:
    # As vLLM does after its own warm-up: sampling has drawn random numbers.
    set_random_seed(worker.model_config.seed, worker.parallel_config.data_parallel_index)
