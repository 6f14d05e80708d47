"""Which causal LM architectures of transformers are streamed exactly, and why the others are refused.

A tiny random model of each type is saved as a sharded folder, streamed block by block from it, and compared with
the plain forward pass bit for bit: without and with left padding, and gone on with in the middle from stored hidden
states. The table is `architectures.md` beside this file.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantlab.engine.drive import open_driver
from quantlab.engine.linears import find_linears
from quantlab.engine.recall import Recall
from quantlab.engine.survey import survey_model
from quantlab.errors import ModelError
from quantlab.experts import fused_experts, unfuse
from quantlab.skeleton import WeightSource, build_skeleton, find_blocks, read_config, unload

TABLE = Path(__file__).with_name("architectures.md")

# Values for whatever names the configuration of a type uses for its sizes.
SIZES = {
    96: "vocab_size vocab_size_per_layer_input",
    64: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff intermediate_size_mlp dense_intermediate_size "
    "block_ff_dim max_position_embeddings n_positions max_seq_len seq_length n_ctx mamba_d_ssm",
    32: "hidden_size d_model n_embd dim model_dim emb_dim embedding_size word_embed_proj_dim attention_hidden_size "
    "lru_width",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size mamba_d_head mamba_head_dim mamba_headdim",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank kv_channels d_kv "
    "attention_head_dim global_head_dim swa_head_dim swa_v_head_dim sliding_window attention_window_size window_size "
    "mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim "
    "index_head_dim index_topk hidden_size_per_layer_input block_size",
    4: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads "
    "mamba_num_heads mamba_dt_rank time_step_rank n_mamba_heads linear_num_value_heads rotary_dim",
    2: "num_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_top_k moe_topk moe_k top_k_experts "
    "num_experts_per_token linear_num_key_heads index_n_heads eos_token_id",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace zero_expert_num "
    "mamba_n_groups n_groups bos_token_id",
    0: "pad_token_id",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}

_GEMMA3N = {
    "intermediate_size": 64,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": None,
    "laurel_rank": 8,
}
_DOTS3 = {
    "per_layer_config": {},
    "shared_experts_intermediate_size": 16,
    "head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
}
_QWEN4 = {
    "ngram_vocab_size_base": 100,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_embed_dim": 32,
    "hc_lowrank": 8,
}
_ZAMBA = {"num_hidden_layers": 6, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}
# What the sizes alone do not settle.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "intermediate_size": 1024,
        "audio_config": {
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "num_blocks": 1,
            "intermediate_size": 32,
            "depthwise_separable_out_channel": 32,
        },
        "vision_config": {"num_hidden_layers": 1},
    },
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "concat_input": False},
    "rwkv": {"rescale_every": 2},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attn_layer_period": 3, "attn_layer_offset": 1},
    "zamba2": {**_ZAMBA, "layer_types": ["mamba", "hybrid", "mamba"] * 2, "hybrid_layer_ids": [1, 4]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

NOT_TRIED = {
    "blt": "reads bytes through a second model",
    "gemma3n": "its vision tower needs Pillow and timm; its text decoder is gemma3n_text",
    "gemma4_assistant": "drafts for another model and needs its keys and values",
    "gemma4_unified_assistant": "drafts for another model and needs its keys and values",
    "musicgen": "decodes audio codes of several codebooks",
    "musicgen_melody": "decodes audio codes of several codebooks",
}
REFUSED = {
    "emu3": "architecture 'emu3_text_model' is not a causal language model",
    "git": "no list of decoder blocks found",
    "hrm_text": "no list of decoder blocks found",
    "mllama": "architecture 'mllama_text_model' is not a causal language model",
    "reformer": "its blocks return ReformerOutput, not hidden states",
    "rwkv": "the forward pass changes the weights of the model",
    "xlm": "no list of decoder blocks found",
    "zamba": "the blocks share weights",
    "zamba2": "the blocks share weights",
}
# Streamed exactly, but refused by runs: the weights of their experts cannot be taken apart into linear layers.
FUSED = {"jetmoe"}
SUSPENDED = {"glm_moe_dsa", "hy_v4", "zaya"}
REPLAYED = {
    "deepseek_v4",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
} | SUSPENDED

REPRESENTATIVE = [
    "deepseek_v3",  # latent attention; experts after a dense block
    "falcon_h1",  # attention and state space side by side
    "gemma3",  # a vision tower; sliding and full attention
    "gemma3n_text",  # keys and values shared between blocks; per-block inputs
    "gpt_oss",  # sliding window, attention sinks, transposed experts
    "hy_v4",  # blocks hand on more than hidden states
    "jamba",  # mamba, attention and experts
    "mpt",  # blocks return tuples
    "openai-gpt",  # blocks return lists; Conv1D
    "qwen3_next",  # linear attention
    "rwkv",
    "zamba2",
]


@dataclass(frozen=True)
class Outcome:
    """How a model was streamed."""

    mode: str
    replay: bool
    middle: torch.Tensor
    logits: torch.Tensor


def tiny_config(model_type: str) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    return _shrink(config_class, config_class(), OVERRIDES.get(model_type, {}))


def _shrink(config_class: Any, default: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    values = default.to_dict()
    names = {*inspect.signature(config_class.__init__).parameters, *values}
    special = {"pad_token_id", "bos_token_id", "eos_token_id"}
    changes = {
        name: size
        for name, size in SIZE_OF.items()
        if name in names
        and (values.get(name) is not None or name in special)
        and not isinstance(values.get(name), list | dict)
    }
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    parts = {
        name: _shrink(type(part), part, overrides.get(name, {})).to_dict()
        for name in getattr(config_class, "sub_configs", None) or ()
        if isinstance(part := getattr(default, name, None), PretrainedConfig)
    }
    own = {name: value for name, value in overrides.items() if name not in parts}
    return config_class(**changes | own | parts)


def save_tiny_model(model_type: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    for parameter in model.parameters():  # biases and norms start at constants, which would hide a missing load
        parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def stream(
    folder: Path, input_ids: torch.Tensor, mask: torch.Tensor | None, middle: torch.Tensor | None = None
) -> Outcome:
    """Load, run twice and unload one block after the other; starts with the second half if given its input."""
    model = build_skeleton(read_config(folder), torch.float32)
    _, blocks = find_blocks(model)
    weights = WeightSource(folder, model, torch.float32)
    weights.load_rest()
    weights.load_block(0)
    with open_driver(model, blocks, input_ids[:1]) as driver:
        hidden, batch = driver.record(input_ids, mask)
        start = 0
        if middle is not None and not driver.replay_on_resume:
            start, hidden = len(blocks) // 2, middle
        if driver.mode == "record":
            weights.unload_rest()
        for index in range(start, len(blocks)):
            weights.load_block(index)
            driver.run_block(index, hidden, batch)
            output = driver.run_block(index, hidden, batch)
            unload(blocks[index])
            if index + 1 == len(blocks) // 2:
                middle = output.clone()
            hidden = driver.advance(index, output, batch)
        weights.load_rest()
        return Outcome(driver.mode, driver.replay_on_resume, middle, driver.finish(batch, output))


@torch.no_grad()
def require_exact(model_type: str, folder: Path) -> Outcome:
    """Stream a tiny model of the type and compare; the outcome without padding."""
    model = save_tiny_model(model_type, folder)
    input_ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    padded = torch.ones_like(input_ids)
    padded[1, :5] = 0
    outcome = stream(folder, input_ids, None)
    resumed = stream(folder, input_ids, None, outcome.middle)
    cases = {
        "plain": (outcome, None),
        "resumed": (resumed, None),
        "padded": (stream(folder, input_ids, padded), padded),
    }
    for case, (actual, mask) in cases.items():
        expected = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        real = expected if mask is None else expected[mask.bool()]
        assert real.isfinite().all(), f"{model_type}, {case}"
        assert torch.equal(actual.logits.nan_to_num(), expected.nan_to_num()), f"{model_type}, {case}"
    return outcome


@torch.no_grad()
def keeps_fused_experts(model_type: str) -> bool:
    """Whether weights of experts are in no linear layer even after taking apart what can be."""
    model = build_skeleton(tiny_config(model_type), torch.float32)
    unfuse(model, fused_experts(model))
    linear = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    return any(
        re.search(r"\.(experts|(in|out)put_linear)\.", name) and parameter.ndim > 1 and id(parameter) not in linear
        for name, parameter in find_blocks(model)[1].named_parameters()
    )


def render(outcomes: dict[str, Outcome], refused: dict[str, str]) -> str:
    """The table as Markdown."""
    groups = {
        "exact": {name for name, outcome in outcomes.items() if not outcome.replay},
        "exact; a resumed run replays the finished blocks, which hand on more than hidden states": {
            name for name, outcome in outcomes.items() if outcome.replay
        },
    }
    lines = [
        f"Streamed block by block from a sharded folder against the plain forward pass, bit for bit, with and without "
        f"left padding and after resuming in the middle: {len(outcomes)} of the "
        f"{len(outcomes) + len(refused)} causal LM types of transformers {transformers.__version__} that were tried "
        f"are exact, {len(refused)} are refused, {len(NOT_TRIED)} were not tried.",
        "",
        "| Streaming | Types | |",
        "|---|---|---|",
        *(f"| {label} | {', '.join(sorted(names))} | {len(names)} |" for label, names in groups.items()),
        f"| exact, but not quantized: experts of a layout of their own | {', '.join(sorted(FUSED))} | {len(FUSED)} |",
        *(f"| refused: {reason} | {name} | 1 |" for name, reason in sorted(refused.items())),
        *(f"| not tried: {reason} | {name} | 1 |" for name, reason in sorted(NOT_TRIED.items())),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_model_is_streamed_exactly_or_refused_with_the_reason(model_type, tmp_path):
    if model_type in REFUSED:
        with pytest.raises(ModelError, match=re.escape(REFUSED[model_type])):
            require_exact(model_type, tmp_path)
        return
    outcome = require_exact(model_type, tmp_path)
    assert outcome.mode == ("suspend" if model_type in SUSPENDED else "record")
    assert outcome.replay == (model_type in REPLAYED)


@pytest.mark.slow
def test_every_causal_lm_of_transformers_is_streamed_exactly_or_refused(tmp_path):
    outcomes, refused, fused = {}, {}, set()
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_TRIED)):
        try:
            outcomes[model_type] = require_exact(model_type, tmp_path / model_type)
        except ModelError as error:
            refused[model_type] = str(error)
        else:
            fused |= {model_type} if keeps_fused_experts(model_type) else set()
    assert refused.keys() == REFUSED.keys()
    assert all(reason in refused[model_type] for model_type, reason in REFUSED.items())
    assert {name for name, outcome in outcomes.items() if outcome.mode == "suspend"} == SUSPENDED
    assert {name for name, outcome in outcomes.items() if outcome.replay} == REPLAYED
    assert fused == FUSED
    table = tmp_path / TABLE.name
    table.write_text(render(outcomes, REFUSED))
    assert table.read_text() == TABLE.read_text(), f"the table has changed; if that is right, copy {table} to {TABLE}"


@pytest.mark.parametrize("model_type", sorted(FUSED))
def test_a_model_whose_experts_cannot_be_taken_apart_is_refused_before_its_weights_are_read(model_type):
    with pytest.raises(ModelError, match=r"only \d+% of its .* weights are in linear layers or in experts of a known"):
        survey_model(tiny_config(model_type), torch.float32)


def test_the_table_names_every_type_and_every_refusal():
    table = TABLE.read_text()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert re.search(rf"[|,] {re.escape(model_type)}(,| \|)", table), model_type
    for model_type, reason in REFUSED.items():
        assert f"| refused: {reason} | {model_type} |" in table


@torch.no_grad()
def require_the_same_with_recall(model_type, folder):
    """Every block of a tiny model answers two batches alternately as it does without, whatever it keeps to itself."""
    save_tiny_model(model_type, folder)
    model = build_skeleton(read_config(folder), torch.float32)
    _, blocks = find_blocks(model)
    weights = WeightSource(folder, model, torch.float32)
    weights.load_rest()
    weights.load_block(0)
    texts = [torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    with open_driver(model, blocks, texts[0][:1]) as driver:
        if driver.mode != "record" or driver.replay_on_resume:
            return
        hidden, recorded = map(list, zip(*[driver.record(text) for text in texts], strict=True))
        for index, block in enumerate(blocks):
            weights.load_block(index)
            pairs = list(zip(hidden, recorded, strict=True))
            expected = [driver.run_block(index, *pair) for pair in pairs]
            linears = find_linears(block)
            recall = Recall(block, linears)
            for layer in linears:
                recall.note_solved(layer)
            for last in (False, False, True):
                if last:
                    recall.begin_last_pass()
                for batch, (entering, arguments) in enumerate(pairs):
                    with recall.of_batch(batch, entering):
                        output = driver.run_block(index, entering, arguments)
                    assert torch.equal(output, expected[batch]), f"{model_type}, block {index}, batch {batch}"
            hidden = [driver.advance(index, *pair) for pair in zip(expected, recorded, strict=True)]


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_model_answers_the_same_where_parts_are_not_run_again(model_type, tmp_path):
    if model_type not in REFUSED:
        require_the_same_with_recall(model_type, tmp_path)


@pytest.mark.slow
def test_every_causal_lm_of_transformers_answers_the_same_where_parts_are_not_run_again(tmp_path):
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_TRIED) - set(REFUSED)):
        require_the_same_with_recall(model_type, tmp_path / model_type)
