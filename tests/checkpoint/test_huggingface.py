"""quantlab checkpoints through transformers, as its users know it."""

import copy
import importlib
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from quantlab.checkpoint import registration
from quantlab.checkpoint.reader import load
from quantlab.errors import CheckpointError, UsageError
from quantlab.runtime import LutLinear

TOKENS = torch.arange(12).view(2, 6)
NAMES = ["llama", "tied llama", "gpt2", "opt"]


def logits_of(model):
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_loads_the_very_model_that_was_written(saved, name, dtype):
    quantized = saved(name, dtype)
    model = AutoModelForCausalLM.from_pretrained(quantized.folder)
    assert model.dtype == dtype
    assert {key for key, module in model.named_modules() if isinstance(module, LutLinear)} == set(quantized.modules)
    assert torch.equal(logits_of(model), logits_of(quantized.model))
    assert not hasattr(model.config, "transformers_weights")


@pytest.mark.parametrize("read", [load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB", 500])
@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained_and_back_changes_no_bit(saved, tmp_path, name, max_shard_size, read):
    quantized = saved(name)
    read(quantized.folder).save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
    shards = sorted((tmp_path / "again").glob("quantlab-*.safetensors"))
    assert (len(shards) == 1) == (max_shard_size == "5GB")
    tensors = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    original = {k: t for shard in quantized.folder.glob("*.safetensors") for k, t in load_file(shard).items()}
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensor, original[key]) for key, tensor in tensors.items())
    for reader in (load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits_of(reader(tmp_path / "again")), logits_of(quantized.model))
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 7


def test_saving_never_splits_a_layer_or_writes_a_tied_weight_twice(saved, tmp_path):
    load(saved("tied llama").folder).save_pretrained(tmp_path / "again", max_shard_size=1)
    shards = [set(load_file(shard)) for shard in (tmp_path / "again").glob("quantlab-*.safetensors")]
    assert not any("lm_head.weight" in shard for shard in shards)
    owners = [{name.rpartition(".")[0] for name in shard} for shard in shards]
    assert all(len(owner) == 1 for owner in owners)


def test_saving_into_a_folder_with_a_model_is_refused(saved, tmp_path):
    model = load(saved("llama").folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="holds a model already"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("argument", [{"push_to_hub": True}, {"variant": "x"}, {"is_main_process": False}])
def test_what_saving_does_not_do_is_refused_by_name(saved, tmp_path, argument):
    with pytest.raises(UsageError, match=f"does not take {next(iter(argument))}"):
        load(saved("llama").folder).save_pretrained(tmp_path, **argument)


@pytest.mark.parametrize("size", ["5 parsecs", "GB", "-1KB"])
def test_a_shard_size_that_is_none_is_refused(saved, tmp_path, size):
    with pytest.raises(UsageError, match="max_shard_size"):
        load(saved("llama").folder).save_pretrained(tmp_path, max_shard_size=size)


def test_a_copied_model_saves_itself_and_not_the_original(saved, tmp_path):
    model = load(saved("llama").folder)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        duplicate.lm_head.weight.add_(1)
    duplicate.save_pretrained(tmp_path / "copy")
    assert torch.equal(load(tmp_path / "copy").lm_head.weight, model.lm_head.weight + 1)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_is_followed(saved, device_map):
    quantized = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(quantized.folder, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(quantized.model))


@pytest.mark.filterwarnings("ignore:.*")  # accelerate's own, about offloading
def test_a_block_may_be_offloaded_to_the_disk(saved, tmp_path):
    quantized = saved("llama")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.0": "disk"}
    model = AutoModelForCausalLM.from_pretrained(quantized.folder, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits_of(model), logits_of(quantized.model))


def test_another_dtype_changes_the_computation_but_not_the_stored_weight(saved):
    quantized = saved("opt")
    model = AutoModelForCausalLM.from_pretrained(quantized.folder, dtype=torch.bfloat16)
    for name in quantized.modules:
        layer = model.get_submodule(name)
        assert layer.bias.dtype == torch.bfloat16
        assert torch.equal(layer.dequantize(), quantized.model.get_submodule(name).dequantize())
    assert logits_of(model).dtype == torch.bfloat16


def test_generate_gives_the_same_tokens_as_the_model_in_memory(saved):
    quantized = saved("tied llama")
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_pretrained(quantized.folder)
    expected = quantized.model.generate(TOKENS, **arguments)
    assert torch.equal(model.generate(TOKENS, **arguments), expected)
    assert expected.shape == (2, 11)


@pytest.mark.slow
def test_the_whole_model_compiles_into_one_graph(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama").folder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


def test_dequantizing_gives_an_ordinary_model_with_the_very_weights(saved, tmp_path):
    quantized = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(quantized.folder).dequantize()
    assert not any(isinstance(module, LutLinear) for module in model.modules())
    for name in quantized.modules:
        assert torch.equal(model.get_submodule(name).weight, quantized.model.get_submodule(name).dequantize())
    torch.testing.assert_close(logits_of(model), logits_of(quantized.model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_a_gradient_reaches_what_is_trained_beside_the_quantized_layers(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama").folder)
    model(TOKENS).logits.sum().backward()
    assert model.hf_quantizer.is_trainable
    assert model.model.embed_tokens.weight.grad.any()


def test_a_model_without_head_is_refused(saved):
    with pytest.raises(CheckpointError, match="LlamaModel does not have"):
        AutoModel.from_pretrained(saved("llama").folder)


def test_from_pretrained_is_as_strict_about_missing_tensors_as_load(saved, tmp_path):
    load(saved("llama").folder).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "quantlab.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "quantlab.safetensors.index.json").write_text(json.dumps(index))
    shard = tmp_path / "quantlab-00000.safetensors"
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != "model.norm.weight"}, shard)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, the first are \['model.norm.weight'\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_from_pretrained_checks_the_values_that_kernels_rely_on(saved, tmp_path):
    load(saved("llama").folder).save_pretrained(tmp_path)
    shard = tmp_path / "quantlab-00000.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("outlier_columns"))
    save_file(tensors | {name: tensors[name] + 1000}, shard)
    with pytest.raises(CheckpointError, match="outlier_columns are not all between"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


STOCK = """
import sys
from transformers import AutoModelForCausalLM
assert not any(name.startswith("quantlab") for name in sys.modules)
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except OSError as error:
        print("stopped:", error)
import quantlab
for folder in sys.argv[1:]:
    print("loaded", type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj).__name__)
"""


def test_transformers_without_quantlab_stops_instead_of_inventing_weights(saved, tmp_path):
    load(saved("llama").folder).save_pretrained(tmp_path / "again")
    command = [sys.executable, "-c", STOCK, saved("llama").folder, tmp_path / "again"]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    assert finished.stdout.count("stopped: Error no file named model.safetensors") == 2
    assert finished.stdout.count("loaded LutLinear") == 2


LAZY = """
import sys
import quantlab
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "quantlab" in AUTO_QUANTIZATION_CONFIG_MAPPING and "quantlab" in AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.slow
def test_importing_quantlab_registers_the_format_with_the_import_of_transformers():
    subprocess.run([sys.executable, "-c", LAZY], check=True, capture_output=True)


def test_a_module_is_registered_with_when_it_has_been_imported_and_the_finder_goes(tmp_path, monkeypatch):
    (tmp_path / "stand_in_for_registries.py").write_text("FILLED = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_REGISTRIES", "stand_in_for_registries")
    seen = []
    monkeypatch.setattr(registration, "_register", lambda: seen.append(sys.modules["stand_in_for_registries"].FILLED))
    before = list(sys.meta_path)
    registration.register_when_imported()
    registration.register_when_imported()
    assert len(sys.meta_path) == len(before) + 1
    assert seen == []
    module = importlib.import_module("stand_in_for_registries")
    assert seen == [True]
    assert sys.meta_path == before
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    registration.register_when_imported()
    assert seen == [True, True]


def test_registering_twice_is_harmless():
    before = list(sys.meta_path)
    registration.register_when_imported()
    assert sys.meta_path == before


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # lm-eval passes on what it found in the folder
def test_lm_eval_takes_a_loaded_model_and_a_folder(saved, tmp_path):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(32)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t2", pad_token="t0"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    load(saved("llama").folder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    request = Instance(request_type="loglikelihood", doc={}, arguments=("t3", " t4"), idx=0)
    scores = [
        lm_eval.HFLM(pretrained=pretrained, tokenizer=tokenizer, batch_size=1, max_length=16, device="cpu",
                     dtype="float32").loglikelihood([request], disable_tqdm=True)[0][0]
        for pretrained in (load(tmp_path), str(tmp_path))
    ]  # fmt: skip
    assert scores[0] == scores[1] < 0
