"""Streaming without quantizing must equal the ordinary forward pass bit for bit."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantlab.engine.drive import open_driver
from quantlab.errors import ModelError
from quantlab.skeleton import WeightSource, build_skeleton, find_blocks, read_config, unload

ARCHITECTURES = ["llama", "llama-tied", "opt", "gpt2", "qwen3", "gemma3", "mixtral"]


@pytest.fixture
def llama(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    return model, find_blocks(model)[1]


class Layer(nn.Module):
    """Returns hidden states and, like attention that is shared between layers, what the next layer needs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden, *, shared=None):
        shared = hidden.cumsum(1) if shared is None else shared
        return self.linear(hidden) + shared, shared


class Decoder(nn.Module):
    """A decoder that halves the hidden states between its blocks, or hands on what else they return."""

    def __init__(self, *, halves=False, shares=False):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(96, 8), nn.LayerNorm(8), nn.Linear(8, 96)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.halves, self.shares = halves, shares

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden, shared = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, returned = layer(hidden, shared=shared)
            hidden = hidden * 0.5 if self.halves else hidden
            shared = returned if self.shares else None
        return SimpleNamespace(logits=self.head(self.norm(hidden)))


@pytest.fixture
def halving():
    torch.manual_seed(0)
    model = Decoder(halves=True)
    return model, model.layers


def halve_in_place(module, args):
    args[0].mul_(0.5)


def plain_hidden_states(model, **inputs):
    """Logits, and what every block returns."""
    hidden = []
    handles = [
        block.register_forward_hook(lambda _, __, output: hidden.append(output[0] if type(output) is tuple else output))
        for block in find_blocks(model)[1]
    ]
    logits = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, hidden


@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_streamed_hidden_states_and_logits_equal_the_plain_forward(model_folder, token_ids, architecture, padded):
    folder = model_folder(architecture)
    mask = torch.ones_like(token_ids)
    mask[1, :7] = 0
    mask = mask if padded else None
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected_logits, expected = plain_hidden_states(plain, input_ids=token_ids, attention_mask=mask)

    model = build_skeleton(read_config(folder), torch.float32)
    _, blocks = find_blocks(model)
    source = WeightSource(folder, model, torch.float32)
    source.load_rest()
    source.load_block(0)
    with open_driver(model, blocks, token_ids[:1]) as driver:
        assert (driver.mode, driver.replay_on_resume) == ("record", False)
        hidden, batch = driver.record(token_ids, mask)
        source.unload_rest()
        for index, block in enumerate(blocks):
            source.load_block(index)
            output = driver.run_block(index, hidden, batch)
            assert torch.equal(output, expected[index]), f"block {index}"
            hidden = driver.advance(index, output, batch)
            unload(block)
        source.load_rest()
        assert torch.equal(driver.finish(batch, output), expected_logits)


@torch.no_grad()
def test_arguments_of_equal_batches_are_shared_and_still_exact(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("gemma3"))
    with open_driver(model, find_blocks(model)[1], token_ids[:1]) as driver:
        _, first = driver.record(token_ids[:6])
        hidden, second = driver.record(token_ids[6:])
        for index, (mine, reference) in enumerate(zip(second.arguments, first.arguments, strict=True)):
            assert mine.kwargs["position_embeddings"][0] is reference.kwargs["position_embeddings"][0]
            hidden = driver.run_block(index, hidden, second)
        logits = driver.finish(second, hidden)
    assert torch.equal(logits, model(input_ids=token_ids[6:], use_cache=False).logits)


@torch.no_grad()
def test_batches_with_different_padding_keep_their_own_masks(llama, token_ids):
    model, blocks = llama
    mask = torch.ones_like(token_ids)
    mask[:, :7] = 0
    with open_driver(model, blocks, token_ids[:1]) as driver:
        driver.record(token_ids)
        hidden, batch = driver.record(token_ids, mask)
        for index in range(len(blocks)):
            hidden = driver.run_block(index, hidden, batch)
        logits = driver.finish(batch, hidden)
    assert torch.equal(logits, model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits)


def test_blocks_have_their_own_forward_again_after_recording(llama, token_ids):
    model, blocks = llama
    with open_driver(model, blocks, token_ids[:1]) as driver:
        driver.record(token_ids)
        assert not any("forward" in vars(block) for block in blocks)


@pytest.mark.parametrize("change", ["halves", "shares"])
@torch.no_grad()
def test_a_model_that_does_more_between_blocks_is_driven_by_paused_forwards(token_ids, change):
    torch.manual_seed(0)
    model = Decoder(**{change: True})
    halves = token_ids.split(6)
    with open_driver(model, model.layers, token_ids[:1]) as driver:
        assert (driver.mode, driver.replay_on_resume) == ("suspend", True)
        hidden, batches = zip(*(driver.record(half) for half in halves), strict=True)
        for index in range(3):
            for _ in range(2):
                outputs = [driver.run_block(index, *item) for item in zip(hidden, batches, strict=True)]
            hidden = [driver.advance(index, *item) for item in zip(outputs, batches, strict=True)]
        logits = [driver.finish(*item) for item in zip(batches, outputs, strict=True)]
    for half, actual in zip(halves, logits, strict=True):
        assert torch.equal(actual, model(half).logits)


@torch.no_grad()
def test_what_blocks_return_besides_but_the_model_ignores_needs_no_paused_forward(token_ids):
    model = Decoder()
    with open_driver(model, model.layers, token_ids[:1]) as driver:
        assert (driver.mode, driver.replay_on_resume) == ("record", False)


def test_no_thread_is_left_of_forwards_that_are_not_finished(halving, token_ids):
    model, blocks = halving
    before = threading.active_count()
    with open_driver(model, blocks, token_ids[:1]) as driver:
        for half in token_ids.split(6):
            driver.record(half)
        assert threading.active_count() == before + 2
    assert threading.active_count() == before
    assert not any("forward" in vars(block) for block in blocks)


@torch.no_grad()
def test_an_error_in_a_paused_forward_reaches_the_caller(halving, token_ids):
    model, blocks = halving

    def fail(module, args):
        raise RuntimeError("in the last norm")

    before = threading.active_count()
    with open_driver(model, blocks, token_ids[:1]) as driver:
        hidden, batch = driver.record(token_ids)
        model.norm.register_forward_pre_hook(fail)
        for index in range(len(blocks)):
            output = driver.run_block(index, hidden, batch)
            hidden = driver.advance(index, output, batch)
        with pytest.raises(RuntimeError, match="in the last norm"):
            driver.finish(batch, output)
    assert threading.active_count() == before


@pytest.mark.parametrize("gradients", [False, True])
def test_a_paused_forward_has_the_gradient_mode_of_its_caller(halving, token_ids, gradients):
    model, blocks = halving
    with torch.set_grad_enabled(gradients), open_driver(model, blocks, token_ids[:1]) as driver:
        hidden, _ = driver.record(token_ids)
    assert hidden.requires_grad == gradients


@torch.no_grad()
def test_a_paused_forward_is_not_run_for_another_block(halving, token_ids):
    model, blocks = halving
    with open_driver(model, blocks, token_ids[:1]) as driver:
        hidden, batch = driver.record(token_ids)
        with pytest.raises(ModelError, match="is in block 0 where block 1 was expected"):
            driver.run_block(1, hidden, batch)


@torch.no_grad()
def test_a_paused_forward_goes_on_once(halving, token_ids):
    model, blocks = halving
    with open_driver(model, blocks, token_ids[:1]) as driver:
        hidden, batch = driver.record(token_ids)
        for index in range(len(blocks)):
            output = driver.run_block(index, hidden, batch)
            hidden = driver.advance(index, output, batch)
        with pytest.raises(ModelError, match="is in block 2 where block 1 was expected"):
            driver.advance(1, output, batch)
        driver.finish(batch, output)
        with pytest.raises(ModelError, match="has ended where block 2 was expected"):
            driver.finish(batch, output)


def test_a_change_between_blocks_that_the_probe_did_not_meet_is_refused(llama, token_ids):
    model, blocks = llama
    with open_driver(model, blocks, token_ids[:1]) as driver:
        blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
        with pytest.raises(ModelError, match="changes the hidden states between blocks 0 and 1"):
            driver.record(token_ids)


@torch.no_grad()
def test_a_change_in_place_between_blocks_is_noticed(llama, token_ids):
    model, blocks = llama
    blocks[1].register_forward_pre_hook(halve_in_place)
    with open_driver(model, blocks, token_ids[:1]) as driver:
        assert driver.mode == "suspend"


def test_a_model_that_skips_a_block_is_refused(llama, token_ids):
    model, blocks = llama
    model.config.num_hidden_layers = 2  # the forward pass slices its blocks by this number
    with (
        pytest.raises(ModelError, match=r"LlamaForCausalLM: .* calls its 3 blocks in the order \[0, 1\]"),
        open_driver(model, blocks, token_ids[:1]),
    ):
        pass


@torch.no_grad()
def test_a_model_that_changes_its_own_weights_is_refused(llama, token_ids):
    model, blocks = llama

    def halve_a_weight(module, args):
        blocks[1].mlp.up_proj.weight.mul_(0.5)

    model.model.register_forward_pre_hook(halve_a_weight)
    with pytest.raises(ModelError, match="changes the weights"), open_driver(model, blocks, token_ids[:1]):
        pass


@torch.no_grad()
def test_a_block_that_overwrites_its_input_is_refused(llama, token_ids):
    model, blocks = llama
    with open_driver(model, blocks, token_ids[:1]) as driver:
        hidden, batch = driver.record(token_ids)
        blocks[0].register_forward_pre_hook(halve_in_place)
        with pytest.raises(ModelError, match="block 0 overwrites its input"):
            driver.run_block(0, hidden, batch)
