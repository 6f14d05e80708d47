import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from quantlab.checkpoint import serialize
from quantlab.checkpoint.serialize import data_bytes, write_safetensors
from quantlab.engine import activations
from quantlab.engine.activations import Activations
from quantlab.engine.fingerprint import require_same_run, source_fingerprint
from quantlab.engine.journal import Journal
from quantlab.engine.prefetch import Prefetch
from quantlab.errors import CheckpointError, ResumableError, UsageError


def test_entries_are_read_back_in_order(tmp_path):
    with Journal.opened(tmp_path) as journal:
        journal.append({"kind": "block", "loss": 0.1})
        journal.append({"kind": "rest"})
        journal.append({"kind": "block", "loss": 1e-300})
    with Journal.opened(tmp_path) as journal:
        assert [entry["loss"] for entry in journal.of_kind("block")] == [0.1, 1e-300]
        journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_cannot_be_written_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with Journal.opened(tmp_path) as journal:
        journal.append({"kind": "rest"})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ResumableError, match="No space left"):
                journal.append({"kind": "block"})
        journal.append({"kind": "block", "second": True})
    with Journal.opened(tmp_path) as journal:
        assert journal.entries == [{"kind": "rest"}, {"kind": "block", "second": True}]


@pytest.mark.parametrize("in_memory", [True, False])
def test_hidden_states_come_back_bit_for_bit_also_in_another_process(tmp_path, in_memory):
    hidden = [torch.randn(2, 3, 4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    written = Activations(tmp_path / "a", in_memory=in_memory, lasting=True)
    for batch, states in enumerate(hidden):
        written.put(batch, states)
    written.settle()
    restored = Activations(tmp_path / "a", in_memory=in_memory)
    restored.restore(written.hashes())
    for source in (written, restored):
        for batch, states in enumerate(hidden):
            assert torch.equal(source.get(batch), states)
            assert source.get(batch).dtype == states.dtype
    restored.remove()
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_in_memory_from_which_nobody_goes_on_are_not_written(tmp_path):
    states = Activations(tmp_path, in_memory=True)
    states.put(0, torch.arange(4))
    states.settle()
    assert torch.equal(states.get(0), torch.arange(4))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_take_hidden_states_is_reported_before_they_are_relied_upon(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    states = Activations(tmp_path, in_memory=True, lasting=True)
    monkeypatch.setattr(activations, "flush", full)
    states.put(0, torch.zeros(4))
    with pytest.raises(ResumableError, match="No space left"):
        states.settle()


def test_a_tensor_that_was_read_survives_that_its_file_is_written_again(tmp_path):
    states = Activations(tmp_path, in_memory=False)
    states.put(0, torch.zeros(4))
    before = states.get(0)
    states.put(0, torch.ones(4))
    assert torch.equal(before, torch.zeros(4))
    assert torch.equal(states.get(0), torch.ones(4))


def test_changed_hidden_states_are_refused(tmp_path):
    states = Activations(tmp_path, in_memory=False)
    states.put(0, torch.zeros(4))
    hashes = states.hashes()
    states.put(0, torch.ones(4))
    with pytest.raises(CheckpointError, match=r"batch-00000\.safetensors is missing or not as it was written"):
        Activations(tmp_path, in_memory=False).restore(hashes)


def test_tensors_of_all_layouts_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(serialize, "PIECE_ELEMENTS", 5)
    base = torch.randn(7, 3, 4)
    tensors = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "row": base[1, 1:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "narrow": torch.randn(11).bfloat16(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
    }
    write_safetensors(tmp_path / "file", tensors)
    stored = load_file(tmp_path / "file")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor)
        assert stored[name].dtype == tensor.dtype
    assert data_bytes(tmp_path / "file") == sum(tensor.nbytes for tensor in tensors.values())


def test_tensors_are_narrowed_where_nothing_is_lost(tmp_path):
    tensors = {"exact": torch.ones(3), "inexact": torch.full((3,), 1 / 3), "whole": torch.ones(3, dtype=torch.int32)}
    write_safetensors(tmp_path / "file", tensors, narrow_to=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "file").items()}
    assert dtypes == {"exact": torch.bfloat16, "inexact": torch.float32, "whole": torch.int32}


def test_any_change_of_weights_within_the_samples_changes_the_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(1000)})
    before = source_fingerprint(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(1000).index_fill(0, torch.tensor(777), 1e-9)})
    assert source_fingerprint(tmp_path) != before


def test_differences_are_named():
    with pytest.raises(UsageError) as caught:
        require_same_run({"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [1, 3], "d": "x"}, "runs/x")
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == ["  b: was [1, 2], is [1, 3]", "  d: was None, is 'x'"]


def test_prefetching_reads_the_tensors_and_no_others(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "file", {"a": torch.zeros(10), "b": torch.zeros(1000), "c": torch.zeros(5)})
    read = []
    tensors = Prefetch._read_tensors
    monkeypatch.setattr(Prefetch, "_read_tensors", lambda self, file, names: tensors(self, Counted(file, read), names))
    with Prefetch([(tmp_path / "file", "b"), (tmp_path / "file", "c")]) as prefetch:
        prefetch._thread.join()
    assert sum(read) == 4000 + 20


class Counted:
    """A file that counts what is read into buffers."""

    def __init__(self, file, sizes):
        self.file = file
        self.sizes = sizes

    def __getattr__(self, name):
        return getattr(self.file, name)

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.sizes.append(count)
        return count


def test_a_failing_prefetch_is_silent_since_the_loading_will_tell(tmp_path):
    (tmp_path / "damaged").write_bytes(b"\x00" * 4)
    for name in ("absent", "damaged"):
        with Prefetch([(tmp_path / name, "b")]) as prefetch:
            prefetch._thread.join()
