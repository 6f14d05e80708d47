import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantlab.engine.linears import find_linears, require_quantizable
from quantlab.errors import ModelError
from quantlab.experts import UnfusedExperts, all_tokens_for, expert_groups, fused_experts, unfuse
from quantlab.skeleton import build_skeleton, find_blocks

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "dbrx", "longcat_flash"]
NO_INTERFACE = {"llama4_text", "dbrx", "longcat_flash"}
EXPERTS = {name: [f"model.layers.{index}.mlp.experts" for index in range(3)] for name in MIXTURES}
EXPERTS["deepseek_v3"].pop(0)  # its first block is dense
EXPERTS["llama4_text"] = [f"model.layers.{index}.feed_forward.experts" for index in range(3)]
EXPERTS["dbrx"] = [f"transformer.blocks.{index}.ffn.experts" for index in range(3)]
EXPERTS["longcat_flash"].pop()

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def make_model(model_folder):
    return lambda name: AutoModelForCausalLM.from_pretrained(model_folder(name))


@pytest.fixture
def mixtral(make_model):
    """A Mixtral with separate experts, and the experts of its first block."""
    model = make_model("mixtral")
    unfuse(model, fused_experts(model))
    return model, model.get_submodule("model.layers.0.mlp.experts")


@pytest.mark.parametrize("name", MIXTURES)
def test_separate_experts_compute_what_the_fused_ones_do(make_model, token_ids, name):
    model = make_model(name)
    if name not in NO_INTERFACE:
        model.set_experts_implementation("eager")
    expected = model(input_ids=token_ids, use_cache=False).logits
    assert fused_experts(model) == EXPERTS[name]
    unfuse(model, fused_experts(model))
    assert fused_experts(model) == []
    assert all(isinstance(model.get_submodule(experts), UnfusedExperts) for experts in EXPERTS[name])
    actual = model(input_ids=token_ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", MIXTURES)
def test_every_weight_of_a_fused_expert_is_in_a_linear_layer(make_model, name):
    model = make_model(name)
    weights = {id(parameter): parameter.numel() for parameter in model.parameters()}
    unfuse(model, fused_experts(model))
    unused = 2 * 2 * 2 * 24 * 32 if name == "longcat_flash" else 0  # of the experts that return their input
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(weights.values()) - unused
    for experts in EXPERTS[name]:
        linears = find_linears(model.get_submodule(experts))
        assert set(linears) == {f"{index}.{layer}_proj" for index in range(4) for layer in ("gate", "up", "down")}
        width = 24 if name in ("qwen3_moe", "deepseek_v3", "longcat_flash") else 64
        assert {tuple(linear.weight.shape) for linear in linears.values()} == {(width, 32), (32, width)}
        assert all(linear.weight.is_contiguous() for linear in linears.values())
        assert all((linear.bias is not None) == (name == "gpt_oss") for linear in linears.values())


@pytest.mark.parametrize("name", MIXTURES)
def test_blocks_with_experts_are_quantizable_before_and_after_they_are_taken_apart(make_model, name):
    model = make_model(name)
    for _ in range(2):
        for index, block in enumerate(find_blocks(model)[1]):
            require_quantizable(block, f"model.layers.{index}")
        unfuse(model, fused_experts(model))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_skeleton_takes_the_weights_of_separate_experts(make_model, token_ids, name):
    model = make_model(name)
    skeleton = build_skeleton(model.config, torch.float32)
    unfuse(skeleton, fused_experts(skeleton))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    unfuse(model, fused_experts(model))
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


def test_an_expert_sees_the_tokens_that_are_routed_to_it_and_no_others(mixtral):
    _, experts = mixtral
    states = torch.randn(5, 32)
    routing = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 0], [1, 3]])
    seen = {}
    for name, linear in find_linears(experts).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    experts(states, routing, torch.full((5, 2), 0.5))
    for index, tokens in {0: [0, 1, 2, 3], 1: [0, 1, 4], 3: [2, 3, 4]}.items():
        assert torch.equal(seen[f"{index}.gate_proj"], states[tokens])
        assert seen[f"{index}.up_proj"] is seen[f"{index}.gate_proj"]
        assert len(seen[f"{index}.down_proj"]) == len(tokens)
    assert not any(name.startswith("2.") for name in seen)


def test_the_output_is_the_weighted_sum_over_the_experts_of_a_token(mixtral):
    _, experts = mixtral
    states = torch.randn(3, 32)
    routing, weights = torch.tensor([[0, 1], [2, 0], [3, 4]]), torch.rand(3, 2)  # expert 4 does not exist

    def alone(expert, state):
        layers = {name: experts.get_submodule(f"{expert}.{name}_proj") for name in ("gate", "up", "down")}
        return layers["down"](nn.functional.silu(layers["gate"](state)) * layers["up"](state))

    expected = torch.stack(
        [
            sum(
                weight * alone(expert, state)
                for expert, weight in zip(row.tolist(), row_weights, strict=True)
                if expert < 4
            )
            for state, row, row_weights in zip(states, routing, weights, strict=True)
        ]
    )
    torch.testing.assert_close(experts(states, routing, weights), expected)


def test_groups_name_the_layers_with_the_same_input_whether_they_are_called_or_not(mixtral):
    model, _ = mixtral
    groups = expert_groups(find_blocks(model)[1][0])
    assert groups[:2] == [["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"], ["mlp.experts.0.down_proj"]]
    layers = [layer for group in groups for layer in group]
    assert sorted(layers) == sorted(name for name in find_linears(find_blocks(model)[1][0]) if ".experts." in name)


def test_chosen_experts_hear_all_tokens_and_the_output_stays(mixtral):
    model, experts = mixtral
    states, routing, weights = torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    seen = {}
    for name, linear in find_linears(experts).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: len(args[0])}))
    expected = experts(states, routing, weights)
    assert {name for name in seen if name.endswith("down_proj")} == {"0.down_proj", "1.down_proj"}
    with all_tokens_for(model, ["model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.2.down_proj"]):
        torch.testing.assert_close(experts(states, routing, weights), expected)
    assert seen["2.gate_proj"] == seen["2.down_proj"] == 5
    assert "3.up_proj" not in seen
    seen.clear()
    experts(states, routing, weights)
    assert "2.up_proj" not in seen


def test_experts_with_sorted_inputs_see_their_own_tokens_or_those_of_all(make_model):
    model = make_model("llama4_text")
    unfuse(model, fused_experts(model))
    experts = model.get_submodule("model.layers.0.feed_forward.experts")
    copies = torch.zeros(4, 5, 32)
    copies[0, :2], copies[1, 2:] = torch.randn(2, 32), torch.randn(3, 32)
    seen = {}
    for name, linear in find_linears(experts).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    expected = experts(copies.view(20, 32))
    assert torch.equal(seen["0.up_proj"], copies[0, :2])
    assert torch.equal(seen["1.gate_proj"], copies[1, 2:])
    assert not any(name.startswith(("2.", "3.")) for name in seen)
    layers = [f"model.layers.0.feed_forward.experts.{index}.down_proj" for index in (1, 3)]
    with all_tokens_for(model, layers):
        torch.testing.assert_close(experts(copies.view(20, 32)), expected)
    assert torch.equal(seen["3.up_proj"], torch.cat((copies[0, :2], copies[1, 2:])))
    assert len(seen["1.down_proj"]) == 5
    assert len(seen["0.down_proj"]) == 2


def test_experts_without_weights_return_their_input(make_model):
    model = make_model("longcat_flash")
    unfuse(model, fused_experts(model))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    states, routing, weights = torch.randn(2, 3, 32), torch.tensor([[4, 0], [5, 4], [1, 2]] * 2), torch.rand(6, 2)
    actual = experts(states, routing, weights).view(6, 32)
    both = weights.sum(dim=1, keepdim=True) * states.view(6, 32)
    torch.testing.assert_close(actual[[1, 4]], both[[1, 4]])
    alone = experts(states, routing, weights.where(routing < 4, 0.0)).view(6, 32)
    torch.testing.assert_close(actual[0] - alone[0], weights[0, 0] * states.view(6, 32)[0])
    assert torch.equal(actual[2], alone[2])


def test_half_precision_outputs_are_added_up_in_float32(mixtral):
    experts = copy.deepcopy(mixtral[1]).to(torch.bfloat16)
    states, routing = torch.randn(1, 32, dtype=torch.bfloat16), torch.tensor([[0, 1, 2, 3]])
    weights = torch.tensor([[1e3, 1.0, -1e3, 1.0]])
    for index in (0, 2):  # equal outputs that cancel
        experts.get_submodule(str(index)).load_state_dict(experts.get_submodule("0").state_dict())
    parts = experts(states, routing[:, 1::2], weights[:, 1::2])
    torch.testing.assert_close(experts(states, routing, weights), parts, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.7.mlp.experts"])
def test_what_has_no_fused_experts_is_refused_by_name(make_model, name):
    with pytest.raises(ModelError, match=name):
        unfuse(make_model("mixtral"), [name])
