"""Which batches go how far, and what is on disk then."""

import pytest
import torch

from quantlab.engine.chain import CHECKED_BATCH, Chain
from quantlab.engine.profile import Profile
from quantlab.errors import NumericalError

BATCHES = [torch.full((1, 2), float(number)) for number in range(3)]


class TwoBlocks:
    """A driver of a model that adds one in each of two blocks."""

    replay_on_resume = False
    device = torch.device("cpu")

    def is_last(self, index):
        return index == 1

    def record(self, ids):
        return ids[..., None], ids

    def run_block(self, index, hidden, batch):
        return hidden + 1

    def advance(self, index, output, batch):
        return output

    def finish(self, batch, output):
        return output


def chain(folder, **options):
    return Chain(TwoBlocks(), BATCHES, folder, profile=Profile(), **({"in_memory": True} | options))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_batches_go_through_all_blocks_where_all_are_wanted(tmp_path):
    batches = chain(tmp_path)
    for index in range(2):
        batches.propagate(index, "block").remove()
    for number, ids in enumerate(BATCHES):
        assert torch.equal(batches.finish(number), ids[..., None] + 2)
    assert files(tmp_path) == []


def test_a_run_takes_the_batch_of_its_check_alone_through_the_last_block(tmp_path):
    batches = chain(tmp_path, resumable=True, finishing=CHECKED_BATCH)
    batches.propagate(0, "block").remove()
    assert files(tmp_path) == [f"block-00001/batch-{number:05d}.safetensors" for number in range(3)]
    batches.propagate(1, "block").remove()
    assert files(tmp_path) == ["block-00002/batch-00000.safetensors"]
    assert torch.equal(batches.finish(CHECKED_BATCH), BATCHES[CHECKED_BATCH][..., None] + 2)

    continued = chain(tmp_path, resumable=True, finishing=CHECKED_BATCH)
    continued.continue_from(2, batches.hashes())
    assert torch.equal(continued.finish(CHECKED_BATCH), batches.finish(CHECKED_BATCH))


def test_before_the_first_block_only_shared_work_is_written(tmp_path):
    chain(tmp_path / "run", resumable=True)
    chain(tmp_path / "part", resumable=True, numbers=range(4, 7))
    assert files(tmp_path / "run") == []
    assert files(tmp_path / "part") == [f"block-00000/batch-{number:05d}.safetensors" for number in (4, 5, 6)]


def test_a_part_without_the_batch_of_the_check_ends_before_the_last_block(tmp_path):
    part = chain(tmp_path, resumable=True, finishing=CHECKED_BATCH, numbers=range(4, 7))
    part.propagate(0, "block").remove()
    part.propagate(1, "block").remove()
    assert part.hashes() == {}


def test_an_output_that_is_not_finite_names_the_block(tmp_path):
    batches = chain(tmp_path)
    batches._driver.run_block = lambda *_: torch.tensor([1.0, float("nan")])
    with pytest.raises(NumericalError, match=r"blocks\.0: its output contains NaN"):
        batches.propagate(0, "blocks.0")
