# SPDX-License-Identifier: Apache-2.0
"""A DuetScheduler that writes down every step: what was forecast of it, and what it took.

FORECASTS=steps.jsonl PYTHONPATH=eval ... --scheduler-cls watched_scheduler.WatchedScheduler
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from vllm_duet import DuetScheduler
from vllm_duet.roofline import Batch
from vllm_duet.support import reported_roofline


class WatchedScheduler(DuetScheduler):
    """For engines whose steps were measured at start and run one after the other."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        roofline = reported_roofline(vllm_config)
        assert roofline is not None, "no steps were measured at start"
        self._forecasts = roofline
        self._file = Path(os.environ["FORECASTS"]).open("a", buffering=1)  # noqa: SIM115
        self._started_at = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        self._started_at = time.monotonic()
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any) -> Any:
        ms = 1e3 * (time.monotonic() - self._started_at)
        if tokens := scheduler_output.num_scheduled_tokens:
            cached = scheduler_output.scheduled_cached_reqs
            contexts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for new in scheduler_output.scheduled_new_reqs:
                contexts[new.req_id] = new.num_computed_tokens
            batch = Batch(list(tokens.values()), [contexts[name] for name in tokens])
            summary = self._forecasts.summarize(batch)
            step = {
                "decodes": int(summary.decode_tokens),
                "prompt_tokens": int(summary.prefill_tokens),
                "forecast_ms": self._forecasts.step_ms(summary, self._forecasts.profile.num_sms),
                "ms": ms,
            }
            print(json.dumps(step), file=self._file)
        return super().update_from_output(scheduler_output, *args)
