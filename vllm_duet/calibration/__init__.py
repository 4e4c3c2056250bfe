# SPDX-License-Identifier: Apache-2.0
"""Measures what a GPU does with part of its SMs, and writes it as a GPU profile.

The way through: ``experiments`` and ``facts`` list steps; ``session`` runs them on a
``Device`` and keeps their records; ``fit`` makes a profile of the records. Only
``cuda`` and ``triton_kernels`` import torch and Triton, and nothing here imports vLLM.
"""
