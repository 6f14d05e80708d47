import json

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from quantlab.errors import ModelError
from quantlab.models import ALIASES, model_label, resolve_model


@pytest.fixture
def folder(tmp_path):
    """A folder that passes for a model."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.fixture
def hub(monkeypatch, folder):
    """Replaces the download; records what was asked for, raises what it is told to."""

    class Hub:
        requests = ()
        error = None

        def snapshot_download(self, repo_id, **patterns):
            self.requests = (*self.requests, (repo_id, patterns))
            if self.error is not None:
                raise self.error
            return str(folder)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_local_folder_is_used_as_it_is(folder, hub):
    assert resolve_model(str(folder)) == folder
    assert hub.requests == ()


def test_aliases_and_hub_ids_are_downloaded(folder, hub):
    assert resolve_model("opt-125m") == folder
    assert resolve_model("someone/some-model") == folder
    assert [repo_id for repo_id, _ in hub.requests] == ["facebook/opt-125m", "someone/some-model"]


def test_only_safetensors_and_side_files_are_downloaded(hub):
    from huggingface_hub.utils import filter_repo_objects

    resolve_model("someone/some-model")
    offered = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt"]
    refused = [
        "pytorch_model.bin",
        "onnx/config.json",
        "original/model.safetensors",
        "consolidated.safetensors",
        "x.py",
    ]
    patterns = hub.requests[0][1]
    assert list(filter_repo_objects(offered + refused, **patterns)) == offered


def test_an_alias_wins_over_a_folder_but_a_path_does_not(folder, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "gpt2"
    local.mkdir()
    for name in ("config.json", "model.safetensors"):
        (local / name).write_bytes((folder / name).read_bytes())
    assert resolve_model("gpt2") == folder
    assert resolve_model("./gpt2").resolve() == local


def test_unreachable_hub_is_explained_with_what_to_download_and_where_to_put_it(hub):
    hub.error = LocalEntryNotFoundError("offline")
    with pytest.raises(ModelError) as caught:
        resolve_model("opt-125m")
    message = str(caught.value)
    assert "cannot get the model facebook/opt-125m: the hub cannot be reached" in message
    assert "hf download facebook/opt-125m --local-dir opt-125m" in message
    assert "--model path/to/opt-125m" in message


def test_disk_and_network_errors_are_shown(hub):
    hub.error = OSError("no space left")
    with pytest.raises(ModelError, match="OSError: no space left"):
        resolve_model("someone/some-model")


@pytest.mark.parametrize(("name", "hint"), [("opt-125", "did you mean opt-125m"), ("no/such/folder", "not a folder")])
def test_unknown_names_are_explained(name, hint, hub):
    with pytest.raises(ModelError, match=f"no model {name}.*{hint}.*quantlab ls models"):
        resolve_model(name)
    assert hub.requests == ()


def test_a_file_is_not_a_model(folder):
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve_model(str(folder / "model.safetensors"))


def test_missing_config_is_explained(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json; give the folder"):
        resolve_model(str(folder))


@pytest.mark.parametrize("content", ["{", "\xff", "[]"])
def test_damaged_config_is_explained(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config.json"):
        resolve_model(str(folder))


def test_quantized_model_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantized already \(quant_method gptq\)"):
        resolve_model(str(folder))


def test_encoder_decoder_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"is_encoder_decoder": True, "model_type": "t5"}))
    with pytest.raises(ModelError, match=r"encoder-decoder \(t5\)"):
        resolve_model(str(folder))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"(?s)no model.safetensors but pytorch_model.bin.*save_pretrained\('converted'\)"
    ):
        resolve_model(str(folder))


def test_missing_shards_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"1 of the weight files .* the first is model-2.safetensors"):
        resolve_model(str(folder))
    (folder / "model-2.safetensors").write_bytes(b"")
    assert resolve_model(str(folder)) == folder


def test_index_without_map_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weight_map"):
        resolve_model(str(folder))


def test_every_alias_is_a_hub_id_except_the_bundled_model():
    assert ALIASES["demo"].hub_id == ""
    assert all(alias.hub_id.count("/") == 1 for name, alias in ALIASES.items() if name != "demo")
    assert all(alias.note for alias in ALIASES.values())


def test_labels_are_the_last_part_of_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert model_label("demo") == "demo"
    assert model_label("facebook/opt-125m") == "opt-125m"
    assert model_label("models/mine/") == "mine"
    assert model_label(".") == tmp_path.name
