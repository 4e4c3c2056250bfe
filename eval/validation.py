# SPDX-License-Identifier: Apache-2.0
"""The simulator against what others measured of vLLM; writes docs/validation.md.

python eval/validation.py            # 10 to 15 minutes on two cores
python eval/validation.py --page     # all but the whole systems, which are on file
python eval/validation.py --only Qwen3-32B --trial '{"lengths": [0.8, 1.2]}'  # added to trials.json

Needs ``pip install vllm-duet[measured]``, whose wheel holds the measurements of whole systems too
(silicon_sample.csv), and the models' config.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.progress import track

from vllm_duet.measured import tables
from vllm_duet.sim.measured import FloatArray, MeasuredSteps

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "validation"
PAGE = HERE.parent / "docs" / "validation.md"

GPUS = {name: ours for ours, name in tables.SYSTEMS.items()}
CONFIGS = {
    "meta-llama/Llama-3.1-70B": "meta-llama--Meta-Llama-3.1-70B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama--Meta-Llama-3.1-8B",
    "MiniMaxAI/MiniMax-M2.5 fp4": "nvidia--MiniMax-M2.5-NVFP4",
    "moonshotai/Kimi-K2.5 fp4": "nvidia--Kimi-K2.5-NVFP4",
}
"""Models, some at one precision, whose config stands under another name in the wheel."""

PER_GROUP = 2
"""Rows of one GPU, model, precision and number of ranks that are simulated."""

MOST_ARITHMETIC = 0.7

LONGEST_OUTPUT, MOST_CLIENTS = 2048, 128
"""What is longer or more takes minutes to simulate."""

FRONT_END_MS, TOKENIZER_US = 3.0, 2.0
"""The API server's one thread, a request; and a prompt's token. Assumed."""

CLIENT_MS = 18.0
"""What else a first token takes outside the engine: client, HTTP, processes. Of 0, 2, ... 30 the
one with the least error of TTFT on one half of the rows; from 10 to 24 the errors of both halves
are within 3 points of their least."""

DEEP_GEMM: dict[str, Any] = {"padded_rows": 127, "experts": 0.44}
"""Experts of block-scaled fp8 in vLLM 0.12 on Hopper, by DeepGEMM but at eight ranks (pull request
29346): as many rows are computed for each expert beside its own, since the rows that a step leaves
empty count as the first expert's (deepgemm_moe_permute, up to pull request 30494). The tables have
another kernel; that DeepGEMM takes this share of its time for as many rows is fitted to the TPOT of
one half of Qwen3-235B's rows."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a set of rows was measured, as far as it is known. ``lengths``: from which to which
    share of the named length prompts and answers are."""

    name: str
    sources: str
    lengths: tuple[float, float]


INFERENCE_MAX = Recipe(
    "InferenceMAX",
    "its scripts of the time (benchmarks/ in SemiAnalysisAI/InferenceX): lengths 80 to 100 % of"
    " the named, ten prompts a client, asynchronous scheduling, no reuse of prefixes; and by model,"
    " GPU and date the dtype of the KV cache, the kernel of mxfp4 experts, tokens a step and the"
    " share of the memory (`inference_max_options` in eval/validation.py)",
    (0.8, 1.0),
)
GAP_ANALYSIS = Recipe(
    "NVIDIA's gap analysis",
    "vLLM 0.12 as aiconfigurator of that time sets it up and measures it (rule_plugin/vllm.rule"
    " and its benchmark script in ai-dynamo/aiconfigurator): at most as many requests as clients"
    " and as many tokens a step as clients, the named prompt and 1500 are together; prompts and"
    " answers of exactly the named lengths, so that clients send in step; no asynchronous"
    " scheduling",
    (1.0, 1.0),
)


def inference_max_options(row: Row) -> dict[str, Any]:
    """What InferenceMAX's scripts set beyond ``INFERENCE_MAX.sources``, by model, GPU and date.
    As the simulator's Options have it, but that ``disturbances`` are fields of Disturbances."""
    hopper = row.system in ("h100_sxm", "h200_sxm")
    found: dict[str, Any] = {}
    if "Llama" in row.model:
        found["kv_dtype"] = "fp8"
        if not hopper:  # FULL_DECODE_ONLY: no CUDA graph with a prompt in it
            found["disturbances"] = {"piecewise_tokens": 0}
    elif "gpt-oss" in row.model:
        # max-cudagraph-capture-size.
        found["disturbances"] = {"piecewise_tokens": 2048}
        if not hopper:
            found["moe_backend"] = "flashinfer_trtllm_afp8"
            found["kv_dtype"] = "fp8" if row.release else None
        elif row.release == "0.18.0":
            found["moe_backend"] = "marlin"
    elif "MiniMax" in row.model and not hopper:
        found["kv_dtype"] = "fp8"
        found["max_num_batched_tokens"] = 2 * row.input_length
        found["disturbances"] = {"piecewise_tokens": 2048}
    elif row.system != "h100_sxm" and row.precision != "fp4":
        found["gpu_memory_utilization"] = 0.95
    return found


def gap_analysis_options(row: Row) -> dict[str, Any]:
    """As aiconfigurator of December 2025 and January 2026 sets vLLM up."""
    return {
        "async_scheduling": False,
        "max_num_batched_tokens": row.concurrency + row.input_length + 1500,
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of a whole system: a closed loop of ``concurrency`` clients."""

    id: str
    recipe: str
    system: str
    model: str
    precision: str
    release: str
    tp: int
    expert_parallel: bool
    input_length: int
    output_length: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float

    @property
    def group(self) -> str:
        ranks = f"{'EP' if self.expert_parallel else 'TP'} {self.tp}"
        return f"{GPUS[self.system]}, {self.model.split('/')[-1]} {self.precision}, {ranks}"

    @property
    def half(self) -> str:
        """Constants may be set by one half, and are judged by the other."""
        return "one" if _digest(self.id) % 2 else "other"


HALVES = "one", "other"


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def read_rows() -> tuple[list[Row], dict[str, int]]:
    """vLLM's rows on the GPUs we have profiles of, and how many were left out and why."""
    frame = pd.read_csv(tables.systems_folder() / "silicon_sample.csv")
    frame = frame[(frame.backend == "vllm") & (frame["mode"] == "agg")]
    rows: list[Row] = []
    left_out: dict[str, int] = {}

    def leave_out(why: str) -> None:
        left_out[why] = left_out.get(why, 0) + 1

    for row in frame.itertuples():
        named = re.search(r"concurrency=(\d+)", row.silicon_data_source)
        experts_split = row.moe_tp_size * row.moe_ep_size > max(row.tp_size, 1)
        if row.system not in GPUS:
            leave_out("a GPU without a profile")
        elif row.attention_dp_size > 1 or experts_split:
            leave_out("data-parallel attention, which is several schedulers")
        elif not named:
            leave_out("the number of clients is not said")
        elif row.osl > LONGEST_OUTPUT:
            leave_out(f"answers of more than {LONGEST_OUTPUT} tokens")
        elif int(named[1]) > MOST_CLIENTS:
            leave_out(f"more than {MOST_CLIENTS} clients")
        elif (
            row.system == "b200_sxm" and row.backend_version == "0.17.0" and row.precision == "fp8"
        ):
            leave_out("experts by Triton on a B200, of which the newest table has none")
        else:
            gap = "gap-analysis" in row.silicon_data_source
            precision = "bf16" if pd.isna(row.precision) else row.precision
            rows.append(
                Row(
                    row.id,
                    (GAP_ANALYSIS if gap else INFERENCE_MAX).name,
                    row.system,
                    row.model_path,
                    precision,
                    "" if pd.isna(row.backend_version) else str(row.backend_version),
                    int(row.tp_size),
                    row.moe_ep_size > 1,
                    int(row.isl),
                    int(row.osl),
                    int(named[1]),
                    float(row.silicon_ttft_ms),
                    float(row.silicon_tpot_ms),
                )
            )
    return rows, left_out


def chosen(rows: Iterable[Row], per_group: int = PER_GROUP) -> list[Row]:
    """Up to ``per_group`` rows a group, by a hash of their names: nothing of their times counts. Of
    what was measured several times, one."""
    groups: dict[str, list[Row]] = {}
    seen = set()
    for row in sorted(rows, key=lambda row: _digest("choose " + row.id)):
        case = (row.group, row.input_length, row.output_length, row.concurrency)
        if case not in seen:
            seen.add(case)
            groups.setdefault(row.group, []).append(row)
    return sorted(
        (row for group in groups.values() for row in group[:per_group]),
        key=lambda row: (row.group, row.input_length, row.output_length, row.concurrency),
    )


class Supposed(MeasuredSteps):
    """The tables with something else supposed, for a trial."""

    def __init__(
        self,
        *args: Any,
        padded_rows: int = 0,
        experts: float = 1.0,
        prompts: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """``padded_rows``: that each expert computes beside those of its tokens. ``experts`` and
        ``prompts``: how many times the measured time experts take, and what prompts add to a
        step."""
        self._padded_rows, self._experts, self._prompts = padded_rows, experts, prompts
        super().__init__(*args, **kwargs)

    def _experts_ms(self, tokens: FloatArray) -> FloatArray:
        experts = self._shape.experts
        assert experts is not None
        padding = self._padded_rows * experts.num_experts / experts.experts_per_token
        return self._experts * super()._experts_ms(tokens + padding)

    def step_ms(
        self,
        decode_context_lens: Sequence[int],
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        padding: int = 0,
    ) -> float:
        ms = super().step_ms(decode_context_lens, query_lens, context_lens, padding)
        if query_lens and self._prompts != 1.0:
            alone_ms = super().step_ms(decode_context_lens, [], [], padding)
            ms += (self._prompts - 1) * (ms - alone_ms)
        return ms


def simulate(row: Row, trial: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row's run by our simulator, with vLLM's own scheduler.

    ``trial`` are settings to try in place of the recipe's: ``lengths``, ``supposed`` (arguments of
    Supposed), ``front_end`` (fields of FrontEnd), or as in ``inference_max_options``."""
    from vllm_duet.sim.engine import FrontEnd
    from vllm_duet.sim.executor import Disturbances
    from vllm_duet.sim.simulation import Options, Simulation
    from vllm_duet.sim.traces import TraceRequest

    gap = row.recipe == GAP_ANALYSIS.name
    recipe = GAP_ANALYSIS if gap else INFERENCE_MAX
    settings: dict[str, Any] = {"gpu_memory_utilization": 0.9}
    settings |= gap_analysis_options(row) if gap else inference_max_options(row)
    settings |= trial or {}
    shares = settings.pop("lengths", recipe.lengths)
    disturbances = Disturbances(**settings.pop("disturbances", {}))
    front_end = {"request_ms": FRONT_END_MS, "token_us": TOKENIZER_US}
    front_end |= settings.pop("front_end", {})
    supposed = settings.pop("supposed", None)
    options = Options(
        config_of(row),
        gpu=GPUS[row.system],
        scheduler="stock",
        tensor_parallel_size=row.tp,
        enable_expert_parallel=row.expert_parallel,
        weight_dtype=weight_dtype(row),
        enable_prefix_caching=False,
        max_num_seqs=row.concurrency,
        concurrency=row.concurrency,
        front_end=FrontEnd(**front_end),
        disturbances=disturbances,
        **settings,
    )
    random = np.random.default_rng(0)
    lengths = [
        random.integers(
            *(round(share * mean) for share in shares),
            size=10 * row.concurrency,
            endpoint=True,
        )
        for mean in (row.input_length, row.output_length)
    ]
    requests = [TraceRequest(0.0, int(a), int(b)) for a, b in zip(*lengths, strict=True)]
    simulation = Simulation(options)
    if supposed:
        simulation.measured = Supposed(
            simulation.shape,
            options.gpu,
            expert_parallel=options.enable_expert_parallel,
            moe_backend=options.moe_backend,
            **supposed,
        )
    start = time.perf_counter()
    records = simulation.run(requests).records
    return asdict(row) | {
        "group": row.group,
        "half": row.half,
        "truth": simulation.truth,
        "dense": simulation.shape.experts is None,
        # Not all clients' requests fit the KV cache: what waits is the queue's length.
        "saturated": bool(
            row.concurrency * sum(map(np.mean, lengths)) > simulation.kv_cache_tokens
        ),
        "our_ttft_ms": float(np.mean([r.token_ms[0] - r.arrival_ms for r in records])),
        "our_tpot_ms": float(
            np.mean(
                [(r.token_ms[-1] - r.token_ms[0]) / max(1, r.output_length - 1) for r in records]
            )
        ),
        "seconds": time.perf_counter() - start,
    }


def config_of(row: Row) -> Path:
    """The model's config.json in the wheel."""
    named = CONFIGS.get(row.model) or CONFIGS.get(f"{row.model} {row.precision}")
    name = named or row.model.replace("/", "--")
    return tables.systems_folder().parent / "model_configs" / f"{name}_config.json"


def weight_dtype(row: Row) -> str | None:
    """The row's, where the config does not itself say how the weights are quantized."""
    raw = json.loads(config_of(row).read_text())
    if "quantization_config" in raw or "quantization_config" in (raw.get("text_config") or {}):
        return None
    return {"fp8": "fp8", "fp4": "nvfp4"}.get(row.precision)


def known(row: Row) -> str:
    """Why a row's model cannot be simulated; empty where it can."""
    from vllm_duet.roofline import ModelShape

    try:
        ModelShape.from_hf_config(
            config_of(row), tensor_parallel_size=row.tp, weight_dtype=weight_dtype(row)
        )
    except (OSError, ValueError) as error:
        return f"{row.model} {row.precision}: {str(error).split(';')[0]}"
    return ""


def impossible(rows: list[Row]) -> str:
    """Why a model's rows cannot be what they seem: their own times imply more products than a
    GPU computes, MOST_ARITHMETIC of its data sheet's peak, as if clients were spread over more
    GPUs. Empty where they do not; experts are left out of the count."""
    from vllm_duet.roofline import GpuProfile, ModelShape

    most = 0.0
    for row in rows:
        shape = ModelShape.from_hf_config(config_of(row), weight_dtype="bfloat16")
        if shape.experts:
            continue
        seconds = (row.ttft_ms + (row.output_length - 1) * row.tpot_ms) / 1e3
        tokens = row.concurrency * (row.input_length + row.output_length)
        peak = GpuProfile.load(GPUS[row.system]).peak_flops_per_s(
            {"fp8": "fp8", "fp4": "nvfp4"}.get(row.precision, "bfloat16"), "bfloat16"
        )
        # Two FLOPs and two bytes for each weight.
        most = max(most, shape.weight_bytes * tokens / seconds / (peak * row.tp))
    if most <= MOST_ARITHMETIC:
        return ""
    return (
        f"{rows[0].model}: their own times imply up to {most:.0%} of the GPUs' peak FLOP/s in"
        " linear layers alone, so clients cannot be as many as they say"
    )


def main(
    workers: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    page: Annotated[bool, typer.Option("--page", help="All but the whole systems.")] = False,
    only: Annotated[str, typer.Option(help="Only groups with this in their name.")] = "",
    per_group: Annotated[int, typer.Option(min=1, help="Rows of each group.")] = PER_GROUP,
    trial: Annotated[
        str, typer.Option(help="JSON: settings to try in place of the recipes', with --only.")
    ] = "",
) -> None:
    if bool(trial) > bool(only):
        raise typer.BadParameter("--trial needs --only")
    if not page:
        serving(workers, only, per_group, json.loads(trial or "null"))
    if not only:
        sm_curve()
        PAGE.write_text(write_page())


def serving(workers: int, only: str, per_group: int, trial: dict[str, Any] | None) -> None:
    """Whole systems; prints the errors, and writes serving.json, or adds to trials.json."""
    rows, left_out = read_rows()
    models = {(row.model, row.precision): row for row in rows}
    reasons = {
        model: known(row) or impossible([r for r in rows if (r.model, r.precision) == model])
        for model, row in models.items()
    }
    for row in rows:
        if reason := reasons[row.model, row.precision]:
            left_out[reason] = left_out.get(reason, 0) + 1
    rows = chosen(
        (row for row in rows if not reasons[row.model, row.precision] and only in row.group),
        per_group,
    )
    results = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(simulate, row, trial) for row in rows]
        for future in track(as_completed(futures), total=len(rows), console=Console(stderr=True)):
            results.append(future.result())
            print(line(results[-1]), flush=True)
    order = {row.id: n for n, row in enumerate(rows)}
    results.sort(key=lambda result: order[result["id"]])
    for half in HALVES:
        some = [r for r in results if r["half"] == half and not r["saturated"]]
        if some:
            print(half, len(some), *(f"{k} {mean_error(some, k):.1%}" for k in ("ttft", "tpot")))
    measured = f"{tables.release()}: systems/silicon_sample.csv"
    if trial is None:
        content: dict[str, Any] = {"measured": measured, "left_out": left_out, "rows": results}
        if only:  # these rows in place of those on file
            content = json.loads((RESULTS / "serving.json").read_text())
            made = {result["id"]: result | {"command": command()} for result in results}
            content["rows"] = [made.get(row["id"], row) for row in content["rows"]]
        save("serving", content)
    if trial is not None:
        file = RESULTS / "trials.json"
        before = json.loads(file.read_text())["trials"] if file.exists() else []
        once: dict[str, Any] = {"command": command()}
        once |= {"only": only, "trial": trial, "rows": results}
        save("trials", {"measured": measured, "trials": [*before, once]})


def line(r: dict[str, Any]) -> str:
    ttft, tpot = errors([r], "ttft")[0], errors([r], "tpot")[0]
    return (
        f"{r['group']} {r['input_length']}/{r['output_length']} c{r['concurrency']}:"
        f" TTFT {r['our_ttft_ms']:.0f} for {r['ttft_ms']:.0f} ({ttft:+.0%}),"
        f" TPOT {r['our_tpot_ms']:.1f} for {r['tpot_ms']:.1f} ({tpot:+.0%})"
        f"{' saturated' if r['saturated'] else ''}, {r['half']}, {r['seconds']:.0f} s"
    )


def errors(
    rows: list[dict[str, Any]], of: str, client_ms: float = CLIENT_MS
) -> np.ndarray[Any, Any]:
    """(ours - measured) / measured. ``our_ttft_ms`` ends where the engine gives the token, and
    what a client measures is ``client_ms`` more."""
    more_ms = client_ms if of == "ttft" else 0.0
    return np.array([(row[f"our_{of}_ms"] + more_ms) / row[f"{of}_ms"] - 1 for row in rows])


def mean_error(rows: list[dict[str, Any]], of: str, client_ms: float = CLIENT_MS) -> float:
    return float(np.mean(np.abs(errors(rows, of, client_ms))))


def sm_curve() -> None:
    """Decode on fewer SMs, by the A100 profile, beside a prefill; writes sm_curve.json."""
    from vllm_duet.roofline import Batch, GpuProfile, ModelShape, Roofline

    published = json.loads((HERE.parent / "tests/data/a100-decode-by-sms.json").read_text())
    profile = GpuProfile.load("a100-sxm-80g")
    roofline = Roofline(ModelShape.from_hf_config(published["config"]), profile)
    batch, prefill_sms = published["batch"], published["prefill_sms"]
    decode, prefill = Batch([1] * batch, [1000] * batch), Batch([2048], [0])
    rows = [
        {
            "sms": int(sms),
            "measured_ms": ms,
            "our_ms": roofline.predict_pair(decode, prefill, int(sms), prefill_sms).decode_ms,
        }
        for sms, ms in published["itl_ms_by_sms"].items()
    ]
    rows.append(
        {
            "sms": profile.num_sms,
            "measured_ms": published["itl_ms_unsplit"],
            "our_ms": roofline.predict(decode, profile.num_sms).ms,
        }
    )
    save("sm_curve", {"rows": rows} | {"measured": published["source"]})


def save(name: str, content: dict[str, Any]) -> None:
    from vllm_duet.sim.results import provenance

    RESULTS.mkdir(parents=True, exist_ok=True)
    # Where rows are made again, the file keeps its own; they have their command themselves.
    content = {"provenance": provenance(command())} | content
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def command() -> str:
    return shlex.join(["python", "eval/validation.py", *sys.argv[1:]])


def write_page() -> str:
    """docs/validation.md of the files under eval/results/validation."""
    serving = json.loads((RESULTS / "serving.json").read_text())
    curve = json.loads((RESULTS / "sm_curve.json").read_text())["rows"]
    rows = serving["rows"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    judged = [row for row in rows if not row["saturated"]]
    lines = [TOP.format(**numbers(rows, serving))]
    lines += table(
        ("rows", "measurements", "TTFT", "TPOT", "goal (15 %, 10 %)"),
        [
            (name, str(len(some)), error(some, "ttft"), error(some, "tpot"), goal(some))
            for name, some in (
                ("all that are not saturated", judged),
                ("of them, one half", of(judged, half="one")),
                ("of them, the other half", of(judged, half="other")),
                *(
                    (
                        f"{recipe.name}, {what}, {generation}",
                        [
                            row
                            for row in of(judged, recipe=recipe.name, dense=dense)
                            if row["system"].startswith(names)
                        ],
                    )
                    for recipe in (INFERENCE_MAX, GAP_ANALYSIS)
                    for what, dense in (("dense", True), ("mixture of experts", False))
                    for generation, names in (("Hopper", "h"), ("Blackwell", "b"))
                ),
                ("models added last", [row for row in judged if added_last(row)]),
                ("saturated (the KV cache is too small for all clients)", of(rows, saturated=True)),
            )
            if some
        ],
    )
    lines += [CLIENT.format(client_ms=CLIENT_MS)]
    lines += table(
        ("ms", "one half", "the other half"),
        [
            (f"{ms}", *(f"{mean_error(of(judged, half=half), 'ttft', ms):.0%}" for half in HALVES))
            for ms in (0, 6, 12, 18, 24, 30)
        ],
    )
    lines += [PUBLISHED]
    lines += table(
        ("GPU, model, ranks", "measurements", "saturated", "TTFT", "TPOT", "truth"),
        [
            (
                name,
                str(len(some)),
                str(len(of(some, saturated=True))),
                error(of(some, saturated=False), "ttft"),
                error(of(some, saturated=False), "tpot"),
                "roofline" if "roofline" in some[0]["truth"] else "measured",
            )
            for name, some in groups.items()
        ],
    )
    lines += [NOTES, "Left out of the measurements on file:", ""]
    lines += [f"* {n}: {why}" for why, n in sorted(serving["left_out"].items())]
    if (trials := RESULTS / "trials.json").exists():
        lines += [TRIALS]
        lines += table(
            ("rows", "trial", "measurements", "TTFT", "TPOT"),
            [
                (
                    each["only"],
                    f"`{json.dumps(each['trial'])}`",
                    str(len(each["rows"])),
                    error(each["rows"], "ttft"),
                    error(each["rows"], "tpot"),
                )
                for each in json.loads(trials.read_text())["trials"]
            ],
        )
    lines += padded_experts(rows)
    lines += [SM_CURVE]
    lines += table(
        ("SMs", "measured ms", "ours ms", "error"),
        [
            (
                str(row["sms"]),
                f"{row['measured_ms']:.2f}",
                f"{row['our_ms']:.2f}",
                f"{row['our_ms'] / row['measured_ms'] - 1:+.1%}",
            )
            for row in curve
        ],
    )
    operators = RESULTS / "operators.json"
    if operators.exists():
        lines += [OPERATORS]
    return "\n".join(lines) + "\n"


def padded_experts(rows: list[dict[str, Any]]) -> list[str]:
    """Qwen3-235B's TPOT with what a step of all clients takes longer by DEEP_GEMM's experts."""
    from vllm_duet.roofline import ModelShape

    cells: list[tuple[str, ...]] = []
    for result in rows:
        if "Qwen3-235B" not in result["model"]:
            continue
        row = Row(**{field.name: result[field.name] for field in fields(Row)})
        shape = ModelShape.from_hf_config(
            config_of(row), tensor_parallel_size=row.tp, weight_dtype=weight_dtype(row)
        )
        given = (shape, GPUS[row.system])
        step: tuple[list[int], list[int], list[int]]
        step = [row.input_length + row.output_length // 2] * row.concurrency, [], []
        tables_ms = MeasuredSteps(*given, expert_parallel=row.expert_parallel).step_ms(*step)
        supposed = Supposed(*given, expert_parallel=row.expert_parallel, **DEEP_GEMM)
        ours_ms = result["our_tpot_ms"] + supposed.step_ms(*step) - tables_ms
        cells.append(
            (
                f"{row.group}, {row.input_length}/{row.output_length}, {row.concurrency} clients",
                row.half,
                f"{row.tpot_ms:.1f}",
                f"{result['our_tpot_ms']:.1f} ({result['our_tpot_ms'] / row.tpot_ms - 1:+.0%})",
                f"{ours_ms:.1f} ({ours_ms / row.tpot_ms - 1:+.0%})",
            )
        )
    head = ("rows", "half", "measured TPOT ms", "ours", "with experts that pad")
    return [PADDED.format(**DEEP_GEMM), *table(head, cells)]


def of(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def added_last(row: dict[str, Any]) -> bool:
    """MiniMax-M2.5, Kimi-K2.5 and 4-bit Llama."""
    four_bit_llama = row["precision"] == "fp4" and "Llama" in row["model"]
    return four_bit_llama or row["model"].startswith(("MiniMax", "moonshotai"))


def error(rows: list[dict[str, Any]], of: str) -> str:
    """The mean absolute error, and the median in brackets with its sign."""
    if not rows:
        return ""
    return f"{mean_error(rows, of):.0%} ({np.median(errors(rows, of)):+.0%})"


def goal(rows: list[dict[str, Any]]) -> str:
    met = mean_error(rows, "ttft") <= 0.15, mean_error(rows, "tpot") <= 0.10
    return ", ".join("met" if each else "missed" for each in met)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def numbers(rows: list[dict[str, Any]], serving: dict[str, Any]) -> dict[str, Any]:
    return {
        "measured": serving["measured"],
        "count": len(rows),
        "per_group": PER_GROUP,
        "longest": LONGEST_OUTPUT,
        "clients": MOST_CLIENTS,
        "front_end_ms": FRONT_END_MS,
        "client_ms": CLIENT_MS,
        "tokenizer_us": TOKENIZER_US,
        "recipes": "\n".join(f"* {r.name}: {r.sources}." for r in (INFERENCE_MAX, GAP_ANALYSIS)),
    }


TOP = """# Validation

Made by `python eval/validation.py`; not to be edited. What others measured, beside what ours says.

## Whole systems

**Simulated beside measured.** Each row of {measured}
is a closed loop of clients against vLLM: mean TTFT and TPOT. Ours is the simulator with vLLM's own
scheduler and with NVIDIA's operator tables as the truth ([design.md](design.md), "The simulator").
{count} rows: up to {per_group} of each GPU, model, precision and number of ranks, taken by a hash
of their names, with answers of up to {longest} tokens and up to {clients} clients.

How they were run is not in the file. Taken from elsewhere:

{recipes}

Their TTFT is taken for the mean: only so InferenceMAX's rows agree with ten prompts a client, of
which the first come all at once.

Constants, and where they are from:

* {front_end_ms:g} ms a request and {tokenizer_us:g} us a token of its prompt in HTTP
  and tokenizer, one request after the other: assumed. What matters most is that it is not 0: a
  client's next request then misses the step that is scheduled when its answer ends.
* {client_ms:g} ms more until a client has its first token, one request beside the other: fitted to
  the TTFT of one half of the rows. From 10 to 24 ms the error of either half is within 3 points of
  its least; with 0 they are 5 and 7 points larger.
* What the CPU takes for a step: this project's measurement of stock vLLM on two CPU cores.
* 300 us a step on the GPU outside the model and 2 us for a small kernel: vllm_duet/sim/measured.py.

Nothing else was fitted by a method. Some choices were made with errors of rows from both halves in
sight: the front end's cost, where to look for how rows were run, that sizes in the tables of
all-reduces are elements (8-bit and 16-bit rows agree only so), the smoothing of disturbed
benchmarks, and the rules by which rows are left out. MiniMax-M2.5, Kimi-K2.5 and 4-bit Llama were
added before the two fits, and nothing was changed for them but that ranks sum MiniMax's squares of
Q and K. The halves are by a hash of the rows' names: constants are fitted to "one half" and judged
by "the other half".

Errors are mean absolute ones, in brackets the median with its sign: positive is too slow."""

CLIENT = """
TTFT by what is taken for client, HTTP and processes; {client_ms:g} ms is the best on one half:"""

PUBLISHED = """
Others' simulators, as published, on other rows than these: blis-evolved 23 % (TTFT) and 22 % (ITL),
Vidur 16 % and 11 % (Llama-2-7B alone), aiconfigurator 21 % (ITL).
"""

NOTES = """
Where ours is far off, and what was tried. "Trials" are below, with their errors.

* NVIDIA's gap analysis, TTFT: explained by how it sets vLLM up. With lengths that differ and vLLM's
  8192 tokens a step ours was a third short; with equal lengths alone, prompts of 1024 tokens wait
  for eight of them; with its own limit of a step as well, TTFT is met at every number of clients on
  eight GPUs. On two, prompts of 1024 tokens are still too slow, those of 4096 too fast.
* gpt-oss: explained by the kernel. InferenceMAX told vLLM to take Marlin (H100, H200, from 0.18) or
  mxfp8 activations (B200); the tables have vLLM's own choice of this model, and those two of other
  models, from which its times are derived. What is left is TTFT, and rows of November and December
  2025, of vLLM 0.11.
* Qwen3-235B: explained by the kernel, as far as the tables can say ("Experts that pad", below). A
  token takes 51 to 59 ms on two GPUs and 34 to 46 on four, for 4 clients as for 48. vLLM 0.12
  multiplies these experts by DeepGEMM, not by the tables' kernel, and gives it 127 rows for each
  expert beside the tokens' own, all of which it computes: rows that a step leaves empty are marked
  as the first expert's (its pull request 30494, after 0.12, marks them as empty). Experts then
  hardly depend on the clients, and the error of the half that nothing was fitted to falls from 37
  to 11 %. The rows above are without it: it was not simulated.
* InferenceMAX, TTFT: a part is the same on every GPU and for every model, some 18 ms between
  engine and client, fitted to one half of the rows; it takes the other half's error from 19 to 12
  %. What is left are prompts of 8192 tokens on Blackwell, which take 1.16 times ours (the middle
  half of the rows 1.10 to 1.21; on Hopper 1.08), at every number of ranks, for dense models and
  mixtures alike: not explained. And Llama's prompts of 1024 tokens on 4 and 8 B200 take 1.2 to 2.2
  times ours. Its script has no CUDA graph for a step with a prompt; that such a step then waits 43
  ms for the host (45 us a kernel) explains a third of it at 8 clients and an eighth at 64.
* Prefill on one Hopper GPU is some 15 % short where it is longest. That a benchmark is over before
  the GPU has to lower its clocks is a reading, not an experiment.
* Rows whose KV cache was too small in ours alone: the profiles held the memory of data sheets.
"""

TRIALS = """
## Trials

The same rows under other settings than the recipes' (`{}`: as the recipe has it); by
`eval/validation.py --only ... --trial ...`, in `eval/results/validation/trials.json`."""

PADDED = """
## Experts that pad

Qwen3-235B's TPOT of above, and with what a decode step of all clients takes longer when
each expert computes {padded_rows} rows more: the tables' time of as many rows, times {experts:g}
for another kernel. That factor is fitted to one half of these rows, and what prompts gain by it
is not in the figures."""

SM_CURVE = """
## Decode on fewer SMs

Qwen2.5-7B on an A100, batch 4, on green contexts, with prefill on 16 SMs beside it (108: nothing
beside it). Measured by asuan99/prefill-layer-alloc (FINDINGS_8B_2026-07-28.md, figures cited); ours
is the A100 profile's roofline, at 1,000 tokens a request beside a prompt of 2,048."""

OPERATORS = """
## Operators

How far forecasts are from the measured operators: `eval/results/validation/operators.json`."""


if __name__ == "__main__":
    typer.run(main)
