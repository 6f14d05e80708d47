"""Tiny random models of several architectures, saved as ordinary model folders."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 96
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
WIDE = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDE),
    "llama-tied": lambda: LlamaConfig(**WIDE, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(
        **COMMON, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4),
    "qwen3": lambda: Qwen3Config(**WIDE, head_dim=8),
    # Sliding-window and full-attention blocks alternate, with different rotary tables and masks.
    "gemma3": lambda: Gemma3TextConfig(
        **WIDE | {"num_hidden_layers": 4},
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral": lambda: MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **WIDE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt_oss": lambda: GptOssConfig(**WIDE, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "llama4_text": lambda: Llama4TextConfig(
        **WIDE,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
        attention_chunk_size=8,
    ),
    # Latent attention; a dense block comes before those with experts, which share one expert.
    "deepseek_v3": lambda: DeepseekV3Config(
        **WIDE | {"num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    # Matrices of all experts joined, and the routers' inputs are not flattened.
    "dbrx": lambda: DbrxConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    # Two of six experts return their input; two attentions and two dense layers beside the experts.
    "longcat_flash": lambda: LongcatFlashConfig(
        **COMMON,
        hidden_size=32,
        ffn_hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=24,
    ),
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A function from an architecture's name to the folder of a tiny random model of it."""
    folders = {}

    def make(name):
        if name not in folders:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            with torch.no_grad():  # biases and norms start at constants, which would hide a missing load
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name], max_shard_size="40KB")
        return folders[name]

    return make


@pytest.fixture(scope="session")
def token_ids():
    """(12, 24) random token ids."""
    return torch.randint(VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(1))
