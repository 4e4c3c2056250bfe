# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build as a user has it: without the Triton shim that the other tests install.

Model Runner V2 cannot run there, so no step can be split: vLLM's own runner serves, and
prompts are capped where there is a forecast. The servers are those of ``.venv-plain``,
which ``make`` copies from ``.venv`` and takes the shim out of.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from cpu_server import PLAIN_PYTHON, PlainServer, duet_options
from prometheus_client.parser import text_string_to_metric_families
from streaming import Request, answers, connect, make_request
from tiny_model import make_tiny_model

import vllm_duet
from vllm_duet.roofline import Batch, GpuProfile, ModelShape, Roofline

LIMITS = "--dtype float32 --max-model-len 1024 --max-num-batched-tokens 256 --max-num-seqs 16"
TIGHT_BOUND_MS = 0.01
"""Which no step keeps, on whatever CPU; so prompts are capped where there is a forecast."""
OF_THE_SHIM = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")


class TellingServer(PlainServer):
    machine_environment: ClassVar = PlainServer.machine_environment | {"VLLM_LOGGING_LEVEL": "INFO"}


@pytest.fixture(scope="module", autouse=True)
def _without_what_the_shim_needs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in OF_THE_SHIM:
            patch.delenv(name, raising=False)
        yield


def slow_gpu(folder: Path) -> Path:
    """The profile of a GPU on which the tokens of a tiny model's prompt take milliseconds."""
    profile = yaml.safe_load(
        (Path(vllm_duet.__file__).parent / "profiles/h100-sxm.yaml").read_text()
    )
    profile["peak_flops"] = {dtype: rate * 1e-4 for dtype, rate in profile["peak_flops"].items()}
    path = folder / "slow.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, PlainServer]]:
    """Stock vLLM; vllm-duet with nothing but its scheduler; and with a forecast and a bound
    that a full budget of prompt tokens breaks, also on two data-parallel ranks."""
    model = make_tiny_model(tmp_path_factory.mktemp("tiny-qwen3"))
    profile = slow_gpu(tmp_path_factory.mktemp("profile"))
    shape = ModelShape.from_hf_config(json.loads((model / "config.json").read_text()))
    roofline = Roofline(shape, GpuProfile.load(profile))
    decodes, mixed = (
        roofline.predict(Batch(queries, [0] * len(queries)), roofline.profile.num_sms).ms
        for queries in ([1] * 4, [1] * 4 + [252])
    )
    capped = duet_options(
        gpu_profile=str(profile), tbt_slo_ms=(decodes + mixed) / 2, correction=False
    )
    measured = {
        "VLLM_DUET_MEASURE_AT_START": "auto",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")),
    }
    options = {
        "stock": ["--enforce-eager"],
        "default": ["--scheduler-cls", "vllm_duet.DuetScheduler"],
        "measured": ["--enforce-eager", *duet_options(tbt_slo_ms=TIGHT_BOUND_MS)],
        "capped": ["--enforce-eager", *capped],
        "ranks": ["--enforce-eager", "--data-parallel-size", "2", *capped],
    }
    with ExitStack() as stack:
        started = {}
        for names in (("stock", "default", "capped"), ("ranks",), ("measured",)):  # wants quiet
            for name in names:
                server = TellingServer(
                    model,
                    ["--skip-tokenizer-init", *LIMITS.split(), *options[name]],
                    environment=measured if name == "measured" else None,
                )
                started[name] = stack.enter_context(server)
            for name in names:
                started[name].wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(4)
    return [
        make_request(rng, prompt, tokens)
        for prompt, tokens in [(20, 90), (33, 80), (700, 12), (9, 60), (400, 20), (150, 1)] * 3
    ]


async def served(server: PlainServer, requests: list[Request]) -> list[list[int]]:
    async with connect(server.url) as client:
        return await answers(client, requests)


async def steps(server: PlainServer) -> dict[str, dict[str, float]]:
    """By mode, of each engine."""
    async with connect(server.url) as client:
        text = (await client.get("/metrics")).text
    taken = defaultdict[str, dict[str, float]](dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm_duet:steps_total":
                taken[sample.labels["engine"]][sample.labels["mode"]] = sample.value
    return taken


@pytest.mark.parametrize("name", ["default", "measured", "capped", "ranks"])
async def test_tokens_are_stocks(servers, requests, name: str) -> None:
    expected = await served(servers["stock"], requests)
    assert await served(servers[name], requests) == expected
    assert [len(tokens) for tokens in expected] == [request.max_tokens for request in requests]


@pytest.mark.parametrize(("name", "engines"), [("measured", 1), ("capped", 1), ("ranks", 2)])
async def test_prompts_are_capped_where_there_is_a_forecast(
    servers, requests, name: str, engines: int
) -> None:
    """By a profile that the options name, or by the times of steps that the start measured."""
    await served(servers[name], requests)
    taken = await steps(servers[name])
    assert len(taken) == engines
    assert all(of["capped"] > 0 and not of["split"] for of in taken.values())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("default", "vllm-duet leaves every step to vLLM: there is no GPU profile for 'cpu'"),
        ("capped", "vllm-duet does not split here: Model Runner V2 is off."),
        ("measured", "vllm-duet does not split here: Model Runner V2 is off."),
    ],
)
def test_one_line_of_the_log_says_so(servers, name: str, said: str) -> None:
    lines = [line for line in servers[name].log(10_000).splitlines() if "vllm-duet" in line]
    measured = [line for line in lines if "vllm-duet measured " in line]
    assert len(measured) == (name == "measured")
    assert len(lines) == 1 + len(measured) and said in lines[-1]


def test_the_gpus_worker_is_not_imported() -> None:
    """And the runner is vLLM's own, which the engine's process shows."""
    shown = subprocess.run(
        [PLAIN_PYTHON, Path(__file__).parent / "show_engine.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert not shown.returncode, shown.stderr
    runner, modules = shown.stdout.splitlines()[-2:]
    assert runner == "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
    assert "vllm_duet.worker.cpu" in modules.split()
    assert not {"vllm_duet.worker.gpu", "vllm_duet.worker.lane_graphs"} & set(modules.split())
