# SPDX-License-Identifier: Apache-2.0
"""What SPLIT does not support yet, and where even a CAPPED step would do harm.

One list, LIMITS, for the scheduler and the worker, which ask it about their own engine, and
for ``vllm-duet doctor``, which prints it. The checks work on any object with the
fields of ``vllm.config.VllmConfig``; this file imports neither vLLM nor torch.

What only the worker can find out, such as what the driver allows, it leaves here as a
LanesReport, where the scheduler of the same process, which is made later, finds it; and so does
start.py with the roofline that fits the steps it has measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vllm_duet.config import DuetConfig
from vllm_duet.forecast import NoForecastError, roofline_for
from vllm_duet.roofline import Roofline

MAX_GRAPHS = 24
"""CUDA graphs of a decode lane, each of another batch size. vLLM has about 50; a decode step
takes its time to read weights and KV cache, and rows of padding have neither."""

_rooflines: dict[str, Roofline] = {}
_reports: dict[str, LanesReport] = {}
"""By the ``instance_id`` of a VllmConfig. Not on the VllmConfig itself: vLLM copies it, and raises
where it has an attribute that is no field."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that keeps an engine's steps whole.

    ``feature`` names it, as a clause; ``sentence`` says what SPLIT needs instead.
    ``about`` is what decides it: how the server is started, the model, or vllm-duet's own
    options of the lanes. ``applies`` takes a VllmConfig and a KVCacheConfig or None.
    ``caps_too``: not even CAPPED then, since prompts cannot be cut, or ranks have to take the
    same step.
    ``unmeasured``: steps that the start makes by hand would lack what real ones have.
    """

    feature: str
    about: Literal["options", "model", "lanes"]
    sentence: str
    applies: Callable[[Any, Any], bool]
    caps_too: bool = False
    unmeasured: bool = False


LIMITS = (
    Limit(
        "Model Runner V2 is off",
        "options",
        "SPLIT runs on Model Runner V2: leave VLLM_USE_V2_MODEL_RUNNER unset or 1.",
        lambda vllm, kv: not vllm.use_v2_model_runner,
    ),
    Limit(
        "another worker class than vLLM's own is set",
        "options",
        "SPLIT brings its own worker: leave --worker-cls at auto.",
        lambda vllm, kv: not str(vllm.parallel_config.worker_cls).startswith("vllm_duet."),
    ),
    Limit(
        "chunked prefill is off",
        "options",
        "SPLIT and CAPPED cut prompts: leave chunked prefill on.",
        lambda vllm, kv: not vllm.scheduler_config.enable_chunked_prefill,
        caps_too=True,
    ),
    Limit(
        "tensor parallelism",
        "options",
        "SPLIT runs on one GPU: --tensor-parallel-size 1.",
        lambda vllm, kv: vllm.parallel_config.tensor_parallel_size > 1,
    ),
    Limit(
        "pipeline parallelism",
        "options",
        "SPLIT runs on one GPU: --pipeline-parallel-size 1.",
        lambda vllm, kv: vllm.parallel_config.pipeline_parallel_size > 1,
        caps_too=True,
    ),
    Limit(
        "data parallelism",
        "options",
        "SPLIT runs on one GPU: the experts' ranks step together with --data-parallel-size above"
        " 1; dense models are split, each rank by itself.",
        lambda vllm, kv: vllm.parallel_config.data_parallel_size > 1 and vllm.model_config.is_moe,
        caps_too=True,
    ),
    Limit(
        "context parallelism",
        "options",
        "SPLIT runs on one GPU: decode and prefill context parallel sizes of 1.",
        lambda vllm, kv: (
            vllm.parallel_config.decode_context_parallel_size > 1
            or vllm.parallel_config.prefill_context_parallel_size > 1
        ),
    ),
    Limit(
        "dual batch overlap",
        "options",
        "SPLIT overlaps two lanes itself: no --enable-dbo.",
        lambda vllm, kv: vllm.parallel_config.enable_dbo,
    ),
    Limit(
        "expert load balancing",
        "options",
        "SPLIT needs experts that stay where they are: no --enable-eplb.",
        lambda vllm, kv: vllm.parallel_config.enable_eplb,
    ),
    Limit(
        "speculative decoding",
        "options",
        "SPLIT decodes one token a step: no --speculative-config.",
        lambda vllm, kv: vllm.speculative_config is not None,
        unmeasured=True,
    ),
    Limit(
        "LoRA",
        "options",
        "SPLIT serves the base model alone: no --enable-lora.",
        lambda vllm, kv: vllm.lora_config is not None,
        unmeasured=True,
    ),
    Limit(
        "a KV connector",
        "options",
        "SPLIT keeps the KV cache on the GPU: no --kv-transfer-config.",
        lambda vllm, kv: vllm.kv_transfer_config is not None,
        unmeasured=True,
    ),
    Limit(
        "an encoder cache connector",
        "options",
        "SPLIT serves text: no --ec-transfer-config.",
        lambda vllm, kv: vllm.ec_transfer_config is not None,
        unmeasured=True,
    ),
    Limit(
        "auxiliary outputs",
        "options",
        "SPLIT returns tokens and logprobs only.",
        lambda vllm, kv: vllm.aux_output_config.enabled,
    ),
    Limit(
        "watermarking",
        "options",
        "SPLIT samples without a watermark.",
        lambda vllm, kv: vllm.watermark_config is not None,
    ),
    Limit(
        "KV-sharing fast prefill",
        "options",
        "SPLIT computes every layer of a prompt: no --kv-sharing-fast-prefill.",
        lambda vllm, kv: vllm.cache_config.kv_sharing_fast_prefill,
    ),
    Limit(
        "weights offloaded by prefetch",
        "options",
        "SPLIT runs two forward passes at once, and prefetched weights have one buffer: no"
        " --offload-group-size.",
        lambda vllm, kv: vllm.offload_config.prefetch.offload_group_size > 0,
    ),
    Limit(
        "prompt embeddings",
        "options",
        "SPLIT takes prompts as tokens: no --enable-prompt-embeds.",
        lambda vllm, kv: vllm.model_config.enable_prompt_embeds,
    ),
    Limit(
        "a multimodal model",
        "model",
        "SPLIT serves text models.",
        lambda vllm, kv: (
            vllm.model_config.supports_multimodal_inputs or vllm.model_config.uses_mrope
        ),
    ),
    Limit(
        "an encoder-decoder model",
        "model",
        "SPLIT serves decoder-only models.",
        lambda vllm, kv: vllm.model_config.is_encoder_decoder,
        caps_too=True,
    ),
    Limit(
        "a pooling model",
        "model",
        "SPLIT serves models that generate.",
        lambda vllm, kv: vllm.model_config.runner_type == "pooling",
        caps_too=True,
    ),
    Limit(
        "a diffusion model",
        "model",
        "SPLIT serves models that generate one token at a time.",
        lambda vllm, kv: vllm.model_config.is_diffusion,
        caps_too=True,
    ),
    Limit(
        "state-space layers",
        "model",
        "SPLIT needs attention in every layer.",
        lambda vllm, kv: vllm.model_config.is_hybrid or (kv is not None and kv.has_mamba_layers),
    ),
    Limit(
        "no full CUDA graphs of decode steps",
        "options",
        "SPLIT on a GPU decodes by full CUDA graphs: no --enforce-eager, and a cudagraph_mode"
        " that has them.",
        lambda vllm, kv: most_decodes_beside(vllm) == 0,
    ),
    Limit(
        "a worker in a process of its own",
        "options",
        "SPLIT on a GPU needs the worker in the engine core's process: leave"
        " --distributed-executor-backend unset.",
        lambda vllm, kv: (
            _is_gpu(vllm) and vllm.parallel_config.distributed_executor_backend not in (None, "uni")
        ),
    ),
    Limit(
        "the CUDA lanes are switched off",
        "lanes",
        "SPLIT on a GPU needs the option cuda_lanes at auto or true.",
        lambda vllm, kv: _is_gpu(vllm) and _cuda_lanes(vllm) == "false",
    ),
    Limit(
        "the CUDA lanes are not proved at start",
        "lanes",
        "SPLIT on a GPU proves its lanes first: leave measure_at_start at auto, or force them with"
        " cuda_lanes true.",
        lambda vllm, kv: _is_gpu(vllm) and _cuda_lanes(vllm) == "auto" and not _is_measured(vllm),
    ),
)


def _is_gpu(vllm_config: Any) -> bool:
    return bool(vllm_config.device_config.device_type != "cpu")


def _cuda_lanes(vllm_config: Any) -> str:
    return DuetConfig.load(vllm_config.additional_config).cuda_lanes


def _is_measured(vllm_config: Any) -> bool:
    """Whether the options let steps be measured when an engine starts."""
    config = DuetConfig.load(vllm_config.additional_config)
    return config.mode == "auto" and config.measure_at_start != "never"  # other modes need none


def lane_sizes(vllm_config: Any) -> list[int]:
    """The batch sizes that a decode lane has CUDA graphs for, ascending; at most MAX_GRAPHS.

    Those of vLLM's capture sizes that ``max_num_seqs`` requests can fill, by a constant ratio
    as far as there are any, so that padding is the same share of each; and ``max_num_seqs``
    itself, where vLLM's sizes reach as far.
    """
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or []
    most = vllm_config.scheduler_config.max_num_seqs
    known = {size for size in sizes if size <= most}
    if any(size > most for size in sizes):
        known.add(most)
    if not known:
        return []
    ascending = np.array(sorted(known))
    wanted = np.geomspace(ascending[0], ascending[-1], MAX_GRAPHS)
    return sorted(set(ascending[np.searchsorted(ascending, wanted.round())].tolist()))


def most_decodes_beside(vllm_config: Any) -> int:
    """How many requests can decode in a step beside a prefill.

    On a GPU, as many as a full CUDA graph is captured for: without one the step needs the
    forward context, one global, while the prefill may hold it. On a CPU lanes take turns.
    """
    if not _is_gpu(vllm_config):
        return vllm_config.scheduler_config.max_num_seqs  # type: ignore[no-any-return]
    graphs = vllm_config.compilation_config
    if vllm_config.model_config.enforce_eager or not graphs.cudagraph_mode:
        return 0
    if not graphs.cudagraph_mode.decode_mode().has_full_cudagraphs():
        return 0
    return max(lane_sizes(vllm_config), default=0)


def split_blockers(vllm_config: Any, device_name: str, kv_cache_config: Any = None) -> list[str]:
    """Why steps of this engine cannot be split, a short clause each; empty if they can.

    ``device_name`` is the GPU's name as its driver reports it.

    Raises:
        ValueError: the GPU profile named by the options is wrong.
    """
    blockers = [limit.feature for limit in LIMITS if limit.applies(vllm_config, kv_cache_config)]
    config = DuetConfig.load(vllm_config.additional_config)
    if config.mode in ("aggregated", "capped"):
        blockers.append(f"mode {config.mode}")
    elif config.mode == "auto" and not blockers:
        try:
            roofline_for(vllm_config, config, device_name)
        except NoForecastError as reason:
            blockers.append(str(reason))
    return blockers


def deciding_blockers(vllm_config: Any) -> list[str]:
    """Why every step of this engine is left to vLLM, a short clause each."""
    return [
        limit.feature for limit in LIMITS if limit.caps_too and limit.applies(vllm_config, None)
    ]


def measuring_blockers(vllm_config: Any) -> list[str]:
    """Why no steps are measured when this engine starts, a short clause each."""
    if not _is_measured(vllm_config):
        config = DuetConfig.load(vllm_config.additional_config)
        return [f"mode {config.mode}, measure_at_start {config.measure_at_start}"]
    return [
        limit.feature
        for limit in LIMITS
        if (limit.caps_too or limit.unmeasured) and limit.applies(vllm_config, None)
    ]


@dataclass(frozen=True, slots=True)
class LanesReport:
    """What became of a worker's lanes when it started.

    ``most_decodes`` is how many requests the largest decode graph of every lane takes.
    ``obstacle`` is a clause that says why there are no lanes, or ``None``. ``decode_sms``: only
    these decode lanes are to be used; ``None``, all. ``lost_blocks``: a lane may still write to
    the first so many of the KV cache, so they are nobody's.
    """

    most_decodes: int = 0
    obstacle: str | None = None
    decode_sms: tuple[int, ...] | None = None
    lost_blocks: int = 0


def report_lanes(vllm_config: Any, report: LanesReport) -> None:
    """Leave ``report`` for the scheduler of the same engine, in the same process."""
    _reports[vllm_config.instance_id] = report


def reported_lanes(vllm_config: Any) -> LanesReport:
    """What the worker has reported. Lanes without a GPU have nothing to report."""
    if not _is_gpu(vllm_config):
        return LanesReport(most_decodes_beside(vllm_config))
    nothing = LanesReport(obstacle="the worker has made no lanes")
    return _reports.get(vllm_config.instance_id, nothing)


def report_roofline(vllm_config: Any, roofline: Roofline) -> None:
    """Leave the roofline that fits what was measured at start for the scheduler of the same
    process."""
    _rooflines[vllm_config.instance_id] = roofline


def reported_roofline(vllm_config: Any) -> Roofline | None:
    """That roofline, where steps were measured."""
    return _rooflines.get(vllm_config.instance_id)
