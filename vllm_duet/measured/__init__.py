# SPDX-License-Identifier: Apache-2.0
"""Operator times that others have measured: what profiles are fitted to and the simulator's truth.

Needs ``pip install vllm-duet[measured]``. Nothing here is imported to serve.
"""
