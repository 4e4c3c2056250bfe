# SPDX-License-Identifier: Apache-2.0
"""Which of AGGREGATED, CAPPED and SPLIT a step should be.

Policies are pure: numbers of the batch in, a DuetPlan out. They import neither
torch nor vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from vllm_duet.plan import DuetPlan, Mode


class Policy(Protocol):
    """Decides one step that has both decode and prefill work."""

    def decide(
        self,
        decode_context_lens: Sequence[int],
        prefill_query_lens: Sequence[int],
        prefill_context_lens: Sequence[int],
        *,
        can_split: bool,
    ) -> DuetPlan:
        """Decide for the batch vLLM would run.

        ``decode_context_lens`` [num_decodes] and ``prefill_context_lens``
        [num_prefills] are tokens already in the KV cache; the decodes compute
        one token each, the prefills ``prefill_query_lens`` [num_prefills].
        None of them is empty. With ``can_split`` false the plan is never SPLIT.
        """


class FixedModePolicy:
    """The same mode at every step, whatever the forecast: for tests and baselines.

    ``decode_sms`` and ``prefill_sms`` are the groups of a SPLIT,
    ``max_prefill_tokens`` the cap of a CAPPED step.
    """

    def __init__(
        self, mode: Mode, decode_sms: int, prefill_sms: int, max_prefill_tokens: int
    ) -> None:
        self._plan = DuetPlan(
            mode,
            reason=f"mode is set to {mode}",
            decode_sms=decode_sms if mode is Mode.SPLIT else 0,
            prefill_sms=prefill_sms if mode is Mode.SPLIT else 0,
            max_prefill_tokens=max_prefill_tokens if mode is Mode.CAPPED else None,
        )

    def decide(
        self,
        decode_context_lens: Sequence[int],
        prefill_query_lens: Sequence[int],
        prefill_context_lens: Sequence[int],
        *,
        can_split: bool,
    ) -> DuetPlan:
        if self._plan.mode is Mode.SPLIT and not can_split:
            return DuetPlan(Mode.AGGREGATED, reason="this batch cannot be split")
        return self._plan


class RandomPolicy:
    """A plan drawn from a seeded generator at every step: for tests.

    Correct output must not depend on the plan, so any draw has to give the
    tokens that stock vLLM gives.
    """

    def __init__(self, seed: int, decode_sms: Sequence[int], num_sms: int) -> None:
        self._random = random.Random(seed)
        self._decode_sms = decode_sms
        self._num_sms = num_sms

    def decide(
        self,
        decode_context_lens: Sequence[int],
        prefill_query_lens: Sequence[int],
        prefill_context_lens: Sequence[int],
        *,
        can_split: bool,
    ) -> DuetPlan:
        modes = [Mode.AGGREGATED, Mode.CAPPED] + [Mode.SPLIT] * (2 if can_split else 0)
        mode = self._random.choice(modes)
        if mode is Mode.AGGREGATED:
            return DuetPlan(mode, reason="random")
        cap = self._random.randint(1, max(1, sum(prefill_query_lens)))
        if mode is Mode.CAPPED:
            return DuetPlan(mode, reason="random", max_prefill_tokens=cap)
        decode_sms = self._random.choice(self._decode_sms)
        return DuetPlan(
            mode,
            reason="random",
            decode_sms=decode_sms,
            prefill_sms=self._num_sms - decode_sms,
            max_prefill_tokens=self._random.choice([None, cap]),
        )
