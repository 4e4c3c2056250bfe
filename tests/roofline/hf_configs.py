# SPDX-License-Identifier: Apache-2.0
"""Hugging Face configs of well-known models: the keys that decide the shape."""

from typing import Any

Config = dict[str, Any]


def config(architecture: str, **keys: Any) -> Config:
    return {"architectures": [architecture], "torch_dtype": "bfloat16", **keys}


LLAMA2_7B = config(
    "LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
)
LLAMA3_8B = config(
    "LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
QWEN3_8B = config(
    "Qwen3ForCausalLM",
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=False,
    use_sliding_window=False,
    sliding_window=None,
    max_window_layers=36,
)
MISTRAL_7B = config(
    "MistralForCausalLM",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    sliding_window=4096,
)
PHI3_MINI = config(
    "Phi3ForCausalLM",
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    sliding_window=2047,
)
GEMMA2_9B = config(
    "Gemma2ForCausalLM",
    hidden_size=3584,
    intermediate_size=14336,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    vocab_size=256000,
    sliding_window=4096,
)
GEMMA3_1B = config(
    "Gemma3ForCausalLM",
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=262144,
    sliding_window=512,
    sliding_window_pattern=6,
)
MIXTRAL_8X7B = config(
    "MixtralForCausalLM",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=None,
)
QWEN3_30B_A3B = config(
    "Qwen3MoeForCausalLM",
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=151936,
    num_experts=128,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
QWEN2_57B_A14B = config(
    "Qwen2MoeForCausalLM",
    hidden_size=3584,
    intermediate_size=18944,
    moe_intermediate_size=2560,
    shared_expert_intermediate_size=20480,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=151936,
    num_experts=64,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
)
DEEPSEEK_V2_LITE = config(
    "DeepseekV2ForCausalLM",
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=102400,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
)
DEEPSEEK_V3 = config(
    "DeepseekV3ForCausalLM",
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    vocab_size=129280,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
)

ALL = {
    "llama2-7b": LLAMA2_7B,
    "llama3-8b": LLAMA3_8B,
    "qwen3-8b": QWEN3_8B,
    "mistral-7b": MISTRAL_7B,
    "phi3-mini": PHI3_MINI,
    "gemma2-9b": GEMMA2_9B,
    "gemma3-1b": GEMMA3_1B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen2-57b-a14b": QWEN2_57B_A14B,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v3": DEEPSEEK_V3,
}
