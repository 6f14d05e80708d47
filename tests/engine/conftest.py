"""Tiny random models of several architectures, saved as ordinary model folders."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
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
