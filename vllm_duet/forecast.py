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
    """The roofline to forecast steps with.

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
    model = vllm_config.model_config
    try:
        shape = ModelShape.from_hf_config(
            model.hf_config.to_dict(),
            kv_dtype=vllm_config.cache_config.cache_dtype,
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
        )
    except ValueError as error:
        raise NoForecastError(str(error)) from error
    return Roofline(shape, profile)
