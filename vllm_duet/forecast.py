# SPDX-License-Identifier: Apache-2.0
"""The roofline of the model and GPU that a VllmConfig describes.

Works on any object with the fields of ``vllm.config.VllmConfig``.
"""

from __future__ import annotations

from typing import Any

from vllm_duet.config import DuetConfig
from vllm_duet.roofline import GpuProfile, ModelShape, Roofline

FORCED_MODE_PROFILE = "h100-sxm"
"""The GPU whose SM groups a forced mode names, where none is known."""


FLOPS_PER_BYTE = {"cpu": 20.0, "cuda": 250.0}
"""Of a device that there is no profile for: about what CPUs and GPUs of today have."""


def unknown_device(device_type: str) -> GpuProfile:
    """Where there is no profile: rough ratios of such a device, to multiply measured steps by.

    It has one SM, so nothing is ever split on it.
    """
    bytes_per_s = 5e10
    flops = bytes_per_s * FLOPS_PER_BYTE.get(device_type, FLOPS_PER_BYTE["cuda"])
    dtypes = "float32", "bfloat16", "float16", "fp8", "int8", "fp4"
    return GpuProfile(
        name=f"unknown {device_type}",
        device_names=(),
        measured="nothing",
        num_sms=1,
        sm_granularity=1,
        min_sms=1,
        memory_bytes=1e9,
        peak_flops=dict.fromkeys(dtypes, flops),
        hbm_bytes_per_s=bytes_per_s,
        sm_bytes_per_s=bytes_per_s,
        link_bytes_per_s=bytes_per_s / 5,
        gemm_fraction=1.0,
        attention_fraction=1.0,
        hbm_fraction=1.0,
        attention_hbm_fraction=1.0,
        unoverlapped=0.1,
        tile_rows=16,
        tile_columns=16,
        wave_fraction=0.0,
        expert_tile_rows=1,
        row_blocks_per_sm=1,
        row_bytes_per_s=bytes_per_s,
        row_reduction_us=0.0,
        gemm_overhead_us=5.0,
        attention_overhead_us=5.0,
        rowwise_overhead_us=5.0,
        link_latency_us=10.0,
        launch_gap_us=0.0,
        step_overhead_us=1000.0,
        sources={},
    )


class NoForecastError(ValueError):
    """This model or GPU cannot be forecast; the message says which and why."""


def profile_for(config: DuetConfig, device_name: str) -> GpuProfile | None:
    """The profile named in ``config``, or else the shipped one of the GPU, if there is one.

    Raises:
        ValueError: the profile named in ``config`` does not exist or is wrong.
    """
    if config.gpu_profile is not None:
        return GpuProfile.load(config.gpu_profile)
    return GpuProfile.detect(device_name)


def lane_profile(config: DuetConfig, device_name: str) -> GpuProfile:
    """The profile whose SM groups the lanes are made of, in the policy and in the runner.

    Where none is known, which only a forced mode can do with, ``FORCED_MODE_PROFILE``.

    Raises:
        ValueError: the profile named in ``config`` does not exist or is wrong.
    """
    return profile_for(config, device_name) or GpuProfile.load(FORCED_MODE_PROFILE)


def roofline_for(vllm_config: Any, config: DuetConfig, device_name: str) -> Roofline:
    """The roofline to forecast steps with, where none were measured at start.

    ``device_name`` is the GPU's name as its driver reports it; a profile named
    in ``config`` goes before it.

    Raises:
        NoForecastError: no profile for this GPU, or an architecture whose shape
            is not known. A wrong shape is never guessed.
        ValueError: the profile named in ``config`` does not exist or is wrong.
    """
    if (profile := profile_for(config, device_name)) is None:
        raise NoForecastError(
            f"there is no GPU profile for {device_name!r}; name one with the option gpu_profile, "
            f"out of {', '.join(GpuProfile.names())}, or give the path of your own"
        )
    return Roofline(model_shape(vllm_config), profile)


def model_shape(vllm_config: Any) -> ModelShape:
    """The shape of the model, by its architecture.

    Raises:
        NoForecastError: the shape of such an architecture is not known.
    """
    try:
        return ModelShape.from_hf_config(
            vllm_config.model_config.hf_config.to_dict(),
            kv_dtype=vllm_config.cache_config.cache_dtype,
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
        )
    except ValueError as error:
        raise NoForecastError(str(error)) from error
