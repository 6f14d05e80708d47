"""Checkpoints made to harm: every one is refused with a typed error, before it is used."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantlab.checkpoint import documents, limits
from quantlab.checkpoint.contents import read_contents
from quantlab.checkpoint.guard import check_config
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.verify import verify
from quantlab.errors import CheckpointError, QuantlabError

INDEX = "quantlab.safetensors.index.json"
BLOCK = "quantlab-block-00000.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved("llama").folder, tmp_path / "copy")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path, change):
    """Change the header of a shard as text."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = change(content[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    with pytest.raises(CheckpointError, match=f"{message}|is not as it was written"):
        verify(folder)


def test_a_header_that_names_a_tensor_twice_is_refused(checkpoint):
    name = f'"{QUERY}.codebook":'
    edit_header(checkpoint / BLOCK, lambda text: text.replace(name, f'{name}{{"dtype":"F16"}},{name}', 1))
    refused(checkpoint, rf"names '{QUERY}.codebook' twice")


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_names_a_key_twice_is_refused(checkpoint, file):
    text = (checkpoint / file).read_text()
    (checkpoint / file).write_text('{"same": 1, "same": 2,' + text[1:])
    refused(checkpoint, "names 'same' twice")


@pytest.mark.parametrize("shard", ["../quantlab-x.safetensors", "quantlab-..\\x.safetensors", "quantlab-/etc/passwd"])
def test_a_shard_name_that_leads_elsewhere_is_refused(checkpoint, shard):
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    refused(checkpoint, "shards must be called")


@pytest.mark.parametrize("file", ["config.json", INDEX, BLOCK, "generation_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(checkpoint, tmp_path, file):
    shutil.move(checkpoint / file, tmp_path / "outside")
    (checkpoint / file).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=rf"{file} is a link that leads out of the folder"):
        load(checkpoint)


def test_the_links_of_the_hub_cache_are_followed(checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.iterdir():
        shutil.copy(path, blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-of-{path.name}")
    assert load(snapshot).config.model_type == "llama"


@pytest.mark.parametrize("file", ["config.json", INDEX, BLOCK])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused_without_waiting(checkpoint, file):
    (checkpoint / file).unlink()
    os.mkfifo(checkpoint / file)
    refused(checkpoint, f"{file}: is not an ordinary file")
    (checkpoint / file).unlink()
    (checkpoint / file).mkdir()
    refused(checkpoint, f"{file}: is not an ordinary file")


def test_codes_out_of_range_cannot_be_stored_and_their_padding_is_checked(checkpoint):
    every_bit = torch.full((3, 16, 1), -1, dtype=torch.int32)  # 16 codes fill the lower half of a word
    save_file(load_file(checkpoint / BLOCK) | {f"{QUERY}.packed_codes": every_bit}, checkpoint / BLOCK)
    with pytest.raises(CheckpointError, match=r"q_proj.packed_codes has bits behind the last of its 16 codes"):
        load(checkpoint)
    save_file(load_file(checkpoint / BLOCK) | {f"{QUERY}.packed_codes": every_bit & 0xFFFF}, checkpoint / BLOCK)
    weight, levels = load(checkpoint).get_submodule(QUERY).dequantize(), load_file(checkpoint / BLOCK)
    highest = levels[f"{QUERY}.codebook"][..., 7].float()
    assert torch.equal(weight, highest.repeat_interleave(8, dim=1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [f"{QUERY}.codebook", "model.layers.0.self_attn.k_proj.scale", "model.norm.weight"])
def test_a_value_that_is_no_number_is_refused(checkpoint, name, value):
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, shard)
    refused(checkpoint, f"{name.rpartition('.')[0]}.* contains NaN or infinity")


@pytest.mark.parametrize("shape", ["[99999999999,99999999999]", "[-1,16]", "[1e3]", "[true]", '"x"', "null", "[]"])
def test_an_absurd_shape_is_refused(checkpoint, shape):
    before = f'"{QUERY}.codebook":{{"dtype":"F16","shape":[16,2,8]'
    edit_header(checkpoint / BLOCK, lambda text: text.replace(before, before.replace("[16,2,8]", shape)))
    refused(checkpoint, "codebook")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends inside its header"),
        (b"\x02", "ends inside its header"),
        (struct.pack("<Q", 1 << 63) + b"{}", "announces a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 1 << 20) + b"{}", "ends inside its header"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object"),
        (struct.pack("<Q", 4) + b"{\xff}}", "not readable as JSON"),
        (struct.pack("<Q", 0), "ends inside its header"),
    ],
)
def test_a_header_that_is_none_is_refused(checkpoint, content, message):
    (checkpoint / BLOCK).write_bytes(content)
    refused(checkpoint, message)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64", "F13", 3])
def test_an_unknown_type_is_refused(checkpoint, dtype):
    edit_header(checkpoint / BLOCK, lambda text: text.replace('"F16"', json.dumps(dtype), 1))
    refused(checkpoint, "is of type")


def test_a_document_above_the_cap_is_refused_before_it_is_parsed(checkpoint, monkeypatch):
    monkeypatch.setattr(documents, "MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="larger than 0 MiB"):
        load(checkpoint)
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        documents.read_header(checkpoint / BLOCK)


def test_the_caps_are_the_declared_ones():
    assert (limits.MAX_JSON_BYTES, limits.MAX_BUFFER_BYTES) == (64 * 2**20, 2**30)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, more than any model has"),
        ({"\x1b[31m": 1}, r"'\\x1b\[31m' cannot be the name of a setting"),
        ({"num_hidden_layers": 4000}, "the .* stored tensors cannot hold"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648, more than any model has"),
        ({"vocab_size": 2**31 - 1}, "cannot hold"),
        ({"hidden_size": 2**30}, "cannot hold"),
        ({"intermediate_size": 2**31 - 1}, "cannot hold"),
        ({"head_dim": 2**31 - 2, "num_attention_heads": 1}, "cannot hold"),
        ({"num_attention_heads": 0}, "transformers builds no model"),
        ({"hidden_size": -16}, "transformers builds no model"),
        ({"hidden_size": "wide"}, "transformers builds no model|cannot read config"),
        ({"hidden_act": "no_such_activation"}, "transformers builds no model"),
        ({"rope_parameters": {"rope_type": "none"}}, "transformers builds no model|cannot read config"),
        ({"configuration_files": ["config.5.0.0.json"]}, "configuration_files names another configuration"),
        ({"attn_implementation": "someone/kernel"}, "kernels named by a checkpoint are not fetched"),
        ({"model_type": "no_such_model"}, "cannot read config"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}, "cannot read config"),
    ],
)
def test_a_configuration_that_asks_for_too_much_or_for_nonsense_is_refused(checkpoint, values, message):
    (checkpoint / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    edit_json(checkpoint / "config.json", lambda config: config.update(values))
    with pytest.raises(QuantlabError, match=message):
        load(checkpoint)


@pytest.mark.slow
def test_no_architecture_is_refused_for_its_usual_sizes():
    configs = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            configs.append(AutoConfig.for_model(name).to_dict())
        except (ImportError, TypeError, ValueError, StrictDataclassError):  # composite or needs an optional package
            continue
    assert len(configs) > 100
    for config in configs:
        check_config(json.loads(json.dumps(config, default=str)))


def test_sizes_per_layer_are_not_taken_for_numbers_of_layers():
    check_config({"vocab_size_per_layer_input": 262144, "text_config": {"vocab_size_per_layer": 262144}})
    with pytest.raises(CheckpointError, match=r"text_config\.n_layer is 5000"):
        check_config({"text_config": {"n_layer": 5000}})


def test_huge_computed_tables_are_refused_before_they_are_allocated(saved, tmp_path):
    folder = shutil.copytree(saved("opt").folder, tmp_path / "copy")
    config = {"model_type": "gptj", "vocab_size": 32, "n_embd": 4, "n_head": 2, "n_layer": 1, "rotary_dim": 2}
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(
        json.dumps(config | {"n_positions": 2**31 - 1, "quantization_config": section, "architectures": ["GPTJ"]})
    )
    with pytest.raises(CheckpointError, match=r"MiB of computed tables; at most 1024 MiB are allocated"):
        load(folder)


@pytest.mark.parametrize("content", ["[]", '{"a": 1', "\x00"])
def test_a_generation_config_that_is_none_is_refused(checkpoint, content):
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: transformers cannot use it"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\ud800"])
def test_a_tensor_name_that_would_garble_a_terminal_is_refused_in_quotes(checkpoint, name):
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({name: BLOCK}))
    with pytest.raises(CheckpointError, match="cannot be the name of a tensor") as caught:
        load(checkpoint)
    assert str(caught.value).isprintable()


def test_a_layer_whose_tensors_are_spread_over_shards_is_refused(checkpoint):
    tensors = load_file(checkpoint / BLOCK)
    name = f"{QUERY}.codebook"
    save_file({name: tensors.pop(name)}, checkpoint / "quantlab-more.safetensors")
    save_file(tensors, checkpoint / BLOCK)

    def move(index):
        index["weight_map"][name] = "quantlab-more.safetensors"
        del index["metadata"]["sha256"]

    edit_json(checkpoint / INDEX, move)
    refused(checkpoint, r"holds a part of .*q_proj, but not its \['codebook'\]")


@pytest.mark.parametrize("sha256", [3, {}, {BLOCK: 1, "quantlab-rest.safetensors": 2}])
def test_hashes_that_do_not_belong_to_the_shards_are_refused(checkpoint, sha256):
    edit_json(checkpoint / INDEX, lambda index: index["metadata"].update(sha256=sha256))
    refused(checkpoint, r"metadata\.sha256")


@pytest.mark.parametrize("names", [["model.layers.0.mlp"], ["model.layers.7.mlp.experts"], ["model.embed_tokens"]])
def test_experts_that_the_model_does_not_have_are_refused(checkpoint, names):
    edit_json(checkpoint / "config.json", lambda c: c["quantization_config"].update(unfused_experts=names))
    refused(checkpoint, "unfused_experts does not fit the model")


def test_no_tensor_is_read_before_the_files_agree(checkpoint, monkeypatch):
    monkeypatch.setattr("quantlab.checkpoint.shard.safe_open", None)
    assert read_contents(checkpoint).quantization.modules


def test_nothing_that_is_read_back_is_a_pickle():
    root = Path(__file__).parents[2]
    sources = [path for part in ("quantlab", "plugins", "kernels") for path in (root / part).rglob("*.py")]
    # The contract suite pickles methods and reads back what it has just made.
    files = [path for path in sources if not path.is_relative_to(root / "quantlab" / "testing")]
    assert len(files) > 50
    pickles = re.compile(
        r"^\s*(import|from) (pickle|dill|cloudpickle|shelve|marshal|joblib)\b|torch\.(load|save)\(|allow_pickle", re.M
    )
    assert [path for path in files if pickles.search(path.read_text())] == []


def test_remote_code_is_never_on():
    root = Path(__file__).parents[2]
    mentions = [
        match[0]
        for path in (root / "quantlab").rglob("*.py")
        for match in re.finditer(r"trust_remote_code\s*=\s*\w+", path.read_text())
    ]
    assert set(mentions) == {"trust_remote_code=False"}
