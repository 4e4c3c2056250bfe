# SPDX-License-Identifier: Apache-2.0
"""Executing a step, in the worker's process: ``gpu`` on a GPU, ``cpu`` without one.

Neither imports the other. vLLM's CPU worker replaces torch.cuda's streams and events for the
whole process at import, and a GPU's worker needs the real ones.
"""
