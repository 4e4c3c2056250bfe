# SPDX-License-Identifier: Apache-2.0
"""What SPLIT does not support yet. Such a step runs AGGREGATED or CAPPED.

Works on any object with the fields of ``vllm.config.VllmConfig``.
"""

from __future__ import annotations

from typing import Any


def split_blockers(vllm_config: Any, kv_cache_config: Any = None) -> list[str]:
    """Why steps of this engine cannot be split, a short clause each; empty if they can."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    checks = {
        "Model Runner V2 is off": not vllm_config.use_v2_model_runner,
        "another worker class than vLLM's own is set": not str(parallel.worker_cls).startswith(
            "vllm_duet."
        ),
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.enable_dbo,
        "expert load balancing": parallel.enable_eplb,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "an encoder cache connector": vllm_config.ec_transfer_config is not None,
        "auxiliary outputs": vllm_config.aux_output_config.enabled,
        "watermarking": vllm_config.watermark_config is not None,
        "KV-sharing fast prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "a multimodal model": model.supports_multimodal_inputs or model.uses_mrope,
        "prompt embeddings": model.enable_prompt_embeds,
        "an encoder-decoder model": model.is_encoder_decoder,
        "a pooling model": model.runner_type == "pooling",
        "a diffusion model": model.is_diffusion,
        "state-space layers": kv_cache_config is not None and kv_cache_config.has_mamba_layers,
        "the CUDA lanes are not in this version": vllm_config.device_config.device_type != "cpu",
    }
    return [clause for clause, blocked in checks.items() if blocked]
