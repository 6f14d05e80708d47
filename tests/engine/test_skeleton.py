import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mixtral"])
def test_what_is_outside_the_blocks_is_unloaded_and_comes_back_tied(model_folder, architecture):
    folder = model_folder(architecture)
    model = build_skeleton(read_config(folder), torch.float32)
    source = WeightSource(folder, model, torch.float32)
    source.load_rest()
    source.load_block(0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source.unload_rest()
    loaded = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert loaded == {name for name in before if name.startswith("model.layers.0.")}
    source.load_rest()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta if before[name].is_meta else torch.equal(parameter, before[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (architecture == "llama-tied")


def test_the_tensors_of_a_block_are_those_that_its_loading_reads(model_folder):
    folder = model_folder("mixtral")
    model = build_skeleton(read_config(folder), torch.float32)
    source = WeightSource(folder, model, torch.float32)
    tensors = source.block_tensors(1)
    assert all(key.startswith("model.layers.1.") for _, key in tensors)
    assert {key for _, key in tensors if ".experts.3." in key} == {
        f"model.layers.1.block_sparse_moe.experts.3.w{number}.weight" for number in (1, 2, 3)
    }
    with safe_open(tensors[0][0], framework="pt") as file:
        assert tensors[0][1] in file.keys()  # noqa: SIM118  # no mapping


def test_weights_start_at_even_addresses_wherever_they_lie_in_their_file(model_folder, tmp_path):
    folder = model_folder("llama")
    tensors = {key: value for file in weight_files(folder) for key, value in load_file(file).items()}
    save_file({"a": torch.zeros(1), **tensors}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").data_ptr() % 64
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = build_skeleton(read_config(folder), torch.float32)
    source = WeightSource(tmp_path, model, torch.float32)
    source.load_rest()
    source.load_block(0)
    loaded = [parameter for parameter in model.parameters() if not parameter.is_meta]
    assert loaded
    assert not any(parameter.data_ptr() % 64 for parameter in loaded)


def test_blocks_that_share_weights_are_refused_by_name(model_folder):
    model = build_skeleton(read_config(model_folder("llama")), torch.float32)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.gate_proj\.weight is model\.layers\.0\.mlp\.gate_proj"):
        WeightSource(model_folder("llama"), model, torch.float32)


def test_a_list_that_holds_a_small_part_of_a_decoder_is_not_taken_for_its_blocks(model_folder):
    model = build_skeleton(read_config(model_folder("llama")), torch.float32)
    assert find_blocks(model)[0] == "model.layers"
    model.model.extra = torch.nn.Linear(200, 200, device="meta")
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: no list .* model\.layers, holds 27,840 of 67,872 weights"):
        find_blocks(model)


def test_weights_are_converted_to_the_requested_dtype(model_folder):
    folder = model_folder("qwen3")
    model = build_skeleton(read_config(folder), torch.bfloat16)
    WeightSource(folder, model, torch.bfloat16).load_block(0)
    assert {parameter.dtype for parameter in find_blocks(model)[1][0].parameters()} == {torch.bfloat16}


def test_a_missing_weight_is_named(model_folder, tmp_path):
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
