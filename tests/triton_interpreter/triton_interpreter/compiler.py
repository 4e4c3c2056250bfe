# SPDX-License-Identifier: Apache-2.0
"""The compiler half of the back end: never reached, since kernels are interpreted."""

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return False

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("the interpreter compiles nothing")

    def add_stages(self, stages: dict, options: object, language: Any = None) -> None:
        raise NotImplementedError("the interpreter compiles nothing")

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError("the interpreter compiles nothing")

    def get_module_map(self) -> dict:
        return {}
