# SPDX-License-Identifier: Apache-2.0
"""The driver half of the back end: active exactly when the interpreter is on."""

import os
from typing import Any

from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the interpreter compiles nothing")

    def get_current_target(self) -> Any:
        raise NotImplementedError("the interpreter has no target")

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("interpreted kernels are not timed")
