# SPDX-License-Identifier: Apache-2.0
"""Steps that the engine runs before its first request: what comes of them, and that nothing
else does. Each engine starts and serves before the next one starts, as a server would."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import pytest
import transformers
from engine.harness import ROOMY, Arrival, Engine, make_llm
from engine.workloads import tokens
from tiny_families import qwen3_next
from tiny_model import SHAPE
from vllm import SamplingParams, envs
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_duet import start
from vllm_duet.forecast import NoForecastError, model_shape
from vllm_duet.policy import ForecastPolicy
from vllm_duet.roofline import NO_ANCHORS
from vllm_duet.start import MeasuredSteps
from vllm_duet.steps_file import StepsFile
from vllm_duet.support import reported_roofline
from vllm_duet.worker.loaded_shape import loaded_shape

BUDGET_S = 4.0
"""Triton's interpreter is slow."""

_kept: list[Engine] = []


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path), raising=False)
    monkeypatch.setattr(start, "BUDGET_S", BUDGET_S)


@pytest.fixture
def started(tiny_model, vllm_log):
    """Starts an engine; returns it and what vllm-duet has said."""

    def begin(
        measure: str, model: Path = tiny_model, dtype: str = "float32"
    ) -> tuple[Engine, list[str]]:
        vllm_log.clear()
        options = {"duet": {"measure_at_start": measure, "tbt_slo_ms": 5.0}}
        settings = ROOMY | {"additional_config": options, "dtype": dtype}
        engine = Engine(make_llm(model, "vllm_duet.DuetScheduler", **settings))
        _kept.append(engine)
        said = [record.getMessage() for record in vllm_log.records]
        return engine, [line for line in said if line.startswith("vllm-duet")]

    return begin


def unseeded(count: int = 4) -> list[Arrival]:
    rng = random.Random(1)
    params = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True, detokenize=False)
    return [Arrival(f"r{i}", tokens(rng, 20 + 30 * i), params) for i in range(count)]


def answered(engine: Engine) -> dict[str, list[int]]:
    return {name: answer.tokens[0] for name, answer in engine.run(unseeded()).items()}


def test_nothing_shows_but_the_forecast(started) -> None:
    plain, _ = started("never")
    assert reported_roofline(plain.vllm_config) is None
    assert plain.core.scheduler._policy is None  # there is no profile of a CPU
    expected = answered(plain)

    engine, _ = started("always")
    measured = reported_roofline(engine.vllm_config)
    assert measured.anchors != NO_ANCHORS and all(f > 0 for _, f in measured.anchors.steps)
    assert engine.core.scheduler._policy._roofline is measured
    # Rows are free again, and who samples without a seed of its own gets the tokens it
    # would have had.
    assert len(engine.runner.req_states.free_indices) == engine.runner.max_num_reqs
    assert answered(engine) == expected
    assert len({tuple(t) for t in expected.values()}) > 1


def test_a_model_whose_layers_keep_states(started, experts, tmp_path) -> None:
    engine, _ = started("always", qwen3_next(tmp_path / "model"), "bfloat16")
    measured = reported_roofline(engine.vllm_config)
    assert measured.anchors != NO_ANCHORS
    assert engine.core.scheduler._policy._roofline is measured
    assert all(len(tokens) == 6 for tokens in answered(engine).values())


def test_the_next_start_takes_the_times_of_the_last(started, tmp_path: Path) -> None:
    first, _ = started("auto")
    with patch.object(MeasuredSteps, "measure", side_effect=AssertionError("measured again")):
        second, said = started("auto")
    times = [reported_roofline(engine.vllm_config).anchors for engine in (first, second)]
    assert times[0] == times[1]
    # The file says enough for a machine without an engine.
    (file,) = (tmp_path / "vllm_duet").iterdir()
    found = StepsFile.load(file)
    assert found.roofline().anchors == times[0]
    config = first.vllm_config
    assert (found.device_type, found.profile, found.graph_sizes) == ("cpu", None, ())
    assert found.model == config.model_config.model and found.shape == model_shape(config)
    assert (
        found.kv_cache_tokens == config.cache_config.num_gpu_blocks * config.cache_config.block_size
    )
    assert any("forecasts by the step times in" in line for line in said)


def test_a_broken_file_is_measured_anew(started, tmp_path: Path) -> None:
    started("auto")
    (file,) = (tmp_path / "vllm_duet").iterdir()
    file.write_text('[{"shape": {"decodes": 1}}]')
    engine, said = started("auto")
    assert any(f"measures anew: {file} holds no measured steps" in line for line in said)
    assert reported_roofline(engine.vllm_config) is not None
    assert file.read_text().count("decodes") > 1


def test_a_step_that_fails_ends_no_start(started) -> None:
    stock = GPUModelRunner.execute_model

    def fails(runner, scheduler_output, *args, **kwargs):
        if scheduler_output.total_num_scheduled_tokens > 4:
            raise RuntimeError("no such kernel.")
        return stock(runner, scheduler_output, *args, **kwargs)

    with patch.object(GPUModelRunner, "execute_model", fails):
        engine, said = started("always")
    (line,) = (line for line in said if "could not measure" in line)
    assert line == (
        "vllm-duet could not measure steps at start, and forecasts without: RuntimeError: no such"
        " kernel."
    )
    assert reported_roofline(engine.vllm_config) is None
    answered(engine)


@pytest.mark.parametrize("architecture", ["Granite", "Olmoe"])
def test_a_model_whose_shape_is_not_known(started, tmp_path: Path, architecture: str) -> None:
    """It is read off the loaded model; so its prompts are capped, too."""
    folder = tmp_path / "model"
    config = getattr(transformers, f"{architecture}Config")(
        **SHAPE | {"num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.float().save_pretrained(folder)
    engine, said = started("always", folder)
    with pytest.raises(NoForecastError, match=architecture):
        model_shape(engine.vllm_config)

    assert reported_roofline(engine.vllm_config), said
    shape = reported_roofline(engine.vllm_config).shape
    parameters = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    router = 8 * config.hidden_size * config.num_hidden_layers if architecture == "Olmoe" else 0
    assert shape.num_parameters == pytest.approx(parameters - router, rel=0.02)
    assert isinstance(engine.core.scheduler._policy, ForecastPolicy)
    answered(engine)


def test_the_shape_of_the_loaded_model_is_that_of_its_config(started) -> None:
    engine, _ = started("never")
    loaded = loaded_shape(engine.runner.model, engine.vllm_config)
    known = model_shape(engine.vllm_config)
    assert loaded.num_active_parameters == known.num_active_parameters
    assert loaded.kv_bytes_per_token == known.kv_bytes_per_token
