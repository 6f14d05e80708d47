"""The dimensions of well-known models, so that a run can be planned without downloading anything.

Only what sizes follow from; the configuration that comes with the weights is what a run uses.
"""

from collections.abc import Mapping
from typing import Any

_BFLOAT16, _FLOAT16 = {"dtype": "bfloat16"}, {"dtype": "float16"}


def _opt(hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
        **_FLOAT16,
        **others,
    }


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        **_FLOAT16,
        **others,
    }


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    own = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, **_BFLOAT16}
    return _llama(hidden, intermediate, layers, heads, **{**own, **others})


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        **_BFLOAT16,
    }


KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "gpt2": {"model_type": "gpt2", "dtype": "float32"},
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        **_BFLOAT16,
    },
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, max_position_embeddings=131072, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, max_position_embeddings=131072, tie_word_embeddings=True),
    "llama-3-8b": _llama3(4096, 14336, 32, 32),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-2-7b": _llama(4096, 11008, 32, 32, max_position_embeddings=4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, max_position_embeddings=4096),
}
