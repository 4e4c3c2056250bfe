# SPDX-License-Identifier: Apache-2.0
"""One simulated run, from its options to its figures."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

# A GPU's engine is planned here, whatever machine this is, and nothing is logged.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import HAS_TRITON
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output import StructuredOutputManager

from vllm_duet.anchors import (
    Anchor,
    LaneAnchor,
    StepLimits,
    StepShape,
    fit,
    lane_shapes,
    shapes_to_measure,
    within,
)
from vllm_duet.doctor import GPU_MEMORY_UTILIZATION
from vllm_duet.metrics import steps_by_mode
from vllm_duet.policy import PolicyLimits, decode_lanes
from vllm_duet.roofline import GpuProfile, ModelShape, Roofline
from vllm_duet.sim.engine import (
    QUEUE_SIZE,
    CpuCosts,
    FrontEnd,
    RequestRecord,
    SimulatedClock,
    SimulatedEngine,
)
from vllm_duet.sim.executor import (
    GRAPH_SIZES,
    Disturbances,
    GroundTruth,
    Interval,
    SimulatedGpu,
)
from vllm_duet.sim.kv_cache import BLOCK_SIZE, kv_cache_config, text_model
from vllm_duet.sim.systems import SYSTEMS, SimulatedDuetScheduler, System, forecaster, system_named
from vllm_duet.sim.traces import TraceRequest
from vllm_duet.start import BUDGET_S, LAUNCHES, STEPS
from vllm_duet.steps_file import Measured, StepsFile

if TYPE_CHECKING:  # needs pandas
    from vllm_duet.sim.measured import MeasuredSteps

# Where there is no Triton vLLM refuses a config with the runner that a GPU has.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if HAS_TRITON else "0")

FIXED_BYTES = 1.0e9
"""CUDA context and graphs: an assumption."""


class SimulationError(ValueError):
    """Options that cannot be simulated, in one sentence."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is simulated. ``model`` is a config.json or the folder that holds it.

    ``gpu`` is a GPU profile's name or YAML file, or the file of steps that an engine has measured
    (``read_steps``), which are then the GPU's times, and the policy's, too. Other policies
    forecast by their profile, or by steps that they have run on the simulated GPU
    (``measure_at_start``).
    ``ttft_slo_ms`` only says which requests are good: no scheduler is told of it.
    ``weight_dtype`` and ``kv_dtype`` are as in ModelShape.from_hf_config.
    ``enable_expert_parallel`` and ``moe_backend`` (a key of measured.tables.MOE_BACKENDS, or None
    for vLLM's choice) are known to the measured truth alone. ``concurrency``: a closed
    loop of as many clients, instead of the trace's arrivals. ``truth``: where the GPU's times
    come from; "measured" is the roofline too where nothing was measured.
    """

    model: Path
    gpu: str = "h100-sxm"
    scheduler: str = "duet"
    tbt_slo_ms: float = 100.0
    ttft_slo_ms: float = 2000.0
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    max_model_len: int | None = None
    seed: int = 0
    model_error: float = 0.0
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    moe_backend: str | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    concurrency: int | None = None
    truth: Literal["measured", "roofline"] = "measured"
    measure_at_start: bool = False
    disturbances: Disturbances = field(default_factory=Disturbances)
    costs: CpuCosts = field(default_factory=CpuCosts)
    front_end: FrontEnd = field(default_factory=FrontEnd)


@dataclass(slots=True)
class Outcome:
    """What a run gave. ``rejected`` requests were longer than the model takes."""

    records: list[RequestRecord]
    intervals: list[Interval]
    rejected: int
    kv_cache_tokens: int
    preemptions: int
    steps_by_mode: dict[str, int]
    num_gpus: int = 1

    @property
    def duration_s(self) -> float:
        """From the start to the last token."""
        return max(record.token_ms[-1] for record in self.records) / 1e3


def scheduler_alone(
    scheduler_cls: type, config: VllmConfig, shape: ModelShape, **kwargs: Any
) -> Any:
    """A scheduler without an engine, with a KV cache of ``config``'s number of blocks."""
    cache = kv_cache_config(config, shape)
    block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, config)
    scheduler = scheduler_cls(
        config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        hash_block_size=hash_block_size,
        log_stats=False,
        **kwargs,
    )
    scheduler.use_v2_model_runner = True  # steps are laid out for a GPU's
    return scheduler


def read_steps(gpu: str) -> StepsFile | None:
    """The measured steps that ``gpu`` names; None where it names a profile.

    Raises:
        SimulationError: there is no such file.
        StepsFileError: it is another kind of file.
    """
    if not gpu.endswith(".json"):
        return None
    try:
        return StepsFile.load(Path(gpu))
    except OSError as error:
        raise SimulationError(f"no file of measured steps can be read: {error}") from error


class Simulation:
    """Builds engines for ``options``, and runs traces through them.

    Raises:
        SimulationError: the scheduler is unknown or cannot do this, or the model does not
            fit the GPU.
        ValueError: the model's architecture or the GPU profile is not known, or the file of
            measured steps is wrong or of another model.
    """

    def __init__(self, options: Options) -> None:
        try:
            self.system: System = system_named(options.scheduler)
        except KeyError:
            raise SimulationError(
                f"there is no scheduler {options.scheduler!r}: choose one of {', '.join(SYSTEMS)}"
            ) from None
        if options.scheduler != "stock" and not options.async_scheduling:
            raise SimulationError("only stock runs without asynchronous scheduling")
        if options.scheduler == "disaggregated" and options.concurrency is not None:
            raise SimulationError("disaggregated has no closed loop")
        self.options = options
        self.steps = read_steps(options.gpu)
        config_file = options.model / "config.json" if options.model.is_dir() else options.model
        self._hf_config: dict[str, Any] = json.loads(config_file.read_text())
        if self.steps is None:
            self.roofline = Roofline(
                ModelShape.from_hf_config(
                    self._hf_config,
                    weight_dtype=options.weight_dtype,
                    kv_dtype=options.kv_dtype,
                    tensor_parallel_size=options.tensor_parallel_size,
                ),
                GpuProfile.load(options.gpu),
            )
        else:
            self._check(self.steps)
            self.roofline = self.steps.roofline()
        self.shape, self.profile = self.roofline.shape, self.roofline.profile
        self.measured, self.truth = self._measured()
        self.kv_cache_tokens = self._kv_cache_tokens()
        self.max_model_len = min(
            options.max_model_len or int(text_model(self._hf_config)["max_position_embeddings"]),
            self.kv_cache_tokens,
        )

    def run(
        self,
        trace: Sequence[TraceRequest],
        on_finished: Callable[[RequestRecord], None] = lambda _: None,
    ) -> Outcome:
        """Serve the requests of ``trace`` that are not longer than the model takes.

        Raises:
            SimulationError: all are longer.
        """
        # vLLM keeps one block of the KV cache for itself.
        longest = min(self.max_model_len, self.kv_cache_tokens - BLOCK_SIZE)
        fitting = [r for r in trace if r.input_length + r.output_length <= longest]
        if not trace:
            raise SimulationError("there are no requests to serve")
        if not fitting:
            raise SimulationError(f"every request is longer than {longest} tokens")
        serve = self._disaggregated if self.options.scheduler == "disaggregated" else self._serve
        outcome = serve(fitting, on_finished)
        outcome.rejected = len(trace) - len(fitting)
        return outcome

    def _serve(
        self, trace: Sequence[TraceRequest], on_finished: Callable[[RequestRecord], None]
    ) -> Outcome:
        engine = self.engine()
        records = engine.run(trace, on_finished, self.options.concurrency)
        return Outcome(
            records,
            engine.gpu.intervals,
            0,
            self.kv_cache_tokens,
            engine.num_preempted,
            steps_by_mode(engine.scheduler),
        )

    def _disaggregated(
        self, trace: Sequence[TraceRequest], on_finished: Callable[[RequestRecord], None]
    ) -> Outcome:
        """Prefill on one GPU and decode on another, each with a stock engine.

        As with vLLM's NixlConnector: when the first GPU has computed the whole prompt, its
        KV cache travels, and the second GPU then computes the prompt's last token anew and
        gives every token of the answer, the first too. Assumed: a link of the profile's
        ``link_bytes_per_s`` that carries one prompt after another, none in part; no
        cost of a proxy. What the prefill GPU does depends on the second in no way: blocks
        that wait to be fetched take no room. A request that is preempted on the second
        GPU gets its KV cache back for nothing.
        """
        first, second = self.engine(), self.engine(prefill_is_free=True)
        records = first.run([replace(r, output_length=1) for r in trace])
        kv_ms = 1e3 * self.shape.kv_bytes_per_token / self.profile.link_bytes_per_s
        order = sorted(range(len(trace)), key=lambda i: records[i].token_ms[0])
        moved, link_free_ms = [], 0.0
        for i in order:
            start_ms = max(link_free_ms, records[i].token_ms[0])
            link_free_ms = start_ms + kv_ms * trace[i].input_length
            moved.append(replace(trace[i], arrival_ms=link_free_ms))
        for i, decoded in zip(order, second.run(moved), strict=True):
            records[i].output_length = trace[i].output_length
            records[i].token_ms = decoded.token_ms
            on_finished(records[i])
        return Outcome(
            records,
            [
                *(replace(i, lane="prefill") for i in first.gpu.intervals),
                *(replace(i, lane="decode") for i in second.gpu.intervals),
            ],
            0,
            2 * self.kv_cache_tokens,
            first.num_preempted + second.num_preempted,
            {},
            num_gpus=2,
        )

    def engine(self, *, prefill_is_free: bool = False) -> SimulatedEngine:
        """A fresh engine with an empty KV cache."""
        options, clock = self.options, SimulatedClock()
        truth = (_FreePrefill if prefill_is_free else GroundTruth)(
            self.roofline,
            options.disturbances,
            self.measured,
            graph_sizes=self.steps.graph_sizes if self.steps else GRAPH_SIZES,
            includes_host=self.steps is not None,
        )
        # With free prompts there are no chunks: whole ones arrive.
        config = self._vllm_config(
            self.kv_cache_tokens if prefill_is_free else options.max_num_batched_tokens
        )
        scheduler: Any
        if self.system.policy is None:
            stock = self.system.stock if options.async_scheduling else Scheduler
            scheduler = scheduler_alone(stock, config, self.shape)
        else:
            limits = PolicyLimits(tbt_slo_ms=options.tbt_slo_ms, max_lookahead=1 << 30)
            forecast = forecaster(
                self.shape, self.profile, self.system, options.model_error, options.seed
            )
            if self.steps or options.measure_at_start:
                found = self._measured_at_start(forecast, truth)
                forecast = forecast.anchored(fit(forecast, found.anchors, found.lanes))
            scheduler = scheduler_alone(
                SimulatedDuetScheduler,
                config,
                self.shape,
                policy=functools.partial(self.system.policy, forecast, limits),
                clock=clock,
                follows=self.system.follows,
                has_lanes=self._has_lanes,
            )
        return SimulatedEngine(
            scheduler,
            SimulatedGpu(truth, options.seed),
            clock,
            costs=options.costs,
            front_end=options.front_end,
            queue_size=QUEUE_SIZE if options.async_scheduling else 1,
            join_after_lookahead=not self.system.event_join,
        )

    def _vllm_config(self, max_num_batched_tokens: int) -> VllmConfig:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(text_model(self._hf_config)))
            config = EngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                max_model_len=self.max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=min(self.options.max_num_seqs, max_num_batched_tokens),
                enable_prefix_caching=self.options.enable_prefix_caching,
                additional_config={"duet": {"mode": "aggregated"}},
            ).create_engine_config()
        if self.shape.latent:  # a CPU's vLLM has neither for latent attention, a GPU's has both
            config.scheduler_config.enable_chunked_prefill = True
            config.cache_config.enable_prefix_caching = self.options.enable_prefix_caching
            config.scheduler_config.max_num_batched_tokens = max_num_batched_tokens
        config.cache_config.num_gpu_blocks = self.kv_cache_tokens // BLOCK_SIZE
        return config

    @property
    def _has_lanes(self) -> bool:
        """Whether there is a profile to say how SMs share the work, and what was measured does
        not speak against splitting."""
        if self.steps is None:
            return True
        refusal = self.steps.found.refusal(PolicyLimits(self.options.tbt_slo_ms).throughput_margin)
        return self.steps.profile is not None and refusal is None

    def _check(self, steps: StepsFile) -> None:
        """
        Raises:
            SimulationError: the options ask for another model or engine than the steps' own.
        """
        options, text, shape = self.options, text_model(self._hf_config), steps.shape
        asked = text.get("hidden_size"), text.get("num_hidden_layers"), text.get("vocab_size")
        if asked != (shape.hidden_size, shape.num_layers, shape.vocab_size):
            raise SimulationError(
                f"{options.gpu} has the steps of {steps.model}, and this model is another one"
            )
        for name, value, own in (
            ("tensor_parallel_size", options.tensor_parallel_size, shape.tensor_parallel_size),
            ("kv_cache_dtype", options.kv_dtype, shape.kv_dtype),
            ("weight_dtype", options.weight_dtype, shape.weight_dtype),
        ):
            if value not in (None, "auto", own):
                raise SimulationError(
                    f"{options.gpu} was measured with {name} {own}, not {value}: calibrate with it"
                )
        if steps.profile is None and options.scheduler == "disaggregated":
            raise SimulationError(
                f"disaggregated needs to know the link between GPUs, and {steps.device} has no"
                " profile"
            )

    def _measured_at_start(self, forecast: Roofline, truth: GroundTruth) -> Measured:
        """What a policy with this forecast measures before the first request: what the file has,
        or steps on the simulated GPU, whole and side by side, chosen and timed as start.py does."""
        if self.steps:
            return self.steps.found
        random, clock_ms = Random(self.options.seed), 0.0

        def timed(ms: float, count: int = STEPS) -> float:
            """The median of noisy times, of which the first does not count."""
            nonlocal clock_ms
            noise = truth.disturbances.noise
            times = [ms * math.exp(random.gauss(0.0, noise)) for _ in range(count)]
            clock_ms += sum(times)
            return median(times[1:])

        def prompt(shape: StepShape) -> tuple[list[int], list[int]]:
            return ([shape.prefill], [shape.prefill_context]) if shape.prefill else ([], [])

        def measure(shape: StepShape) -> Anchor:
            decodes = [shape.decode_context] * shape.decodes
            return Anchor(shape, timed(truth.step_ms(decodes, *prompt(shape))))

        def beside(sms: int, shape: StepShape) -> LaneAnchor:
            works = (
                truth.decode([shape.decode_context] * shape.decodes),
                truth.prefill(*prompt(shape)),
            )
            decode_ms, prefill_ms = truth.pair_ms(*works, sms, truth.num_sms - sms)
            return LaneAnchor(sms, shape, timed(decode_ms), timed(prefill_ms, LAUNCHES))

        seqs, block = self.options.max_num_seqs, BLOCK_SIZE
        limits = StepLimits(
            max_seqs=seqs,
            max_tokens=self.options.max_num_batched_tokens,
            max_context=self.max_model_len,
            cache_tokens=self.kv_cache_tokens - block * (seqs + 2),
        )
        shapes = shapes_to_measure(limits)
        whole = list(within(shapes, forecast, BUDGET_S, measure, lambda: clock_ms / 1e3))
        decodes, prefill = lane_shapes(limits, seqs)
        pairs = [shape._replace(prefill=prefill.prefill) for shape in decodes if prefill]
        lanes = decode_lanes(forecast.profile, None) if pairs else ()  # those it may split by
        return Measured(whole, [beside(sms, pair) for sms in lanes for pair in pairs])

    def _measured(self) -> tuple[MeasuredSteps | None, str]:
        """The measured truth where there is one, and in words what the truth is."""
        if own := self.steps:
            return None, (
                f"{len(own.found.anchors)} steps measured on {own.device} with vLLM"
                f" {own.versions['vllm']}, others by the roofline's ratio to them"
            )
        if self.options.truth == "roofline":
            return None, "the roofline"
        try:
            from vllm_duet.sim.measured import MeasuredSteps, NotMeasuredError
        except ImportError as error:  # without vllm-duet[measured] there is no pandas
            return None, f"the roofline: {error}"
        try:
            steps = MeasuredSteps(
                self.shape,
                self.options.gpu,
                expert_parallel=self.options.enable_expert_parallel,
                moe_backend=self.options.moe_backend,
            )
        except NotMeasuredError as error:
            return None, f"the roofline: {error}"
        return steps, steps.source

    def _kv_cache_tokens(self) -> int:
        """Tokens of KV cache that vLLM would find room for: what is left of its share of
        the memory beside weights, activations of the largest step, logits, and the rest."""
        if self.steps:
            return self.steps.kv_cache_tokens // BLOCK_SIZE * BLOCK_SIZE
        shape, options = self.shape, self.options
        memory = options.gpu_memory_utilization * self.profile.memory_bytes
        width = 4 * shape.hidden_size + 3 * shape.local_width(shape.intermediate_size)
        activations = options.max_num_batched_tokens * width * shape.activation_bytes
        # Logits in 16 and in 32 bits.
        logits = 6 * min(options.max_num_seqs, options.max_num_batched_tokens) * shape.vocab_size
        free = memory - shape.weight_bytes - activations - logits - FIXED_BYTES
        tokens = int(free // shape.kv_bytes_per_token) // BLOCK_SIZE * BLOCK_SIZE
        if tokens <= 0:
            raise SimulationError(
                f"{shape.architecture} does not fit {self.profile.name}:"
                f" {shape.weight_bytes / 1e9:.1f} GB of weights,"
                f" {(activations + logits + FIXED_BYTES) / 1e9:.1f} GB for activations, logits and"
                f" CUDA, and vLLM takes {memory / 1e9:.1f} GB of the GPU's memory"
            )
        return tokens


class _FreePrefill(GroundTruth):
    """A GPU whose prompts arrive with the KV cache of all but their last token."""

    def step_ms(
        self,
        decode_context_lens: Sequence[int],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
    ) -> float:
        arrived = [q + c - 1 for q, c in zip(query_lens, context_lens, strict=True)]
        return super().step_ms([*decode_context_lens, *arrived], [], [])
