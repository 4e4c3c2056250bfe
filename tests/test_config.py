# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vllm_duet.config import DuetConfig, DuetConfigError

README = Path(__file__).parents[1] / "README.md"


def load(section: Any = None, **env: str) -> DuetConfig:
    return DuetConfig.load(None if section is None else {"duet": section}, env)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "duet.yaml"
    path.write_text("tbt_slo_ms: 30\nseed: 3\ndecode_sms: [16, 24]\n")
    return path


def test_defaults():
    config = load()
    assert config == DuetConfig()
    assert (config.tbt_slo_ms, config.mode, config.max_lookahead) == (100, "auto", 8)


def test_the_configuration_does_not_change():
    with pytest.raises(ValidationError):
        DuetConfig().seed = 1  # type: ignore[misc]


def test_every_option_is_documented():
    assert all(field.description for field in DuetConfig.model_fields.values())


def test_the_stronger_source_wins(yaml_file: Path):
    config = load(
        {"tbt_slo_ms": 10, "config_file": str(yaml_file)},
        VLLM_DUET_TBT_SLO_MS="20",
        VLLM_DUET_SEED="2",
    )
    assert (config.tbt_slo_ms, config.seed, config.decode_sms) == (10, 2, (16, 24))


def test_the_section_names_the_file_before_the_environment_does(yaml_file: Path):
    assert load({"config_file": str(yaml_file)}, VLLM_DUET_CONFIG="nowhere.yaml").seed == 3
    assert load(VLLM_DUET_CONFIG=str(yaml_file)).seed == 3


def test_the_example_names_every_option_at_its_default():
    example = Path(__file__).parent.parent / "examples" / "duet.yaml"
    options = yaml.safe_load(example.read_text())
    assert options.keys() == DuetConfig.model_fields.keys()
    assert load(VLLM_DUET_CONFIG=str(example)) == DuetConfig()


def test_an_empty_file_sets_nothing(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.touch()
    assert load(VLLM_DUET_CONFIG=str(path)) == DuetConfig()


def test_variables_are_read_as_what_the_option_is():
    config = load(
        VLLM_DUET_CORRECTION="0",
        VLLM_DUET_DECODE_SMS="16, 24",
        VLLM_DUET_GPU_PROFILE="5",
        VLLM_DUET_MODE="split",
        VLLM_DUET_SERIAL_HOLD_STEPS="",
    )
    assert config.correction is False
    assert config.decode_sms == (16, 24)
    assert config.gpu_profile == "5"
    assert config.mode == "split"
    assert config.serial_hold_steps == 2


def test_other_settings_are_left_alone():
    assert DuetConfig.load({"other": 1}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}) == DuetConfig()
    assert DuetConfig.load(object(), {"VLLM_DUET_CHECK": "1"}) == DuetConfig()


def test_the_environment_is_the_process_own_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_DUET_SEED", "9")
    assert DuetConfig.load().seed == 9


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"tbt_slo_ms": 0}, "tbt_slo_ms .* should be greater than 0, not 0"),
        ({"tbt_slo_ms": "50"}, "tbt_slo_ms .* should be a valid number, not '50'"),
        ({"tbt_slo_ms": float("inf")}, "tbt_slo_ms .* should be a finite number, not inf"),
        ({"mode": "splitt"}, "mode .* should be 'auto', .* or 'random', not 'splitt'"),
        ({"seed": True}, "seed .* should be a valid integer, not True"),
        ({"decode_sms": []}, "decode_sms .* should not be empty"),
        ({"decode_sms": 16}, "decode_sms .* should be a list, not 16"),
        ({"decode_sms": [16, -8]}, r"decode_sms\[1\] .* should be greater than 0, not -8"),
        ({"max_lookahead": 0}, "max_lookahead .* should be greater than or equal to 1, not 0"),
        ({"throughput_margin": -0.1}, "throughput_margin .* greater than or equal to 0"),
        (
            {"serial_timing": "soon"},
            "serial_timing .* should be 'early', 'late', 'threaded' or 'interleaved'",
        ),
        ({"tbt_slo": 50}, r"tbt_slo in .* \(did you mean tbt_slo_ms\?\); the options are"),
        ({"colour": "red"}, "Unknown vllm-duet option colour in .*; the options are .*, mode,"),
        ("split", "The duet section .* should be a mapping"),
    ],
)
def test_a_wrong_section_is_one_sentence(section: Any, said: str):
    with pytest.raises(DuetConfigError, match=said) as caught:
        load(section)
    assert "--additional-config" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("VLLM_DUET_SEED", "one", "VLLM_DUET_SEED in the environment should be a valid integer"),
        ("VLLM_DUET_DECODE_SMS", "16,x", "DECODE_SMS.* should be a valid integer"),
        ("VLLM_DUET_MOD", "split", r"VLLM_DUET_MOD in .* \(did you mean VLLM_DUET_MODE\?\)"),
        ("VLLM_DUET_CONFIG", "nowhere.yaml", "cannot be read from nowhere.yaml: .*No such file"),
    ],
)
def test_a_wrong_variable_is_one_sentence(variable: str, text: str, said: str):
    with pytest.raises(DuetConfigError, match=said):
        load(**{variable: text})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("mode: [", "cannot be read from .*duet.yaml"),
        ("- mode", "duet.yaml should hold a mapping"),
        ("tbt_slo_ms: fast", "tbt_slo_ms in .*duet.yaml should be a valid number, not 'fast'"),
        ("config_file: other.yaml", "Unknown vllm-duet option config_file in .*duet.yaml"),
    ],
)
def test_a_wrong_file_is_one_sentence(yaml_file: Path, content: str, said: str):
    yaml_file.write_text(content)
    with pytest.raises(DuetConfigError, match=said) as caught:
        load({"config_file": str(yaml_file)})
    assert "\n" not in str(caught.value)


def test_an_overruled_value_must_be_right_too():
    with pytest.raises(DuetConfigError, match="VLLM_DUET_SEED"):
        load({"seed": 1}, VLLM_DUET_SEED="one")


def test_the_readme_lists_every_option_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (\S+)", README.read_text(), re.MULTILINE)
    table = {name: default.strip("`") for name, default in rows}
    assert list(table) == list(DuetConfig.model_fields)
    for name, default in DuetConfig().model_dump().items():
        if default is not None:
            assert default == yaml.safe_load(table[name])
