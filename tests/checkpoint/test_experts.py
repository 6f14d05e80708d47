"""A mixture of experts: fused in the model, stored as one layer per expert and projection."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from quantlab.api import CodebookSpec, Lut, QuantizedLayer
from quantlab.checkpoint.export import export
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.verify import verify
from quantlab.errors import UsageError
from quantlab.experts import fused_experts, unfuse
from quantlab.runtime import LutLinear

TOKENS = torch.arange(12).view(2, 6)
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=3),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, intermediate_size=24, moe_intermediate_size=8, num_experts=4, head_dim=8),
}


def quantize(linear):
    rows, columns = linear.weight.shape
    codes = torch.randint(0, 8, (rows, columns), dtype=torch.uint8)
    layer = QuantizedLayer(codes=codes, codebook=Lut(values=torch.randn(rows, 1, 8) / 20))
    return LutLinear.from_layer(layer, CodebookSpec(bits=3), linear.bias)


@pytest.fixture(params=CONFIGS)
def written(request, tmp_path, write_checkpoint):
    """A mixture whose experts are quantized, but for one projection, and its checkpoint."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    names = fused_experts(model)
    unfuse(model, names)
    modules = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".experts." in name and not name.endswith("1.up_proj"):
            model.set_submodule(name, quantize(linear))
            modules[name] = model.get_submodule(name).spec
    (tmp_path / "source").mkdir()
    write_checkpoint(model, modules, tmp_path / "model", tmp_path / "source", unfused_experts=names)
    return model, tmp_path / "model"


def logits_of(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def test_every_reader_gives_the_very_mixture_back_and_saves_it_again(written, tmp_path):
    model, folder = written
    assert verify(folder).layers == sum(isinstance(module, LutLinear) for module in model.modules()) > 10
    for index, read in enumerate((load, AutoModelForCausalLM.from_pretrained)):
        loaded = read(folder)
        assert torch.equal(logits_of(loaded), logits_of(model))
        loaded.save_pretrained(tmp_path / str(index), max_shard_size=2000)
        for reader in (load, AutoModelForCausalLM.from_pretrained):
            assert torch.equal(logits_of(reader(tmp_path / str(index))), logits_of(model))


def test_dequantizing_and_exporting_a_mixture_are_refused_by_name(written, tmp_path):
    with pytest.raises(UsageError, match="a mixture of experts is not dequantized"):
        load(written[1]).dequantize()
    with pytest.raises(UsageError, match="is a mixture of experts"):
        export(written[1], "dequantized", tmp_path / "out")
