"""A reader finds a whole checkpoint or none, whatever stops the writer."""

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from quantlab.checkpoint import atomic
from quantlab.checkpoint.export import export
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import CheckpointError, ResumableError

NO_MODULES = QuantizationConfig(
    method={"name": "test", "options": {}}, producer={"name": "quantlab-ptq", "version": "0"}, modules={}
)


@contextmanager
def disk_of(size):
    """Inside, this process can write files of at most so many bytes: the kernel refuses the rest, as a full disk does.

    No longer than necessary: pytest's own output may go to a file, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_typed_error_and_leaves_no_debris(tmp_path):
    writer = CheckpointWriter(tmp_path / "model")
    writer.add_shard("small", {"a": torch.zeros(1)})
    message = r"cannot write .*quantlab-large\.safetensors: .*free some space"
    with disk_of(4096), pytest.raises(ResumableError, match=message):
        writer.add_shard("large", {"b": torch.zeros(1 << 16)})
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["quantlab-small.safetensors"]


def test_a_full_disk_during_export_leaves_nothing(saved, tmp_path):
    folder = saved("llama").folder
    with disk_of(2048), pytest.raises(ResumableError, match="cannot write"):
        export(folder, "dequantized", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write to")
def test_a_read_only_folder_is_a_typed_error(saved):
    with pytest.raises(ResumableError, match=r"cannot write /proc/self/quantlab-rest\.safetensors"):
        CheckpointWriter(Path("/proc/self")).add_shard("rest", {"a": torch.zeros(1)})
    with pytest.raises(ResumableError, match="choose a folder that may be written to"):
        export(saved("llama").folder, "dequantized", Path("/proc/self/out"))
    with pytest.raises(ResumableError, match="choose a folder that may be written to"):
        CheckpointWriter(Path("/proc/self/out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_a_typed_error(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ResumableError, match="Permission denied"):
        CheckpointWriter(tmp_path).add_shard("rest", {"a": torch.zeros(1)})


def write_again(folder, source):
    """The writes of a checkpoint: two shards, a side file, the index, config.json."""
    writer = CheckpointWriter(folder)
    writer.add_shard("one", {"a": torch.zeros(1)})
    writer.add_shard("two", {"b": torch.zeros(1)})
    writer.finish(source, {"model_type": "llama"}, NO_MODULES)


@pytest.mark.parametrize("writes", range(5))
def test_what_is_interrupted_after_any_write_is_no_checkpoint(tmp_path, monkeypatch, writes):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    flush, count = atomic.flush, 0

    def stop(path):
        nonlocal count
        count += path.is_file()
        if count > writes:
            raise OSError(errno.EIO, "the plug was pulled")
        flush(path)

    monkeypatch.setattr(atomic, "flush", stop)
    with pytest.raises(ResumableError, match="the plug was pulled"):
        write_again(tmp_path / "model", tmp_path / "source")
    assert len(list((tmp_path / "model").iterdir())) == writes
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load(tmp_path / "model")


def test_five_writes_make_a_checkpoint(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    write_again(tmp_path / "model", tmp_path / "source")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert len(names) == 5
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"


def test_an_interrupted_save_pretrained_is_no_checkpoint(saved, tmp_path, monkeypatch):
    model = load(saved("llama").folder)

    def stop(writer, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load(tmp_path)


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic.staged_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "content"
    shutil.rmtree(tmp_path / "a" / "b")

    def fail():
        with atomic.staged_folder(tmp_path / "a" / "b"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
