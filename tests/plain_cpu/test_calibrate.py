# SPDX-License-Identifier: Apache-2.0
"""`vllm-duet calibrate` on vLLM's CPU build as a user has it, and `simulate` by what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny_model import make_tiny_model
from typer.testing import CliRunner

from vllm_duet.anchors import SHORT_CONTEXT, mean_error
from vllm_duet.cli import app
from vllm_duet.steps_file import StepsFile

PYTHON = Path(__file__).parents[2] / ".venv-plain/bin/python"
OPTIONS = (
    "--skip-tokenizer-init --enforce-eager --dtype float32 --max-model-len 1024"
    " --max-num-batched-tokens 256 --max-num-seqs 8"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-qwen3"))


def calibrate(folder: Path, *arguments: str | Path, **variables: str):
    """Run the command in ``folder``, as a user's shell would."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_"))}
    own |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "COLUMNS": "200",
    }
    return subprocess.run(
        [PYTHON, "-m", "vllm_duet", "calibrate", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=own | variables,
        timeout=300,
    )


def test_its_file_is_what_simulate_takes(model: Path, tmp_path: Path) -> None:
    bound = json.dumps({"duet": {"tbt_slo_ms": 50, "measure_at_start": "never"}})
    done = calibrate(tmp_path, model, *OPTIONS.split(), "--additional-config", bound)
    assert done.returncode == 0, done.stderr
    path = tmp_path / f"steps-{model.name}.json"
    assert f"Wrote {path.name}" in done.stdout and "Measured on cpu" in done.stdout
    assert "mixed steps that are none of these are off by" in done.stdout

    found = StepsFile.load(path)
    assert found.device_type == "cpu" and found.profile is None and not found.graph_sizes
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.max_model_len) == (8, 256, 1024)
    assert found.shape.num_layers == 2 and found.found.checks
    decodes = [a for a in found.found.anchors if a.shape.decode_context == SHORT_CONTEXT]
    assert decodes and mean_error(found.roofline(), decodes) < 1e-3
    # The next start of such an engine takes it from where it looks for it.
    (kept,) = (tmp_path / "cache" / "vllm_duet").glob("steps-*.json")
    assert StepsFile.load(kept) == found

    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    rows = ({"timestamp": 5 * n, "input_length": 300, "output_length": 30} for n in range(12))
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["simulate", "--trace", trace, "--model", model, "--gpu", path, "--out", out]
    told = ["--concurrency", "6", "--tbt-slo-ms", "0.01"]
    result = CliRunner().invoke(app, [str(part) for part in [*command, *told]])
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gpu"] == "cpu" and "steps measured on cpu" in summary["truth"]
    assert summary["steps"]["capped"] > 0 and not summary["steps"]["split"]


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["./no-such-model"], {}, "vLLM does not start with ./no-such-model"),
        (["MODEL", "--max-model-len", "many"], {}, "vLLM does not take these options"),
        (["MODEL", "--no-such-option"], {}, "--no-such-option"),
        (["MODEL", *OPTIONS.split()], {"VLLM_CPU_KVCACHE_SPACE": "100000"}, "memory"),
        (
            ["MODEL", *OPTIONS.split(), "--additional-config", '{"duet": {"tbt": 1}}'],
            {},
            "tbt_slo_ms",
        ),
        (["MODEL", *OPTIONS.split()], {"VLLM_DUET_MODE": "capped"}, "not measured: mode capped"),
    ],
)
def test_what_a_user_may_get_wrong_is_a_sentence(
    model: Path, tmp_path: Path, arguments: list[str], variables: dict[str, str], said: str
) -> None:
    named = [str(model) if argument == "MODEL" else argument for argument in arguments]
    done = calibrate(tmp_path, *named, **variables)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert said in last and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_without_vllm_it_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['vllm'] = None; from vllm_duet.cli import main; main()"
    done = subprocess.run(
        [PYTHON, "-c", code, "calibrate", "any"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"},
    )
    assert done.returncode == 2 and "vLLM cannot be imported" in done.stderr
