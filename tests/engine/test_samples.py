import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab.engine import samples as samples_module
from quantlab.engine.linears import find_linears, weight_of
from quantlab.engine.samples import layer_samples
from quantlab.experts import fused_experts, unfuse
from quantlab.skeleton import find_blocks


@torch.no_grad()
def reference_hessians(model, linears, ids):
    """The Hessian of every layer, by a plain forward of the whole model."""
    sums = {}

    def remember(name):
        def hook(_, args):
            tokens = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = (tokens.T @ tokens / len(tokens), len(tokens))

        return hook

    handles = [linear.register_forward_pre_hook(remember(name)) for name, linear in linears.items()]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral"])
def test_every_layer_comes_with_the_hessians_of_both_texts(model_folder, token_ids, monkeypatch, architecture):
    monkeypatch.setattr(samples_module, "TOKENS_PER_BATCH", 48)
    texts = token_ids[:8], token_ids[8:]
    model = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    unfuse(model, fused_experts(model))
    prefix, blocks = find_blocks(model)
    linears = {
        f"{prefix}.{index}.{name}": linear
        for index, block in enumerate(blocks)
        for name, linear in find_linears(block).items()
    }
    expected = [reference_hessians(model, linears, ids) for ids in texts]
    seen = set()
    for sample in layer_samples(model_folder(architecture), *texts, torch.float32):
        seen.add(sample.name)
        assert torch.equal(sample.weight, weight_of(linears[sample.name]))
        for statistics, reference in zip((sample.calibration, sample.held_out), expected, strict=True):
            hessian, num_tokens = reference[sample.name]
            assert statistics.num_tokens == num_tokens
            torch.testing.assert_close(statistics.hessian.double(), hessian, rtol=1e-4, atol=1e-5)
    assert seen == set(linears)


def test_gradients_stay_enabled_for_the_caller_between_two_layers(model_folder, token_ids):
    samples = layer_samples(model_folder("llama"), token_ids[:2], token_ids[2:4], torch.float32)
    next(samples)
    assert torch.is_grad_enabled()
