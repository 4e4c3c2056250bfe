# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-duet doctor`` finds out: which modes are possible here, and why not.

Nothing here imports torch or vLLM, and pynvml need not be there: a machine where
they are broken, or absent, is one the doctor must be able to look at.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_duet.lanes.green_context import GREEN_CONTEXT_CUDA
from vllm_duet.plan import Mode
from vllm_duet.roofline import (
    GpuProfile,
    ModelShape,
    ProfileError,
    UnsupportedArchitectureError,
)
from vllm_duet.support import LIMITS, Limit
from vllm_duet.version import __version__, check_vllm_version, installed_vllm

GPU_MEMORY_UTILIZATION = 0.92
"""The part of the GPU's memory that vLLM takes, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as NVIDIA's management library, or the CUDA driver, describes it."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    num_sms: int | None


@dataclass(frozen=True)
class Machine:
    """What is installed here, and on what. A version is ``None`` where there is none."""

    vllm: tuple[str, str] | None
    vllm_problem: str | None
    torch: str | None
    cuda_bindings: str | None
    driver: str | None
    driver_cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]

    @classmethod
    def inspect(cls) -> Machine:
        """Look at this machine."""
        driver, driver_cuda, gpus = _nvidia()
        return cls(
            vllm=installed_vllm(),
            vllm_problem=check_vllm_version(),
            torch=_version("torch"),
            cuda_bindings=_version("cuda-bindings"),
            driver=driver,
            driver_cuda=driver_cuda,
            gpus=gpus,
        )

    @property
    def versions(self) -> dict[str, str | None]:
        """The versions to put into a bug report."""
        return {
            "Python": platform.python_version(),
            "vllm-duet": __version__,
            "vLLM": " ".join(self.vllm) if self.vllm else None,
            "torch": self.torch,
            "cuda-bindings": self.cuda_bindings,
            "NVIDIA driver": self.driver,
            "driver's CUDA": ".".join(map(str, self.driver_cuda)) if self.driver_cuda else None,
        }


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no profile, or no shape, in a sentence. SPLIT needs both; ``forbids_caps``
    where CAPPED cannot do with the steps that the start measures either."""

    sentence: str
    forbids_caps: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """The modes that ``machine`` can run, for a model's shape if one was given.

    ``profile`` and ``shape`` are ``None`` where ``profile_problem`` and
    ``shape_problem`` say why, or where none was asked for. ``model_obstacles``
    are what the model's config says against SPLIT, beyond its shape.
    """

    machine: Machine
    profile: GpuProfile | None = None
    profile_problem: Problem | None = None
    shape: ModelShape | None = None
    shape_problem: Problem | None = None
    model_obstacles: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, machine: Machine, model: str | Path | None = None, gpu_profile: str | None = None
    ) -> Diagnosis:
        """Diagnose ``machine`` for the model whose config.json, or its folder, is given.

        ``gpu_profile`` names a profile in place of the one the GPU is known by.

        Raises:
            OSError: there is no such config.
        """
        profile, profile_problem = _profile(machine, gpu_profile)
        if model is None:
            return cls(machine, profile, profile_problem)
        shape, shape_problem, obstacles = _model(Path(model))
        return cls(machine, profile, profile_problem, shape, shape_problem, obstacles)

    @property
    def kv_cache_tokens(self) -> int | None:
        """Tokens whose KV fits beside the weights on the first GPU, or ``None`` if not known.

        Negative where the weights alone are too large. Activations and CUDA graphs,
        some GB, are left out.
        """
        if self.shape is None or not self.machine.gpus:
            return None
        room = GPU_MEMORY_UTILIZATION * self.machine.gpus[0].memory_bytes - self.shape.weight_bytes
        return int(room // self.shape.kv_bytes_per_token)

    @cached_property
    def obstacles(self) -> dict[Mode, list[str]]:
        """For each mode what stands in its way; nothing, where it is possible."""
        machine = self.machine
        engine = [machine.vllm_problem] if machine.vllm_problem else []
        if self.shape and self.kv_cache_tokens is not None and self.kv_cache_tokens <= 0:
            engine.append(
                f"The model does not fit: {self.shape.weight_bytes / 1e9:.1f} GB of weights, and"
                f" vLLM takes {GPU_MEMORY_UTILIZATION:.0%} of the GPU's"
                f" {machine.gpus[0].memory_bytes / 1e9:.1f} GB."
            )
        problems = [p for p in (self.profile_problem, self.shape_problem) if p is not None]
        lanes = [*self.model_obstacles, *_lane_obstacles(machine)]
        return {
            Mode.AGGREGATED: engine,
            Mode.CAPPED: engine + [p.sentence for p in problems if p.forbids_caps],
            Mode.SPLIT: engine + [p.sentence for p in problems] + lanes,
        }

    @property
    def can_split(self) -> bool:
        """Whether steps can be split on this machine, for this model."""
        return not self.obstacles[Mode.SPLIT]


def _lane_obstacles(machine: Machine) -> list[str]:
    """What keeps this machine from running two lanes on one GPU."""
    # An option given in the environment counts here as it does for a server.
    engine = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"), additional_config={}
    )
    obstacles = [
        _obstacle(limit)
        for limit in LIMITS
        if limit.about == "lanes" and limit.applies(engine, None)
    ]
    if not machine.gpus:
        obstacles.append("There is no NVIDIA GPU, or no driver for it.")
    elif machine.driver_cuda is None or machine.driver_cuda < GREEN_CONTEXT_CUDA:
        needed = ".".join(map(str, GREEN_CONTEXT_CUDA))
        obstacles.append(
            f"NVIDIA driver {machine.driver} is too old for green contexts and streams in them,"
            f" which came with CUDA 12.4 and {needed}."
        )
    if machine.cuda_bindings is None:
        obstacles.append("cuda.bindings is not installed: pip install 'vllm-duet[cuda]'.")
    if machine.torch is None:
        obstacles.append("torch is not installed.")
    elif machine.torch.endswith("+cpu"):
        obstacles.append(f"torch {machine.torch} is the CPU build.")
    return obstacles


def _profile(machine: Machine, name: str | None) -> tuple[GpuProfile | None, Problem | None]:
    try:
        if name is not None:
            return GpuProfile.load(name), None
        if not machine.gpus:
            return None, Problem("No GPU: there is no profile to say how its SMs share the work.")
        profile = GpuProfile.detect(machine.gpus[0].name)
    except ProfileError as error:
        # A server does not start with it.
        return None, Problem(f"The GPU profile cannot be used: {error}.", forbids_caps=True)
    if profile is None:
        return None, Problem(
            f"No profile is shipped for {machine.gpus[0].name!r}: name one with the option"
            f" gpu_profile ({', '.join(GpuProfile.names())}, or a YAML file)."
        )
    num_sms = machine.gpus[0].num_sms
    if num_sms is not None and num_sms != profile.num_sms:
        return None, Problem(
            f"Profile {profile.name} is of {profile.num_sms} SMs; this GPU has {num_sms}."
        )
    return profile, None


def _model(path: Path) -> tuple[ModelShape | None, Problem | None, tuple[str, ...]]:
    """The shape, or why there is none, and what else in the config stands against SPLIT."""
    try:
        config = json.loads((path / "config.json" if path.is_dir() else path).read_text())
        if not isinstance(config, dict):
            raise ValueError("its config is not a mapping")
        obstacles = _model_obstacles(config)
        shape = ModelShape.from_hf_config(config)
        return shape, None, _model_obstacles(config, shape)
    except UnsupportedArchitectureError as error:
        # Its loaded layers say what it is, where vLLM streams from it and they are attention.
        forbids_caps = _keeps_a_state(config) or not _generates(config)
        problem = Problem(f"The model's steps cannot be forecast: {error}.", forbids_caps)
        return None, problem, obstacles
    except ValueError as error:
        return None, Problem(f"The model's config cannot be used: {error}.", forbids_caps=True), ()


def _keeps_a_state(config: Mapping[str, Any]) -> bool:
    """Whether some layers keep a state instead of keys and values, by what options are called."""
    text = json.dumps(config).lower()
    names = "mamba", "rwkv", "ssm_", "state_size", "linear_attention", "linear_conv"
    return any(name in text for name in names)


def _generates(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or ()
    return any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)


def _model_obstacles(config: Mapping[str, Any], shape: ModelShape | None = None) -> tuple[str, ...]:
    # What a Hugging Face config shows of a ModelConfig. The rest (pooling, diffusion)
    # goes with architectures that have no ModelShape.
    model_config = SimpleNamespace(
        supports_multimodal_inputs="vision_config" in config or "audio_config" in config,
        uses_mrope="mrope_section" in (config.get("rope_scaling") or {}),
        is_encoder_decoder=bool(config.get("is_encoder_decoder")),
        runner_type="generate",
        is_diffusion=False,
        is_hybrid=False,
    )
    vllm_config = SimpleNamespace(model_config=model_config)
    kv_cache_config = SimpleNamespace(
        has_mamba_layers=shape is not None and shape.linear_attention is not None
    )
    return tuple(
        _obstacle(limit)
        for limit in LIMITS
        if limit.about == "model" and limit.applies(vllm_config, kv_cache_config)
    )


def _obstacle(limit: Limit) -> str:
    return f"{limit.feature[0].upper()}{limit.feature[1:]}: {limit.sentence}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvidia() -> tuple[str | None, tuple[int, int] | None, tuple[Gpu, ...]]:
    """Driver version, the newest CUDA version it runs, and the GPUs."""
    try:
        import pynvml
    except ImportError:
        return None, None, ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None, ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 12040 is 12.4
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        gpus = tuple(_gpu(pynvml, handle) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
    return driver, (cuda // 1000, cuda % 1000 // 10), gpus


def _gpu(pynvml: Any, handle: Any) -> Gpu:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=str(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=(major, minor),
        num_sms=_num_sms(pynvml.nvmlDeviceGetPciInfo(handle).busId),
    )


def _num_sms(pci_bus_id: str) -> int | None:
    """The GPU's SM count, which only the CUDA driver tells; ``None`` without cuda.bindings."""
    try:
        from cuda.bindings import driver

        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        driver.cuInit(0)
        error, device = driver.cuDeviceGetByPCIBusId(pci_bus_id.encode())
        if error:
            return None  # as when CUDA_VISIBLE_DEVICES hides it
        error, count = driver.cuDeviceGetAttribute(attribute, device)
        return None if error else int(count)
    except (ImportError, RuntimeError):
        return None
