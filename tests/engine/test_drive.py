"""Streaming without quantizing must equal the ordinary forward pass bit for bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab.engine.drive import BlockDriver, deduplicate
from quantlab.errors import ModelError
from quantlab.skeleton import WeightSource, build_skeleton, find_blocks, read_config, unload

ARCHITECTURES = ["llama", "llama-tied", "opt", "gpt2", "qwen3", "gemma3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_streamed_hidden_states_and_logits_equal_the_plain_forward(model_folder, token_ids, architecture):
    folder = model_folder(architecture)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for block in find_blocks(plain)[1]:
        block.register_forward_hook(
            lambda _, __, output: expected.append(output[0] if type(output) is tuple else output)
        )
    expected_logits = plain(input_ids=token_ids, use_cache=False).logits

    model = build_skeleton(read_config(folder), torch.float32)
    _, blocks = find_blocks(model)
    source = WeightSource(folder, model, torch.float32)
    source.load_rest()
    source.load_block(0)
    driver = BlockDriver(model, blocks, token_ids[:1])
    batch = driver.record(token_ids)
    hidden = batch.hidden
    for index, block in enumerate(blocks):
        source.load_block(index)
        hidden = driver.run_block(index, hidden, batch)
        unload(block)
        assert torch.equal(hidden, expected[index]), f"block {index}"
    assert torch.equal(driver.finish(batch, hidden), expected_logits)


@torch.no_grad()
def test_arguments_of_equal_batches_are_shared_and_still_exact(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("gemma3"))
    driver = BlockDriver(model, find_blocks(model)[1], token_ids[:1])
    first, second = driver.record(token_ids[:6]), driver.record(token_ids[6:])
    shared = deduplicate(second, first)
    for mine, original, reference in zip(shared.arguments, second.arguments, first.arguments, strict=True):
        cos = mine.kwargs["position_embeddings"][0]
        assert cos is reference.kwargs["position_embeddings"][0]
        assert torch.equal(cos, original.kwargs["position_embeddings"][0])
    hidden = second.hidden
    for index in range(len(shared.arguments)):
        hidden = driver.run_block(index, hidden, shared)
    assert torch.equal(driver.finish(shared, hidden), model(input_ids=token_ids[6:], use_cache=False).logits)


def test_blocks_have_their_own_forward_again_after_recording(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    _, blocks = find_blocks(model)
    BlockDriver(model, blocks, token_ids[:1]).record(token_ids)
    assert not any("forward" in vars(block) for block in blocks)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    _, blocks = find_blocks(model)
    driver = BlockDriver(model, blocks, token_ids[:1])
    blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
    with pytest.raises(ModelError, match="changes the hidden states between blocks 0 and 1"):
        driver.record(token_ids)


def test_a_model_that_skips_a_block_is_refused(model_folder, token_ids):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    _, blocks = find_blocks(model)
    driver = BlockDriver(model, blocks, token_ids[:1])
    model.config.num_hidden_layers = 2  # the forward pass slices its blocks by this number
    with pytest.raises(ModelError, match="calls its 3 blocks 2 times"):
        driver.record(token_ids)
