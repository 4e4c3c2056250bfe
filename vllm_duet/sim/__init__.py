# SPDX-License-Identifier: Apache-2.0
"""A simulator in virtual time that drives vLLM's own scheduler classes.

The scheduler, its KV-cache manager and its prefix cache are the real objects; only
the GPU is simulated (executor.py), and what the CPU takes (engine.py).
"""
