# SPDX-License-Identifier: Apache-2.0
"""Draws of requests as plain data, for the modelled device and for the real engine."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Draw:
    """A request: ``shared`` tokens that others begin with, too, and ``own`` ones."""

    shared: int
    own: int
    max_tokens: int
    priority: int


ANSWERS = st.one_of(st.integers(1, 3), st.integers(1, 24))


def requests(block_size: int, longest: int, answers: st.SearchStrategy[int] = ANSWERS):
    """Prompts of up to ``longest`` own tokens; those without any may be cached wholly."""
    shared = st.sampled_from([0, 0, 1, 2, 4, 8]).map(lambda blocks: blocks * block_size)
    own = st.one_of(st.just(0), st.integers(1, 3 * block_size), st.integers(1, longest))
    return st.builds(Draw, shared, own, answers, st.integers(0, 2)).filter(
        lambda draw: draw.shared + draw.own > 0
    )
