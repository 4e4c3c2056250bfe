# SPDX-License-Identifier: Apache-2.0
"""eval/gpu/microbench.py, as far as a GPU without results of kernels goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from process import environment

ROOT = Path(__file__).parents[2]
BY_SM_IDS = {"groups", "captured_launches"}
"""What a kernel has to write down, and here no kernel writes."""


def test_facts_are_found_and_what_fails_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "results" / "m.json"
    variables = environment(kernel_us=200, strict=True, sms=40)
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval/gpu/microbench.py"), "--out", str(out)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["provenance"]["label"] == "measured" and results["provenance"]["git_commit"]
    facts = results["facts"]
    failed = {name: fact["error"] for name, fact in facts.items() if "error" in fact}
    assert failed.keys() == BY_SM_IDS, failed
    assert all("did not write down their SM" in error for error in failed.values())

    assert facts["events_across_groups"]["ordered"]
    rates = facts["rates"]["groups"]
    assert {group["num_sms"] for group in rates} == {8, 16, 24, 32, 40}
    assert all(group["tflops"] > 0 and group["gb_per_s"] > 0 for group in rates)
    pairs = facts["contention"]["pairs"]
    assert {sum(pair["num_sms"]) for pair in pairs} == {40} and len(pairs) == 3 * 4
    settings = facts["launch_beside_a_long_queue"]["settings"]
    asked = [(s["separate_work_queues"], s["decode_priority"]) for s in settings]
    assert asked == [(True, 0), (True, -1), (False, 0), (False, -1)]
