import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from quantlab.checkpoint.atomic import replacing
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import CheckpointError

QUANTIZATION = QuantizationConfig(
    method={"name": "test", "options": {}}, producer={"name": "quantlab-ptq", "version": "0"}, modules={}
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "generation_config.json"):
        (folder / name).write_bytes(name.encode() + b"\r\n\xff")
    for name in ("model.safetensors", "config.json", "README.md", "modeling.py"):
        (folder / name).write_text("not copied")
    return folder


def test_a_finished_checkpoint_has_shards_index_config_and_side_files(tmp_path, source):
    folder = tmp_path / "out" / "model"
    writer = CheckpointWriter(folder)
    writer.add_shard("rest", {"a.weight": torch.arange(6.0).view(2, 3)})
    writer.add_shard("block-00000", {"b.codes": torch.ones(4, dtype=torch.int32)})
    writer.finish(source, {"model_type": "llama"}, QUANTIZATION)

    index = json.loads((folder / "quantlab.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a.weight": "quantlab-rest.safetensors",
        "b.codes": "quantlab-block-00000.safetensors",
    }
    shards = {name: digest for name, digest in writer.files().items() if name.endswith(".safetensors")}
    assert index["metadata"] == {"total_size": 6 * 4 + 4 * 4, "sha256": shards}
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "llama", "quantization_config": QUANTIZATION.to_dict()}
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == writer.files().keys()
    assert not {"README.md", "modeling.py", "model.safetensors"} & writer.files().keys()


def test_the_hashes_are_those_of_the_files(tmp_path, source):
    writer = CheckpointWriter(tmp_path / "out")
    writer.add_shard("rest", {"a": torch.zeros(1)})
    writer.finish(source, {}, QUANTIZATION)
    for name, digest in writer.files().items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_there_is_no_config_before_the_checkpoint_is_finished(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.add_shard("rest", {"a": torch.zeros(1)})
    assert not (tmp_path / "config.json").exists()


def test_views_and_shared_memory_are_stored_as_plain_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    CheckpointWriter(tmp_path).add_shard("rest", {"base": base, "same": base, "transposed": base.T, "row": base[1]})
    with safe_open(tmp_path / "quantlab-rest.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("transposed"), base.T)
        assert torch.equal(file.get_tensor("same"), base)
        assert torch.equal(file.get_tensor("row"), base[1])


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {name: torch.full((3,), float(index)) for index, name in enumerate("cab")}
    for folder in ("first", "second"):
        CheckpointWriter(tmp_path / folder).add_shard("rest", tensors)
    shard = "quantlab-rest.safetensors"
    assert (tmp_path / "first" / shard).read_bytes() == (tmp_path / "second" / shard).read_bytes()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(2, device="meta"), "bad.name has no values"),
        (torch.tensor([1.0, torch.nan]), "bad.name contains NaN or infinity"),
        (torch.tensor([torch.inf], dtype=torch.float16), "bad.name contains NaN or infinity"),
    ],
)
def test_a_tensor_without_usable_values_is_refused_and_nothing_is_written(tmp_path, tensor, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointWriter(tmp_path).add_shard("rest", {"good": torch.zeros(1), "bad.name": tensor})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_cannot_be_written_twice(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.add_shard("one", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"a is already written to quantlab-one\.safetensors"):
        writer.add_shard("two", {"a": torch.zeros(1)})


@pytest.mark.parametrize("name", ["one", "", "../one", "a/b", ".hidden", "a b"])
def test_a_shard_name_that_is_taken_or_not_plain_is_refused(tmp_path, name):
    writer = CheckpointWriter(tmp_path / "out")
    writer.add_shard("one", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="cannot name a shard"):
        writer.add_shard(name, {"b": torch.zeros(1)})


def test_a_failed_write_leaves_the_previous_file_and_no_debris(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_halfway()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


def test_every_file_gets_the_permissions_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    writer = CheckpointWriter(tmp_path / "model")
    writer.add_shard("rest", {"weight": torch.zeros(2)})
    written = tmp_path / "model" / "quantlab-rest.safetensors"
    assert written.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
