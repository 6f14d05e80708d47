"""Gradients streamed block by block must equal those of the whole model."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantlab.engine import gradients as gradients_module
from quantlab.engine.drive import open_driver
from quantlab.engine.gradients import collect_gradients, read_gradients
from quantlab.engine.linears import find_linears
from quantlab.engine.sensitivity import LayerSensitivity, observed
from quantlab.engine.statistics import StatisticsOptions
from quantlab.errors import ModelError, NumericalError
from quantlab.experts import fused_experts, unfuse
from quantlab.progress import NoProgress
from quantlab.skeleton import find_blocks

BOTH = StatisticsOptions(fisher=True, saliency_groups=3)
ARCHITECTURES = ["llama", "llama-tied", "opt", "gpt2", "qwen3", "gemma3"]


class InMemory:
    """Hidden states that were put, by number."""

    def __init__(self):
        self.tensors = {}

    def put(self, batch, hidden):
        self.tensors[batch] = hidden

    def get(self, batch):
        return self.tensors[batch]

    def remove(self):
        self.tensors.clear()


def collect(source, ids, folder, options=BOTH, dtype=torch.float32, progress=None):
    stores = []

    def new_states(name):
        stores.append(InMemory())
        return stores[-1]

    collect_gradients(source, ids, dtype, options, folder, new_states, progress or NoProgress())
    return stores


def whole_model_gradients(folder, ids, row_group_count):
    """By layer: the Fisher diagonal and the unscaled saliency, by autograd on the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    unfuse(model, fused_experts(model))
    model.requires_grad_(True)
    prefix, blocks = find_blocks(model)
    outputs, fisher, saliency = {}, {}, {}

    def remember(name):
        def hook(_, __, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    linears = {
        f"{prefix}.{index}.{name}": linear
        for index, block in enumerate(blocks)
        for name, linear in find_linears(block).items()
    }
    for name, linear in linears.items():
        linear.register_forward_hook(remember(name))
    for sequence in ids:
        model.zero_grad()
        outputs.clear()
        logits = model(input_ids=sequence[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        for name in outputs:
            linear = linears[name]
            gradient = linear.weight.grad.T if type(linear).__name__ == "Conv1D" else linear.weight.grad
            fisher[name] = fisher.get(name, 0) + gradient.square() / len(ids)
            squares = outputs[name].grad.flatten(0, -2).square()
            bounds = [squares.shape[1] * index // row_group_count for index in range(row_group_count + 1)]
            means = [squares[:, a:b].mean(dim=1) for a, b in pairwise(bounds)]
            saliency[name] = torch.cat([saliency.get(name, torch.empty(row_group_count, 0)), torch.stack(means)], dim=1)
    return fisher, saliency


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_gradients_equal_those_of_the_whole_model(model_folder, token_ids, tmp_path, architecture):
    ids = token_ids[:3]
    collect(model_folder(architecture), ids, tmp_path)
    fisher, saliency = whole_model_gradients(model_folder(architecture), ids, row_group_count=3)
    for index in range(len(list(tmp_path.glob("gradients-*")))):
        layers = [name for name in fisher if f".{index}." in name]
        found = read_gradients(tmp_path, index, layers)
        assert list(found.fisher) == list(found.saliency) == layers
        for name in layers:
            scale = fisher[name].abs().max()
            torch.testing.assert_close(found.fisher[name] / scale, fisher[name] / scale, rtol=1e-3, atol=1e-6)
            expected = saliency[name] / saliency[name].mean()
            torch.testing.assert_close(found.saliency[name], expected, rtol=1e-3, atol=1e-5)


def test_the_fisher_diagonal_of_experts_follows_the_router(model_folder, token_ids, tmp_path):
    ids = token_ids[:2]
    collect(model_folder("mixtral"), ids, tmp_path, StatisticsOptions(fisher=True))
    fisher, _ = whole_model_gradients(model_folder("mixtral"), ids, row_group_count=1)
    experts = [name for name in fisher if ".experts." in name]
    assert len(experts) > 3 * 3
    for name in experts:
        found = read_gradients(tmp_path, int(name.split(".")[2]), [name]).fisher[name]
        torch.testing.assert_close(found / fisher[name].max(), fisher[name] / fisher[name].max(), rtol=1e-3, atol=1e-5)


def test_the_last_token_of_the_last_block_has_no_saliency_before_the_attention(model_folder, token_ids, tmp_path):
    # Nothing is predicted from the last token, so behind the last mixing of tokens its gradient is zero.
    collect(model_folder("llama"), token_ids[:2], tmp_path)
    name = "model.layers.2.mlp.down_proj"
    saliency = read_gradients(tmp_path, 2, [name]).saliency[name]
    per_sequence = saliency.view(3, 2, -1)
    assert (per_sequence[:, :, -1] == 0).all()
    assert (per_sequence[:, :, :-1] > 0).all()


def test_only_what_is_asked_for_is_kept(model_folder, token_ids, tmp_path):
    collect(model_folder("llama"), token_ids[:2], tmp_path / "fisher", StatisticsOptions(fisher=True))
    collect(model_folder("llama"), token_ids[:2], tmp_path / "saliency", StatisticsOptions(saliency_groups=1))
    name = "model.layers.0.mlp.down_proj"
    fisher = read_gradients(tmp_path / "fisher", 0, [name])
    saliency = read_gradients(tmp_path / "saliency", 0, [name])
    assert (list(fisher.fisher), list(fisher.saliency)) == ([name], [])
    assert (list(saliency.fisher), list(saliency.saliency)) == ([], [name])
    assert saliency.saliency[name].shape == (1, token_ids[:2].numel())


def test_a_second_pass_writes_identical_files_and_a_complete_folder_is_left_alone(model_folder, token_ids, tmp_path):
    for name in ("first", "second"):
        collect(model_folder("llama"), token_ids[:2], tmp_path / name)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("gradients-*")} for name in ("first", "second")
    ]
    assert files[0] == files[1]
    assert collect(model_folder("llama"), token_ids[:2], tmp_path / "first") == []


def test_stores_are_emptied_as_soon_as_they_are_read(model_folder, token_ids, tmp_path):
    stores = collect(model_folder("llama"), token_ids[:2], tmp_path)
    assert len(stores) == 3 + 1 + 1
    assert not any(store.tensors for store in stores)


def test_bfloat16_gradients_follow_those_of_float32(model_folder, token_ids, tmp_path):
    name = "model.layers.0.self_attn.o_proj"
    for dtype in (torch.float32, torch.bfloat16):
        collect(model_folder("llama"), token_ids, tmp_path / str(dtype), dtype=dtype)
    exact, half = (
        read_gradients(tmp_path / str(dtype), 0, [name]).fisher[name] for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1] > 0.99


def test_the_gradient_by_the_logits_is_taken_piece_by_piece(monkeypatch):
    logits = torch.randn(1, 7, 11, requires_grad=True)
    ids = torch.randint(11, (1, 7))
    nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    monkeypatch.setattr(gradients_module, "LOGITS_PER_PIECE", 4 * 11)
    found = gradients_module._gradient_by_logits(logits.detach(), ids)
    torch.testing.assert_close(found, logits.grad)


def test_blocks_that_share_state_are_refused(model_folder, token_ids, tmp_path, monkeypatch):
    @contextmanager
    def sharing(*args):
        with open_driver(*args) as driver:
            driver.replay_on_resume = True
            yield driver

    monkeypatch.setattr(gradients_module, "open_driver", sharing)
    with pytest.raises(ModelError, match="LlamaForCausalLM: its blocks hand each other more than hidden states"):
        collect(model_folder("llama"), token_ids[:2], tmp_path)


def test_gradients_that_are_not_finite_are_refused_with_the_block(model_folder, token_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(
        gradients_module, "_gradient_by_logits", lambda logits, _: torch.full_like(logits, float("inf"))
    )
    with pytest.raises(NumericalError, match="input of block 2 contains NaN or infinity in sequence 0"):
        collect(model_folder("llama"), token_ids[:2], tmp_path)


def test_a_layer_behind_a_router_has_no_saliency():
    layer = LayerSensitivity("a", nn.Linear(4, 6), torch.zeros(2, 5), StatisticsOptions(saliency_groups=2))
    layer.add(torch.randn(5, 4), torch.randn(5, 6))
    layer.add(torch.randn(3, 4), torch.randn(3, 6))
    with pytest.raises(ModelError, match="a: received 8 of 10 tokens"):
        layer.finish()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda linear, x: linear(linear(x)), "a is called twice"),
        (lambda linear, x: x + linear(x.detach()), "a is not fed by the hidden states"),
    ],
    ids=["twice", "detached"],
)
def test_a_layer_that_cannot_be_observed_is_named(forward, message):
    linear = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ModelError, match=message), observed({"a": linear}, {}):
        forward(linear, torch.randn(2, 3, requires_grad=True))
    assert not linear._forward_hooks
