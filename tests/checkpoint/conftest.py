"""A tiny model with three quantized layers, and a function that writes it as a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from quantlab.api import CodebookSpec, Lut, Outliers, QuantizedLayer, UniformGrid
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.runtime import LutLinear, ModuleSpec

SIZES = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "tied llama": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(**SIZES, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, max_position_embeddings=32),
}


@dataclass
class Quantized:
    model: torch.nn.Module
    modules: dict[str, ModuleSpec]
    folder: Path


def quantize(linear, kind):
    """A layer with arbitrary codes: what it computes does not matter here, that it is stored exactly does."""
    rows, columns = reversed(linear.weight.shape) if isinstance(linear, Conv1D) else linear.weight.shape
    codes = torch.randint(0, 8, (rows, columns), dtype=torch.uint8)
    if kind == "uniform":
        codebook = UniformGrid(scale=torch.rand(rows, 2) / 50 + 0.01, zero=torch.full((rows, 2), 3.0), bits=3)
    else:
        codebook = Lut(values=torch.randn(rows, 2, 8) / 20)
    outliers = None
    if kind == "outliers":
        outliers = Outliers(rows=torch.tensor([0, 2]), columns=torch.tensor([1, 0]), values=torch.tensor([0.5, -0.25]))
    layer = QuantizedLayer(codes=codes, codebook=codebook, outliers=outliers)
    return LutLinear.from_layer(layer, CodebookSpec(bits=3, group_size=columns // 2), linear.bias)


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"
    ]
    modules = {}
    for (name, linear), kind in zip(linears, ("lut", "uniform", "outliers"), strict=False):
        quantized = quantize(linear, kind)
        model.set_submodule(name, quantized)
        modules[name] = quantized.spec
    return model, modules


def write(model, modules, folder, source, dtype=torch.float32, unfused_experts=()):
    writer = CheckpointWriter(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    writer.add_shard("rest", {name: tensor for name, tensor in state.items() if ".0." not in name})
    writer.add_shard("block-00000", {name: tensor for name, tensor in state.items() if ".0." in name})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": str(dtype).removeprefix("torch.")}
    method, producer = {"name": "test", "options": {"x": 1}}, {"name": "quantlab-ptq", "version": "0"}
    quantization = QuantizationConfig(
        method=method, producer=producer, modules=modules, unfused_experts=tuple(unfused_experts)
    )
    writer.finish(source, config, quantization)
    return writer


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Any of CONFIGS as a written checkpoint; written once, so tests that damage it copy it."""
    written = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in written:
            folder = tmp_path_factory.mktemp("checkpoint")
            source = tmp_path_factory.mktemp("source")
            (source / "generation_config.json").write_text('{"eos_token_id": 7, "max_new_tokens": 3}')
            model, modules = build(CONFIGS[name], dtype)
            write(model, modules, folder, source, dtype)
            written[name, dtype] = Quantized(model, modules, folder)
        return written[name, dtype]

    return get


@pytest.fixture(scope="session")
def build_model():
    """The model behind `saved`, made anew, for tests that change it."""
    return lambda name, dtype=torch.float32: build(CONFIGS[name], dtype)[0]


@pytest.fixture(scope="session")
def write_checkpoint():
    """Writes a model with `LutLinear` layers: (model, modules, folder, source, dtype, unfused_experts)."""
    return write
