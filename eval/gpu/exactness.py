# SPDX-License-Identifier: Apache-2.0
"""Whether tokens under random plans are stock vLLM's, on this machine and model.

    python eval/gpu/exactness.py --rounds 20
    python eval/gpu/exactness.py --race-hunt 300

Greedy and seeded requests of mixed lengths, some with a common prefix, go to stock vLLM
and then, in rounds, to DuetScheduler with a random plan at every step (``mode=random``),
each engine in a process of its own. A step under a plan has another batch than stock's, so
tokens can be equal only where a token does not depend on who shares its batch.
Batch-invariant kernels give that (the default on a GPU, VLLM_BATCH_INVARIANT=1), and mostly
float32 does (``--dtype float32 --no-batch-invariant``).

Two controls say whether the comparison means anything. Stock with another token budget: where
it differs from stock, a token depends on who shares its batch. Stock with its KV cache
spoiled half-way: where that changes no token, a wrong KV cache would go unnoticed. vLLM
draws dummy weights so small that it would, so they are drawn anew here.

Batch-invariant kernels also turn off compilation and FlashAttention's scheduling ahead of
time. ``--compiled`` adds rounds as vLLM serves by default, for which tokens may differ a
little from stock's, as stock's do under another budget: the table has both.

``--race-hunt`` repeats the comparison with VLLM_DUET_CHECK=1, which verifies and poisons the
prefill lane's buffers, until its time is over.

Exit code: 0 all equal, 1 some differ or failed, 3 the control differs, or nothing was split.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import engines
import typer
from rich.console import Console
from rich.table import Table

EQUAL, DIFFERENT, UNDECIDED = 0, 1, 3
MAX_MODEL_LEN = 4096
SPOILED_STEP = 12
"""The step before which the KV cache is spoiled: some requests decode by then."""
WEIGHT_GAIN = 2.0
"""How much larger than it would keep its input a product of drawn weights makes it, so that
attention prefers some tokens to others."""
MOST_TOKENS_A_STEP, STEPS_FOR_PROMPTS = 1024, 8
"""So prompts are cut into chunks, and meet decodes. The control cuts them elsewhere."""

console = Console(stderr=True)


def main(
    model: Annotated[
        Path, typer.Option(exists=True, help="A folder with config.json, or a whole model.")
    ] = engines.ROOT / "eval" / "models" / "qwen3-8b",
    load_format: Annotated[str, typer.Option(help="dummy: random weights.")] = "dummy",
    rounds: Annotated[
        int, typer.Option(min=1, help="How often to compare with stock, under other plans.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of the random plans.")] = 0,
    requests: Annotated[int, typer.Option(min=2)] = 32,
    dtype: str = "auto",
    batch_invariant: Annotated[
        bool, typer.Option(help="VLLM_BATCH_INVARIANT=1; on a GPU only.")
    ] = engines.ON_GPU,
    race_hunt: Annotated[
        float, typer.Option(metavar="SECONDS", help="Repeat, checked, until this is over.")
    ] = 0.0,
    scale: Annotated[float, typer.Option(help="Of prompt lengths; small for a CPU.")] = 1.0,
    compiled: Annotated[
        bool, typer.Option(help="Also compare as vLLM serves by default; on a GPU only.")
    ] = engines.ON_GPU,
    seconds: Annotated[
        float, typer.Option(help="After which no further engine starts; results are kept.")
    ] = 3600.0,
    duet_config: Annotated[str, typer.Option(help="More options of vllm-duet, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(dir_okay=False)] = engines.RESULTS / "exactness.json",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Compare tokens under random plans with stock vLLM's."""
    config = json.loads((model / "config.json").read_text())
    longest = min(MAX_MODEL_LEN, config["max_position_embeddings"])
    work = make_requests(requests, config["vocab_size"], longest, scale)
    tokens = sum(len(prompt) for prompt, _ in work)
    budget = max(2 * requests, min(MOST_TOKENS_A_STEP, tokens // STEPS_FOR_PROMPTS))
    engine = {
        "model": str(model),
        "load_format": load_format,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_batched_tokens": budget,
        "max_num_seqs": requests,
        "seed": 0,
    }
    if not engines.ON_GPU:
        engine |= {"enforce_eager": True, "block_size": 32, "distributed_executor_backend": "uni"}
    typer.echo(
        f"{requests} requests, {tokens:,} prompt tokens; stock twice, then"
        + (f" rounds for {race_hunt:g} s" if race_hunt else f" {rounds} rounds of random plans")
    )
    if dry_run:
        typer.echo(f"engine: {json.dumps(engine)}")
        return
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    try:
        duet = engines.duet_section(duet_config) | {"mode": "random", "seed": seed}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    result: dict[str, Any] = {
        "provenance": engines.provenance(),
        "engine": engine,
        "environment": variables,
        "duet": duet,
        "runs": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        # After each engine: what has been found stays if the next one takes too long.
        out.write_text(json.dumps(result, indent=1) + "\n")

    end_s = time.monotonic() + seconds
    other = engine | {"max_num_batched_tokens": max(requests, budget * 5 // 8)}

    def legs(environment: dict[str, str], into: dict[str, Any], rounds: int) -> None:
        """Stock, its control, and rounds of random plans, while there is time."""
        [stock] = serve(engine, work, environment, "stock vLLM")
        [control] = serve(other, work, environment, "stock vLLM, another token budget")
        into["control"] = compare(stock["tokens"], control["tokens"])
        save()
        if into is result:
            [spoiled] = serve(
                engine, work, environment, "stock vLLM, its KV cache spoiled", spoiled=True
            )
            into["spoiled"] = compare(stock["tokens"], spoiled["tokens"])
            save()
        if race_hunt:
            environment = environment | {"VLLM_DUET_CHECK": "1"}
        answers = serve(
            engine, work, environment, "random plans", {"duet": duet}, rounds, race_hunt
        )
        try:
            for found in answers:
                row = compare(stock["tokens"], found["tokens"])
                into["runs"].append({**row, "steps_by_mode": found["steps_by_mode"]})
                save()
        except RuntimeError as error:
            into["runs"].append({"error": str(error)})
            save()

    with engines.environment(**variables) as environment:
        try:
            legs(environment, result, 1 if race_hunt else rounds)
            if compiled and batch_invariant and not race_hunt and time.monotonic() < end_s:
                environment.pop("VLLM_BATCH_INVARIANT")
                result["compiled"] = {"runs": []}
                legs(environment, result["compiled"], min(rounds, 3))
        except RuntimeError as error:
            typer.echo(f"Stock vLLM failed:\n{error}", err=True)
            raise typer.Exit(DIFFERENT) from None
    raise typer.Exit(report(result, requests))


def make_requests(
    count: int, vocabulary: int, longest: int, scale: float, seed: int = 0
) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of mixed lengths with their sampling parameters; the same every time.

    Every third begins like the one before it; every fourth samples, by a seed of its own.
    """
    rng = random.Random(seed)
    made: list[tuple[list[int], dict[str, Any]]] = []
    for number in range(count):
        length = max(2, round(scale * rng.choice([8, 60, 200, 700, 1500, 2500])))
        prompt = rng.choices(range(3, vocabulary), k=min(length, longest - 128))
        if number % 3 == 2:
            shared = made[-1][0][: len(prompt) * 2 // 3]
            prompt[: len(shared)] = shared
        sampling: dict[str, Any] = {"max_tokens": rng.randint(1, 60), "ignore_eos": True}
        if number % 4 == 3:
            sampling |= {"temperature": 0.8, "seed": 1000 + number}
            if engines.ON_GPU:  # Triton's interpreter does not run that kernel.
                sampling["top_p"] = 0.9
        else:
            sampling |= {"temperature": 0.0}
        made.append((prompt, sampling))
    return made


def serve(
    engine: dict[str, Any],
    work: Sequence[tuple[list[int], dict[str, Any]]],
    environment: dict[str, str],
    title: str,
    additional_config: dict[str, Any] | None = None,
    rounds: int = 1,
    seconds: float = 0.0,
    spoiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """``tokens`` of each request and ``steps_by_mode``, of every round of a new engine.

    As many as ``rounds``, and more while they begin within ``seconds``. The engine runs in a
    process of its own. With ``additional_config`` the scheduler is DuetScheduler. With
    ``spoiled`` the KV cache is made wrong half-way.

    Raises:
        RuntimeError: it failed, after the rounds that there were; the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, answers, said = (Path(folder, name) for name in ("task", "answers", "said"))
        task.write_text(
            json.dumps(
                {
                    "engine": engine,
                    "work": work,
                    "additional_config": additional_config,
                    "rounds": rounds,
                    "seconds": seconds,
                    "spoiled": spoiled,
                }
            )
        )
        with console.status(title), said.open("w") as log:
            ended = subprocess.run(
                [sys.executable, __file__, "--child", str(task), str(answers)],
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if answers.exists():
            yield from map(json.loads, answers.read_text().splitlines())
        if ended.returncode:
            raise RuntimeError("\n".join(said.read_text().splitlines()[-15:]))


def child(task_file: str, answers_file: str) -> None:
    """In a process of its own: serve all requests at once, round after round."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import dummy_loader

    from vllm_duet.metrics import steps_by_mode

    task = json.loads(Path(task_file).read_text())
    options = task["engine"]
    if task["additional_config"] is not None:
        options["scheduler_cls"] = "vllm_duet.DuetScheduler"
        options["additional_config"] = task["additional_config"]
    # vLLM packs and quantises weights once they are drawn.
    dummy_loader.initialize_single_dummy_weight = Weights(
        dummy_loader.initialize_single_dummy_weight
    ).draw
    llm = LLM(**options)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    if task["spoiled"]:
        spoil_cache(runner, step=SPOILED_STEP)
    before: Counter[str] = Counter()
    end_s, rounds = time.monotonic() + task["seconds"], 0
    with Path(answers_file).open("w") as answers:
        while rounds < task["rounds"] or time.monotonic() < end_s:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in task["work"]],
                [SamplingParams(detokenize=False, **sampling) for _, sampling in task["work"]],
                use_tqdm=False,
            )
            steps = Counter(steps_by_mode(scheduler))
            answer = {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "steps_by_mode": steps - before,
            }
            before, rounds = steps, rounds + 1
            print(json.dumps(answer), file=answers, flush=True)
            # The next round has to compute every prompt again.
            assert llm.reset_prefix_cache()


class Weights:
    """Weights by which a token depends on all of its context; the same in every process.

    Those that are not floating-point are left to ``stock``.
    """

    def __init__(self, stock: Callable[..., Any]) -> None:
        self._stock = stock
        self._drawn = 0

    def draw(self, weight: Any, *args: Any, **kwargs: Any) -> None:
        import torch

        floats = (torch.bfloat16, torch.float16, torch.float32)
        if weight.dtype not in floats or hasattr(weight, "dummy_weight_value"):
            self._stock(weight, *args, **kwargs)
        elif weight.ndim < 2:
            weight.data.fill_(1.0)  # of norms
        else:
            generator = torch.Generator(weight.device).manual_seed(self._drawn)
            spread = WEIGHT_GAIN / weight.shape[-1] ** 0.5
            weight.data.normal_(0.0, spread, generator=generator)
        self._drawn += 1


def spoil_cache(runner: Any, step: int) -> None:
    """Have the KV cache negated before the ``step``-th step from now: wrong, by its own size."""
    stock, left = runner.execute_model, step

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            for cache in runner.kv_caches:
                cache.neg_() if cache.is_floating_point() else cache.bitwise_not_()
        return stock(*args, **kwargs)

    runner.execute_model = execute_model


def compare(expected: Sequence[list[int]], found: Sequence[list[int]]) -> dict[str, Any]:
    """How many requests are equal, and where the others part: (request, token)."""
    parts = []
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            parts.append((number, min(len(a), len(b)) if at is None else at))
    return {"equal": len(expected) - len(parts), "parts_at": parts}


def report(result: dict[str, Any], requests: int) -> int:
    """Print the table, and return the exit code."""
    table = Table("round", "equal", "first difference", "steps by mode")
    control, runs = result["control"], result["runs"]
    rows = [("stock again", control), ("KV cache spoiled", result["spoiled"])]
    rows += ((f"round {n}", row) for n, row in enumerate(runs))
    if "compiled" in result:
        rows.append(("compiled: stock again", result["compiled"]["control"]))
        rows += ((f"compiled: round {n}", row) for n, row in enumerate(result["compiled"]["runs"]))
    for name, row in rows:
        if "error" in row:
            table.add_row(name, "failed", row["error"].splitlines()[-1], "")
            continue
        first = row["parts_at"][0] if row["parts_at"] else None
        table.add_row(
            name,
            f"{row['equal']} of {requests}",
            f"request {first[0]}, token {first[1]}" if first else "",
            " ".join(f"{mode}:{n}" for mode, n in row.get("steps_by_mode", {}).items() if n),
        )
    Console(width=120).print(table)
    if any("error" in row for _, row in rows):
        typer.echo("A run failed.")
        return DIFFERENT
    if control["parts_at"]:
        typer.echo(
            "Stock vLLM differs from itself under another token budget: with these settings a"
            " token depends on who shares its batch, and this decides nothing."
        )
        return UNDECIDED
    if not result["spoiled"]["parts_at"]:
        typer.echo(
            "A spoiled KV cache changes no token: with these weights a wrong KV cache would"
            " go unnoticed, and this decides nothing."
        )
        return UNDECIDED
    if not any(row["steps_by_mode"].get("split") for row in runs):
        typer.echo("No step was split, so this shows nothing: see vllm-duet doctor.")
        return UNDECIDED
    if any(row["parts_at"] for row in runs):
        typer.echo("Tokens differ from stock vLLM's.")
        return DIFFERENT
    typer.echo(f"All tokens of {requests} requests are stock vLLM's in {len(runs)} rounds.")
    return EQUAL


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        typer.run(main)
