import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.reader import load
from quantlab.errors import CheckpointError
from quantlab.runtime import LutLinear

INDEX = "quantlab.safetensors.index.json"
BLOCK = "quantlab-block-00000.safetensors"
QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A private copy of the checkpoint of a small Llama."""
    return shutil.copytree(saved("llama").folder, tmp_path / "copy")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def as_format_1(config):
    """The modules of a section that may be changed without changing bits_per_weight."""
    section = config["quantization_config"]
    section |= {"format_version": 1, "min_reader": 1}
    del section["bits_per_weight"], section["unfused_experts"]
    return section["modules"]


def edit_block(folder, change):
    tensors = load_file(folder / BLOCK)
    change(tensors)
    save_file(tensors, folder / BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "opt"])
def test_a_loaded_model_is_bit_identical_to_the_written_one(saved, name, dtype):
    quantized = saved(name, dtype)
    model = load(quantized.folder)
    assert {key for key, module in model.named_modules() if isinstance(module, LutLinear)} == set(quantized.modules)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, quantized.model(TOKENS).logits)


def test_a_loaded_model_is_ready_for_inference(saved):
    model = load(saved("tied llama").folder)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for _, tensor in tensors)
    assert not any(module.training for module in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 7


def test_another_dtype_changes_the_computation_but_not_the_stored_weight(saved):
    quantized = saved("llama")
    model = load(quantized.folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for name in quantized.modules:
        assert torch.equal(model.get_submodule(name).dequantize(), quantized.model.get_submodule(name).dequantize())


def test_a_bias_takes_the_dtype_of_the_model(saved):
    model = load(saved("opt").folder, dtype=torch.bfloat16)
    assert {module.bias.dtype for module in model.modules() if isinstance(module, LutLinear)} == {torch.bfloat16}
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load(tmp_path)


def test_a_model_that_is_not_quantized_is_refused(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="the model is not quantized"):
        load(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "\udcff", "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_damaged_json_is_refused(checkpoint, file, content):
    (checkpoint / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=file):
        load(checkpoint)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "model.safetensors",
        "quantlab-a.safetensors.pkl",
        "quantlab-a/b.safetensors",
        3,
        None,
    ],
)
def test_a_shard_with_another_kind_of_name_is_refused(checkpoint, shard):
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight is in .* shards must be called"):
        load(checkpoint)


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / BLOCK).unlink()
    with pytest.raises(CheckpointError, match=rf"{BLOCK} does not exist"):
        load(checkpoint)


def test_a_truncated_shard_is_named(checkpoint):
    (checkpoint / BLOCK).write_bytes((checkpoint / BLOCK).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{BLOCK}: not a readable safetensors file"):
        load(checkpoint)


def test_a_tensor_that_only_the_index_or_only_the_file_knows_is_named(checkpoint):
    edit_block(checkpoint, lambda tensors: tensors.update(stowaway=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"disagree about the tensors \['stowaway'\]"):
        load(checkpoint)


def test_an_unexpected_tensor_is_named(checkpoint):
    edit_block(checkpoint, lambda tensors: tensors.update(stowaway=torch.zeros(1)))
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update(stowaway=BLOCK))
    with pytest.raises(CheckpointError, match="unexpected tensor stowaway"):
        load(checkpoint)


@pytest.mark.parametrize("name", [f"{QUERY}.codebook", "model.layers.0.input_layernorm.weight"])
def test_a_missing_tensor_is_named(checkpoint, name):
    edit_block(checkpoint, lambda tensors: tensors.pop(name))
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].pop(name))
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing, the first are \['{name}'\]"):
        load(checkpoint)


def test_a_missing_output_head_is_not_tied_unless_the_model_says_so(checkpoint):
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].pop("lm_head.weight"))
    rest = checkpoint / "quantlab-rest.safetensors"
    save_file({name: tensor for name, tensor in load_file(rest).items() if name != "lm_head.weight"}, rest)
    with pytest.raises(CheckpointError, match=r"missing.*lm_head\.weight"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (f"{QUERY}.packed_codes", lambda t: t[:, :-1].contiguous(), "packed_codes has shape .* the model needs"),
        (f"{QUERY}.packed_codes", lambda t: t.float(), "packed_codes is torch.float32; the model needs torch.int32"),
        (f"{QUERY}.codebook", lambda t: t.float(), "codebook is torch.float32; the model needs torch.float16"),
        (f"{QUERY}.codebook", lambda t: t / 0, "codebook contains NaN or infinity"),
        (f"{KEY}.scale", lambda t: t * torch.nan, "scale contains NaN or infinity"),
        ("model.layers.0.input_layernorm.weight", lambda t: t / 0, "input_layernorm.weight contains NaN"),
        (f"{VALUE}.outlier_offsets", lambda t: t + 1, "outlier_offsets do not ascend"),
        (f"{VALUE}.outlier_offsets", lambda t: t.clamp(min=1), "outlier_offsets do not ascend"),
        (f"{VALUE}.outlier_offsets", lambda t: t.flip(0), "outlier_offsets do not ascend"),
        (f"{VALUE}.outlier_columns", lambda t: t + 15, "outlier_columns are not all between 0 and 15"),
        (f"{VALUE}.outlier_columns", lambda t: t - 2, "outlier_columns are not all between 0 and 15"),
    ],
)
def test_a_damaged_tensor_is_named(checkpoint, name, damage, message):
    edit_block(checkpoint, lambda tensors: tensors.update({name: damage(tensors[name])}))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_values_that_overflow_in_the_requested_dtype_are_refused(checkpoint):
    name = "model.layers.0.input_layernorm.weight"
    edit_block(checkpoint, lambda tensors: tensors.update({name: torch.full((16,), 1e5)}))
    load(checkpoint)
    with pytest.raises(CheckpointError, match=r"NaN or infinity as torch\.float16"):
        load(checkpoint, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda modules: modules.update({"model.layers.9.x": modules[QUERY]}), "layers.9.x, which .* does not have"),
        (lambda modules: modules.update({"model.norm": modules[QUERY]}), "model.norm, which is .*, not a linear layer"),
        (lambda modules: modules[QUERY].update(out_features=17), r"out_features=17.*the model has 16, 16, False"),
        (lambda modules: modules[QUERY].update(bias=True), "bias=True; the model has 16, 16, False"),
    ],
)
def test_modules_that_do_not_fit_the_model_are_refused(checkpoint, change, message):
    edit_json(checkpoint / "config.json", lambda config: change(as_format_1(config)))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_a_module_that_is_not_listed_is_not_swapped(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: as_format_1(config).pop(QUERY))
    with pytest.raises(CheckpointError, match=rf"unexpected tensor {QUERY}.codebook"):
        load(checkpoint)
