# SPDX-License-Identifier: Apache-2.0
"""What the host costs between two decode steps, alone and while prefills are launched.

Streams decode while a prompt arrives every dozen steps. What counts is the time between two
steps that bring tokens. On the fake GPU (tests/fake_gpu) kernels take no time, so that is all
Python's and CUDA's host side, or each takes the same time: vLLM queues one step ahead, and what
the host does while the device is busy nobody waits for. On a GPU it has the device's time in it.

Each variant is an engine of its own, in a process of its own, and measures both phases; the
table compares within one engine. It also has the seconds that the engine took to start; the
first start compiles what later ones find on disk. Run it in an environment of vLLM's CUDA build:

    make bench-cadence          # on the fake GPU; writes eval/results/cadence.json
    python eval/bench_cadence.py --out cadence.json   # on a GPU
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent / "gpu"))

MODEL = Path(__file__).parent / "models" / "qwen3-8b"
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "thread": {"prefill_launch": "thread"},
    "slices": {"prefill_launch": "slices"},
}
QUANTILES = (50, 90, 99, 100)
NUM_DECODES, PROMPT_LEN, STEPS_BETWEEN = 64, 4096, 12
WARM_UP_STEPS = 48


def main(
    variants: Annotated[str, typer.Option(help="Which to run, of stock, thread and slices.")] = (
        " ".join(VARIANTS)
    ),
    kernel_us: Annotated[
        str, typer.Option(help="What each kernel takes on the fake GPU: of these, each in turn.")
    ] = "0",
    steps: Annotated[int, typer.Option(min=20, help="Steps in each phase.")] = 600,
    compiled: Annotated[bool, typer.Option(help="As vLLM serves by default; or eagerly.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures there, as JSON.")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the gaps between decode steps."""
    if child is not None:
        print(json.dumps(measure(VARIANTS[child], child != "stock", steps, compiled)))
        return
    from engines import environment, provenance

    is_fake = "fake_gpu" in os.environ.get("LD_PRELOAD", "")
    results: dict[str, dict[str, Any]] = {}
    with environment(VLLM_ENABLE_V1_MULTIPROCESSING="0") as variables:
        for us, name in itertools.product(kernel_us.split(), variants.split()):
            command = [sys.executable, __file__, "--child", name, "--steps", str(steps)]
            command += ["--compiled" if compiled else "--no-compiled"]
            env = os.environ | variables | ({"FAKECUDA_KERNEL_US": us} if is_fake else {})
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE)
            if done.returncode:
                raise typer.Exit(done.returncode)
            of_kernels = results.setdefault(f"kernels of {us} us" if is_fake else "kernels", {})
            of_kernels[name] = json.loads(done.stdout.splitlines()[-1])
    for kernels, of_kernels in results.items():
        show(kernels, of_kernels)
    if out is not None:
        head = provenance() | {"compiled": compiled, "steps": steps}
        if is_fake:
            head |= {"label": "measured; the host's time alone", "gpus": "none: tests/fake_gpu"}
        out.write_text(json.dumps(head | {"gaps_ms": results}, indent=1) + "\n")


def measure(
    duet: dict[str, Any], is_duet: bool, steps: int, compiled: bool
) -> dict[str, dict[str, float]]:
    """Of one engine: quantiles of the gaps in ms by phase, and the seconds of its start."""
    from vllm import LLM, SamplingParams, TokensPrompt

    options: dict[str, Any] = dict(
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        max_num_seqs=NUM_DECODES + 16,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    )
    if not compiled:
        options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if is_duet:
        options["scheduler_cls"] = "vllm_duet.DuetScheduler"
        section = {"cuda_lanes": True, "mode": "split", "gpu_profile": "h100-sxm", **duet}
        options["additional_config"] = {"duet": section}
    began = time.perf_counter()
    engine = LLM(str(MODEL), **options).llm_engine
    start_s = time.perf_counter() - began
    rng, sent = np.random.default_rng(0), 0

    def send(name: str, prompt_len: int, max_tokens: int) -> None:
        engine.add_request(
            name,
            TokensPrompt(prompt_token_ids=rng.integers(10, 100_000, prompt_len).tolist()),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False),
        )

    for i in range(NUM_DECODES):
        send(f"decode-{i}", 64, 7000)

    def gaps_ms(steps: int, with_prompts: bool) -> list[float]:
        nonlocal sent
        gaps: list[float] = []
        last = time.perf_counter()
        while len(gaps) < steps:
            if with_prompts and len(gaps) % STEPS_BETWEEN == 0:
                # A server's front end does this in another process.
                before = time.perf_counter()
                send(f"prompt-{sent}", PROMPT_LEN, 1)
                sent += 1
                last += time.perf_counter() - before
            outputs = engine.step()
            if any(output.request_id.startswith("decode") for output in outputs):
                now = time.perf_counter()
                gaps.append(1e3 * (now - last))
                last = now
        return gaps

    gaps_ms(WARM_UP_STEPS, with_prompts=True)
    gaps_ms(WARM_UP_STEPS, with_prompts=False)
    phases = {
        "alone": gaps_ms(steps, with_prompts=False),
        "beside": gaps_ms(steps, with_prompts=True),
    }
    return {
        phase: {f"p{q}": float(np.percentile(gaps, q)) for q in QUANTILES}
        for phase, gaps in phases.items()
    } | {"start": {"s": start_s}}


def show(kernels: str, results: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table("variant", "phase", *(f"p{q} ms" for q in QUANTILES), title=kernels)
    for name, phases in results.items():
        for phase in ("alone", "beside"):
            table.add_row(name, phase, *(f"{phases[phase][f'p{q}']:.2f}" for q in QUANTILES))
        ratios = [phases["beside"][f"p{q}"] / phases["alone"][f"p{q}"] for q in QUANTILES]
        table.add_row(name, "ratio", *(f"{ratio:.2f}" for ratio in ratios))
        table.add_row(name, f"start {phases['start']['s']:.0f} s", end_section=True)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
