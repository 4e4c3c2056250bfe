# SPDX-License-Identifier: Apache-2.0
"""DuetScheduler without a server: one long prompt among short ones.

    python examples/offline.py                     # Qwen/Qwen3-8B, on a GPU
    python examples/offline.py --model FOLDER --mode split --eager

On a CPU, set the variables that cpu_server.py lists first.
"""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams

QUESTIONS = ["What is a prefix cache?", "Name three prime numbers.", "Why is the sky blue?"]
LONG_PROMPT = "Count the words: " + "to be or not to be " * 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--mode", default="auto", help="auto, aggregated, capped or split")
    parser.add_argument("--eager", action="store_true", help="no compilation; a CPU needs it")
    arguments = parser.parse_args()

    llm = LLM(
        arguments.model,
        max_model_len=2048,
        enforce_eager=arguments.eager,
        scheduler_cls="vllm_duet.DuetScheduler",
        additional_config={"duet": {"tbt_slo_ms": 50, "mode": arguments.mode}},
    )
    prompts = [*QUESTIONS, LONG_PROMPT]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for prompt, answer in zip(
        prompts,
        llm.chat(conversations, SamplingParams(temperature=0, max_tokens=40)),
        strict=True,
    ):
        print(f"> {prompt:.60}\n{answer.outputs[0].text}\n")


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    main()
