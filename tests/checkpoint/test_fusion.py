"""Layers of loaded models that read the same input are fused; what the models compute stays the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantlab.api import CodebookSpec, Lut, QuantizedLayer
from quantlab.checkpoint.reader import load
from quantlab.runtime import LutLinear
from quantlab_kernels import cpu

SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


@pytest.fixture
def quantized(tmp_path, write_checkpoint):
    """A model with 4-bit layers in all its blocks, and its checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    model, modules = AutoModelForCausalLM.from_config(config).eval(), {}
    for name, linear in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(linear, torch.nn.Linear):
            codes = torch.randint(0, 16, linear.weight.shape, dtype=torch.uint8)
            codebook = Lut(values=torch.randn(len(codes), 1, 16) / 10)
            spec = CodebookSpec(bits=4, group_size=linear.in_features)
            layer = LutLinear.from_layer(QuantizedLayer(codes=codes, codebook=codebook), spec, None)
            model.set_submodule(name, layer)
            modules[name] = layer.spec
    (tmp_path / "source").mkdir()
    write_checkpoint(model, modules, tmp_path / "model", tmp_path / "source")
    return model, tmp_path / "model"


def generate(model, monkeypatch):
    """Tokens and scores after one token, and the rows of every call of the kernel for one sample."""
    rows, multiply = [], cpu._multiply

    def counted(library, tiled, x, codes, bits, out_features, *rest):
        if x.numel() == x.shape[-1]:
            rows.append(out_features)
        return multiply(library, tiled, x, codes, bits, out_features, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_multiply", counted)
        generated = model.generate(
            torch.tensor([[5]]),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    return torch.stack(generated.scores), rows


@pytest.mark.parametrize("reader", [load, AutoModelForCausalLM.from_pretrained], ids=["quantlab", "transformers"])
def test_a_loaded_model_generates_the_same_with_fewer_calls(quantized, reader, monkeypatch, tmp_path):
    model, folder = quantized
    expected, rows = generate(model, monkeypatch)
    assert rows[:7] == [64, 32, 32, 64, 96, 96, 64]
    loaded = reader(folder)
    scores, rows = generate(loaded, monkeypatch)
    assert torch.equal(scores, expected)
    if cpu.reads_tiles(4, 64, 1):
        assert rows == [128, 64, 192, 64] * 2 * 4
    loaded.save_pretrained(tmp_path / "again")
    state, again = model.state_dict(), load(tmp_path / "again").state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
