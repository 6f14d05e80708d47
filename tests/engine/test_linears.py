import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantlab.engine.linears import (
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


def test_a_layer_that_is_called_twice_is_named():
    linear = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="'again' is called twice"):
        group_by_input({"again": linear}, lambda: linear(linear(torch.ones(1, 4))))


def test_a_conv1d_weight_is_seen_in_the_orientation_of_a_linear(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
    expand = find_linears(find_blocks(model)[1][0])["mlp.c_fc"]
    inputs = torch.randn(5, 32)
    assert weight_of(expand).shape == (128, 32)
    torch.testing.assert_close(nn.functional.linear(inputs, weight_of(expand), bias_of(expand)), expand(inputs))


def test_weights_outside_linear_layers_are_refused_with_the_share_that_would_be_quantized():
    block = nn.Module()
    block.linear = nn.Linear(10, 10, bias=False)
    block.experts = nn.Parameter(torch.zeros(3, 10, 10))
    with pytest.raises(ModelError, match=r"model\.layers\.0 .*only 25% of its 400 weights .* is experts"):
        require_quantizable(block, "model.layers.0")


def test_routers_beside_experts_and_layers_whose_weights_are_read_are_kept():
    block = nn.Module()
    block.self_attn = nn.ModuleDict({"gate": nn.Linear(4, 4), "weights_proj": nn.Linear(4, 1)})
    block.mixer = nn.ModuleDict({"dt_proj": nn.Linear(1, 4)})
    block.mlp = nn.ModuleDict(
        {
            "experts": nn.ModuleList([nn.ModuleDict({"gate_proj": nn.Linear(4, 4)})]),
            "gate": nn.ModuleDict({"wg": nn.Linear(4, 2)}),
            "shared_expert_gate": nn.Linear(4, 1),
        }
    )
    assert list(find_linears(block)) == ["self_attn.gate", "mlp.experts.0.gate_proj"]


def test_a_linear_layer_that_computes_something_else_is_kept():
    class Grouped(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.unflatten(-1, (2, -1)))

    assert list(find_linears(nn.ModuleDict({"plain": nn.Linear(4, 4), "grouped": Grouped(4, 4)}))) == ["plain"]
