# SPDX-License-Identifier: Apache-2.0
"""DuetConfig: every option of vllm-duet, and where its value comes from.

From strongest to weakest:

1. ``--additional-config '{"duet": {"tbt_slo_ms": 50}}'``
2. the environment: ``VLLM_DUET_TBT_SLO_MS=50``, so for every option; a list is
   written ``16,24``, and an empty variable counts as not set
3. a YAML file of options, named by ``config_file`` in the duet section or by
   ``VLLM_DUET_CONFIG``
4. the default

A value that is wrong is an error in whichever place it stands, overruled or not.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
)

ENV_PREFIX = "VLLM_DUET_"
FILE_VARIABLE = "VLLM_DUET_CONFIG"
CHECK_VARIABLE = "VLLM_DUET_CHECK"
OTHER_VARIABLES = {FILE_VARIABLE, CHECK_VARIABLE}
"""Variables that carry the prefix and are not options."""

_ALLOWED = {
    "tuple_type": "be a list",
    "too_short": "not be empty",
    "string_too_short": "not be empty",
}
"""Where pydantic's words for what is allowed would not help, by its error type."""


class DuetConfigError(ValueError):
    """An option of vllm-duet is wrong; the message names it and what is allowed."""


class DuetConfig(BaseModel):
    """The options of vllm-duet; each field's description is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tbt_slo_ms: float = Field(
        100.0,
        gt=0,
        allow_inf_nan=False,
        description="The bound on the time between two tokens of a request, in milliseconds.",
    )
    mode: Literal["auto", "aggregated", "capped", "split", "random"] = Field(
        "auto",
        description="auto decides each step by forecast; aggregated, capped and split use that "
        "mode wherever they can; random draws one at every step, for tests.",
    )
    seed: int = Field(0, description="The seed of mode random.")
    decode_sms: tuple[PositiveInt, ...] | None = Field(
        None,
        min_length=1,
        description="The SM counts the decode lane may be given; each costs a set of CUDA "
        "graphs. Not set: at most three, from the GPU profile.",
    )
    max_lookahead: int = Field(
        8,
        ge=1,
        description="The most decode steps queued ahead while a prefill is launched; k in the "
        "DuetServe paper.",
    )
    gpu_profile: str | None = Field(
        None,
        min_length=1,
        description="The GPU profile: a name, or the path of a YAML file. Not set: found by the "
        "name of the GPU.",
    )
    split_for_throughput: bool = Field(
        True,
        description="Split also when the bound is safe and splitting is forecast to be faster; "
        "false splits only when the bound is threatened, as the paper does.",
    )
    throughput_margin: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="How much faster a split must be forecast when the bound is safe; 0.05 is 5 %.",
    )
    correction: bool = Field(
        True, description="Learn from measured steps by how much the forecast is off."
    )
    measure_at_start: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Run some steps before the first request, and forecast by their times; auto "
        "takes the times of an earlier start where there are any.",
    )
    cuda_lanes: Literal["auto", "true", "false"] = Field(
        "auto",
        description="Split steps on a GPU, by CUDA green contexts: auto where the start has shown "
        "that tokens stay the same and that it is faster, true even so, false never.",
    )
    prefill_launch: Literal["thread", "slices"] = Field(
        "thread",
        description="How a GPU is given a prefill's kernels: from a second thread at any time, or "
        "from that thread but not while a decode step is launched.",
    )
    serial_timing: Literal["early", "late", "threaded", "interleaved"] = Field(
        "late",
        description="When the serial lane runs a prefill: at its launch, at its join, on a "
        "second thread in between, or a layer after each decode step.",
    )
    serial_hold_steps: int = Field(
        2,
        ge=0,
        description="For how many decode steps the serial lane holds a prefill's result back.",
    )

    @field_validator("cuda_lanes", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("decode_sms", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(value.strip("[] ").split(","))
        return tuple(value) if isinstance(value, list) else value

    @classmethod
    def load(
        cls, additional_config: object = None, env: Mapping[str, str] | None = None
    ) -> DuetConfig:
        """The configuration in force.

        ``additional_config`` is vLLM's ``VllmConfig.additional_config``, of which
        only the key ``duet`` is read; ``env`` stands in for ``os.environ``.

        Raises:
            DuetConfigError: an unknown option, a wrong type, an impossible value,
                or a file that cannot be read.
        """
        env = os.environ if env is None else env
        section = _section(additional_config)
        path = section.pop("config_file", None) or env.get(FILE_VARIABLE)
        sources = (
            _Source(str(path), _file(path) if path else {}),
            _Source("the environment", _variables(env), is_text=True),
            _Source("the duet section of --additional-config", section),
        )
        values: dict[str, Any] = {}
        for source in sources:
            values |= source.validated().model_dump(exclude_unset=True)
        return cls(**values)


@dataclass(frozen=True, slots=True)
class _Source:
    """The options given in one place; ``is_text`` where every value is a string."""

    place: str
    options: dict[str, Any]
    is_text: bool = False

    def validated(self) -> DuetConfig:
        for name in self.options:
            if name not in DuetConfig.model_fields:
                raise DuetConfigError(self._unknown(str(name)))
        try:
            if self.is_text:
                return DuetConfig.model_validate_strings(self.options)
            return DuetConfig.model_validate(self.options, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
        option, *items = problem["loc"]
        key = self._key(str(option)) + "".join(f"[{item}]" for item in items)
        allowed = _ALLOWED.get(problem["type"]) or problem["msg"].removeprefix("Input should ")
        raise DuetConfigError(
            f"vllm-duet option {key} in {self.place} should {allowed}, not {problem['input']!r}."
        )

    def _unknown(self, name: str) -> str:
        known = sorted(DuetConfig.model_fields)
        near = difflib.get_close_matches(name, known, 1)
        guess = f" (did you mean {self._key(near[0])}?)" if near else ""
        return (
            f"Unknown vllm-duet option {self._key(name)} in {self.place}{guess};"
            f" the options are {', '.join(map(self._key, known))}."
        )

    def _key(self, name: str) -> str:
        return ENV_PREFIX + name.upper() if self.is_text else name


def _section(additional_config: object) -> dict[str, Any]:
    if not isinstance(additional_config, Mapping):
        return {}
    section = additional_config.get("duet", {})
    if not isinstance(section, Mapping):
        raise DuetConfigError(
            "The duet section of --additional-config should be a mapping of vllm-duet options,"
            f" not {section!r}."
        )
    return dict(section)


def _variables(env: Mapping[str, str]) -> dict[str, Any]:
    return {
        variable.removeprefix(ENV_PREFIX).lower(): text
        for variable, text in env.items()
        if variable.startswith(ENV_PREFIX) and variable not in OTHER_VARIABLES and text
    }


def _file(path: object) -> dict[str, Any]:
    try:
        options = yaml.safe_load(Path(str(path)).expanduser().read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DuetConfigError(f"vllm-duet options cannot be read from {path}: {reason}.") from None
    if not isinstance(options, dict | None):
        raise DuetConfigError(
            f"{path} should hold a mapping of vllm-duet options, not {options!r}."
        )
    return options or {}
