"""Each test names one assumption about transformers that quantlab.skeleton rests on."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab.errors import ModelError
from quantlab.skeleton import WeightSource, build_skeleton, find_blocks, read_config, unload, weight_files

ARCHITECTURES = ["llama", "llama-tied", "opt", "gpt2", "qwen3", "gemma3"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_skeleton_has_meta_parameters_and_real_buffers(model_folder, architecture):
    model = build_skeleton(read_config(model_folder(architecture)), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_all_parts_gives_the_weights_of_from_pretrained(model_folder, architecture):
    folder = model_folder(architecture)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = build_skeleton(read_config(folder), torch.float32)
    source = WeightSource(folder, model, torch.float32)
    source.load_rest()
    for index in range(len(find_blocks(model)[1])):
        source.load_block(index)
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_a_block_is_loaded_alone_and_unloaded_again(model_folder):
    folder = model_folder("llama")
    model = build_skeleton(read_config(folder), torch.float32)
    _, blocks = find_blocks(model)
    WeightSource(folder, model, torch.float32).load_block(1)
    assert not any(parameter.is_meta for parameter in blocks[1].parameters())
    assert all(parameter.is_meta for block in (blocks[0], blocks[2]) for parameter in block.parameters())
    unload(blocks[1])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_weights_are_converted_to_the_requested_dtype(model_folder):
    folder = model_folder("qwen3")
    model = build_skeleton(read_config(folder), torch.bfloat16)
    WeightSource(folder, model, torch.bfloat16).load_block(0)
    assert {parameter.dtype for parameter in find_blocks(model)[1][0].parameters()} == {torch.bfloat16}


def test_a_missing_weight_is_named(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = model_folder("llama")
    tensors = {key: value for file in weight_files(folder) for key, value in load_file(file).items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = build_skeleton(read_config(tmp_path), torch.float32)
    source = WeightSource(tmp_path, model, torch.float32)
    source.load_block(0)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        source.load_block(1)


def test_a_shard_outside_the_folder_is_refused(model_folder, tmp_path):
    index = '{"weight_map": {"a": "../outside.safetensors"}}'
    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"outside\.safetensors"):
        weight_files(folder)


def test_a_truncated_weight_file_is_one_clear_error(model_folder, tmp_path):
    folder = model_folder("llama")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(weight_files(folder)[0].read_bytes()[:100])
    model = build_skeleton(read_config(tmp_path), torch.float32)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        WeightSource(tmp_path, model, torch.float32)


def test_an_encoder_is_not_a_causal_language_model():
    from transformers import ViTConfig

    with pytest.raises(ModelError, match="vit"):
        build_skeleton(ViTConfig(), torch.float32)
