import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantlab.engine.linears import (
    HessianAccumulator,
    bias_of,
    find_linears,
    group_by_input,
    require_quantizable,
    weight_of,
)
from quantlab.errors import ModelError
from quantlab.skeleton import find_blocks


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("qwen3", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gemma3", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
    ],
)
def test_layers_with_the_same_input_form_a_group(model_folder, token_ids, architecture, groups):
    model = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    linears = find_linears(find_blocks(model)[1][1])
    found = group_by_input(linears, lambda: model(input_ids=token_ids))
    assert [sorted(name.rpartition(".")[2] for name in group) for group in found] == [sorted(group) for group in groups]


def test_grouping_leaves_no_hooks(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    linears = find_linears(find_blocks(model)[1][0])
    group_by_input(linears, lambda: model(input_ids=token_ids))
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_a_layer_that_is_never_called_is_named():
    block = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    with pytest.raises(ModelError, match="idle"):
        group_by_input(find_linears(block), lambda: block["used"](torch.ones(1, 4)))


def test_a_conv1d_weight_is_seen_in_the_orientation_of_a_linear(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
    expand = find_linears(find_blocks(model)[1][0])["mlp.c_fc"]
    inputs = torch.randn(5, 32)
    assert weight_of(expand).shape == (128, 32)
    torch.testing.assert_close(nn.functional.linear(inputs, weight_of(expand), bias_of(expand)), expand(inputs))


def test_fused_experts_are_refused_with_the_share_that_would_be_quantized(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("mixtral"))
    with pytest.raises(ModelError, match=r"model\.layers\.0: only \d+% .*experts"):
        require_quantizable(find_blocks(model)[1][0], "model.layers.0")


def test_the_hessian_is_the_mean_over_tokens_without_a_factor_of_two():
    batches = [torch.randn(2, 3, 5), torch.randn(4, 3, 5)]
    accumulator = HessianAccumulator(5, torch.device("cpu"))
    for batch in batches:
        accumulator.add(batch)
    tokens = torch.cat([batch.reshape(-1, 5) for batch in batches]).double()
    assert accumulator.num_tokens == 18
    torch.testing.assert_close(accumulator.mean().double(), tokens.T @ tokens / 18, rtol=1e-5, atol=1e-6)


def test_half_precision_inputs_are_accumulated_in_float32():
    inputs = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum would stall at 256
    accumulator = HessianAccumulator(1, torch.device("cpu"))
    accumulator.add(inputs)
    accumulator.add(inputs)
    assert accumulator.mean().item() == 1.0
