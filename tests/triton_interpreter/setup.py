# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's Triton kernels run on a machine without a GPU, for the tests.

vLLM turns Triton off unless one of Triton's back ends reports itself active.
This distribution adds, by Triton's own entry point, a back end named "cpu"
that does; the kernels then run in Triton's interpreter (TRITON_INTERPRET=1).
Install it only in a test environment.
"""

from setuptools import setup

setup(
    name="vllm-duet-triton-interpreter",
    version="1.0",
    packages=["triton_interpreter"],
    entry_points={"triton.backends": ["cpu = triton_interpreter"]},
)
