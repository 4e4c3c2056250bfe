# SPDX-License-Identifier: Apache-2.0
"""Times of single kernels of vLLM on GPUs, measured by NVIDIA.

They are the tables of aiconfigurator-core (Apache-2.0, on PyPI), one Parquet file for each GPU,
operator and release of vLLM: microbenchmarks in CUDA graphs, on all SMs. This module finds
and reads the files; what the columns mean for a model is for its callers to know.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Literal

import pandas as pd
from packaging.version import Version

from vllm_duet.roofline.layer_shapes import LatentShape

SYSTEMS = {
    "a100-sxm-80g": "a100_sxm",
    "h100-sxm": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
"""Our profiles' names, and the names that the tables have for these GPUs."""

CUSTOM_ALL_REDUCE_BYTES = 8 << 20
"""Up to here vLLM sums by its own kernel, beyond by NCCL. Source: CustomAllreduce.max_size."""

COLLECTIVE_ELEMENT_BYTES = 2
"""``message_size`` in the tables of collectives counts elements, of 16 bits but for NCCL's rows of
8 bits: 2^29 of those take what 2^28 of 16 bits do, and as bytes two H100 would not pass 160 GB/s
over NVLink."""

EXPERT_DTYPES = {"mxfp4": "w4a16_mxfp4", "int4": "int4_wo"}
"""What the table of experts calls weights that it has under another name than ours."""

MOE_BACKENDS = {
    "marlin": ("w4a16_mxfp4", "_marlin_"),
    "flashinfer_trtllm_afp8": ("w4a8_mxfp4_mxfp8", "_flashinfer_trtllm_mxfp4_mxfp8_"),
}
"""Kernels for mxfp4 experts that vLLM takes only when told to, as its ``--moe-backend`` or, before
0.19, VLLM_MXFP4_USE_MARLIN and VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8: their dtype, and what their
``kernel_source`` contains. All other rows are of vLLM's own choice on that GPU."""

EXPERT_MULTIPLES = (256, 128)
"""Of what the hidden size and a rank's width of an expert are padded to, with either of those.
Source: vLLM's mxfp4_round_up_hidden_size_and_intermediate_size."""

LATENT_HIDDEN_SIZE, LATENT = 7168, LatentShape(1536, 512, 128, 64, 128)
"""Whose modules of latent attention were measured: DeepSeek-V3's."""

Table = Literal[
    "gemm",
    "context_attention",
    "generation_attention",
    "mla_context_module",
    "mla_generation_module",
    "dsa_context_module",
    "dsa_generation_module",
    "moe",
    "gdn",
    "custom_allreduce",
    "nccl",
]


class NotMeasuredError(LookupError):
    """There is no such table for this GPU, or no tables at all; the message says which."""


def release() -> str:
    """Whose tables these are, for a file that is made from them.

    Raises:
        NotMeasuredError: aiconfigurator-core is not installed.
    """
    try:
        return f"NVIDIA's aiconfigurator-core {metadata.version('aiconfigurator-core')}"
    except metadata.PackageNotFoundError:
        raise NotMeasuredError(
            "measured operator times need aiconfigurator-core: pip install 'vllm-duet[measured]'"
        ) from None


def systems_folder() -> Path:
    """The folder ``systems`` of aiconfigurator-core.

    Raises:
        NotMeasuredError: aiconfigurator-core is not installed.
    """
    release()
    # Located, not imported: its __init__ loads a library of 8 MB.
    found = metadata.distribution("aiconfigurator-core").locate_file("aiconfigurator_core/systems")
    return Path(str(found))


@functools.cache
def read(gpu: str, table: Table) -> pd.DataFrame:
    """The newest table of an operator on a GPU, ``gpu`` being a name in SYSTEMS.

    Columns as in the file, but ``latency`` is ``ms``, and attention has a ``window_size``, 0 where
    a table knows of none. ``kernel_source`` names the kernel that
    vLLM chose for a case. ``attrs["source"]`` names tables, GPU, and release of vLLM. Callers
    must not change what they get.

    Raises:
        NotMeasuredError: nobody has measured it.
    """
    if gpu not in SYSTEMS:
        raise NotMeasuredError(
            f"nothing is measured on {gpu}; on {', '.join(SYSTEMS)} something is"
        )
    folder = systems_folder() / "data" / SYSTEMS[gpu]
    framework = "nccl" if table == "nccl" else "vllm"
    files = sorted(
        folder.glob(f"*/{framework}/*/{table}_perf.parquet"),
        key=lambda file: Version(file.parent.name),
    )
    if not files:
        raise NotMeasuredError(f"{release()} has no table {table} for {gpu}")
    found = pd.read_parquet(files[-1]).rename(columns={"latency": "ms"})
    if table.endswith("_attention") and "window_size" not in found:
        found["window_size"] = 0
    of = "NCCL" if table == "nccl" else "vLLM"
    found.attrs["source"] = f"{release()}, {SYSTEMS[gpu]}, {of} {files[-1].parent.name}"
    return found
