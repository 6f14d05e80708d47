"""Calibration in shards: partial sums that are added in order."""

import json

import pytest
import torch
from torch import nn

from quantlab.api import CodebookSpec
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine import stream
from quantlab.engine.journal import Journal
from quantlab.engine.options import EngineOptions
from quantlab.engine.shards import shard_ranges
from quantlab.engine.solve import SolveOptions
from quantlab.engine.statistics import Gradients, StatisticsCollector, StatisticsOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.errors import ModelError
from quantlab.progress import NoProgress
from quantlab.registry import configure


@pytest.mark.parametrize(
    ("batches", "shards", "expected"),
    [(5, 1, [range(5)]), (5, 2, [range(2), range(2, 5)]), (2, 3, [range(1), range(1, 2)])],
)
def test_batches_are_dealt_in_runs_of_nearly_equal_length(batches, shards, expected):
    assert shard_ranges(batches, shards) == expected


OPTIONS = {
    "plain": StatisticsOptions(),
    "drift": StatisticsOptions(target_alpha=0.5),
    "saliency": StatisticsOptions(saliency_groups=2),
}


@pytest.fixture(params=OPTIONS)
def group(request):
    """A function that makes a collector for tokens from a number on, and its batches of 6 and 4 tokens."""
    options, generator = OPTIONS[request.param], torch.Generator().manual_seed(0)
    linears = {"a": nn.Linear(8, 4, bias=False)}
    gradients = Gradients(saliency={"a": torch.rand(2, 10, generator=generator)})
    batches = [torch.randn(6, 8, generator=generator), torch.randn(4, 8, generator=generator)]
    float_inputs = [batch + 0.1 * torch.randn(batch.shape, generator=generator) for batch in batches]

    def collect(positions, first_token=0):
        collector = StatisticsCollector(linears, options, gradients, first_token=first_token)
        for position in positions:
            collector.add(batches[position], float_inputs[position] if options.float_inputs else None)
        return collector

    return collect


def test_absorbed_sums_are_those_over_all_batches(group):
    whole, total = group([0, 1]).finish(), group([0])
    total.absorb(group([1], first_token=6).partial())
    added = total.finish()
    assert added.num_tokens == whole.num_tokens == 10
    for mine, all_at_once in zip(added.moments["a"], whole.moments["a"], strict=True):
        torch.testing.assert_close(mine.hessian, all_at_once.hessian)
        assert torch.equal(mine.hessian, mine.hessian.T)
        if all_at_once.drift is not None:
            torch.testing.assert_close(mine.drift, all_at_once.drift)


def test_a_total_begun_at_zero_is_the_same_bit_for_bit(group):
    first, from_zero = group([0]), group([])
    parts = [group([0]).partial(), group([1], first_token=6).partial()]
    first.absorb(parts[1])
    for part in parts:
        from_zero.absorb(part)
    for mine, other in zip(from_zero.finish().moments["a"], first.finish().moments["a"], strict=True):
        assert torch.equal(mine.hessian, other.hessian)


def test_saliency_of_a_missing_shard_is_noticed():
    linears, gradients = {"a": nn.Linear(8, 4)}, Gradients(saliency={"a": torch.rand(1, 10)})
    collector = StatisticsCollector(linears, OPTIONS["saliency"], gradients, first_token=6)
    with pytest.raises(ModelError, match="received 12 tokens"):
        collector.add(torch.randn(6, 8))


def quantize(folder, target, ids, shards):
    request = StreamRequest(
        source=folder,
        calibration_ids=ids,
        dtype=torch.float32,
        options_of=lambda layer: SolveOptions(quantizer=configure("gptq"), spec=CodebookSpec(bits=3)),
        engine=EngineOptions(calibration_shards=shards),
    )
    target.mkdir()
    with Journal.opened(target) as journal:
        writer = CheckpointWriter(target / "model")
        quantize_model(request, writer, journal, target / "work", NoProgress())
        hidden = [json.dumps(entry["hidden"]) for entry in journal.of_kind("block")]
    return {path.name: path.read_bytes() for path in (target / "model").iterdir()}, hidden


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_model_in_shards_is_nearly_that_of_one_pass(model_folder, token_ids, tmp_path, monkeypatch, architecture):
    passes = []
    collect = stream.LocalShards.collect
    monkeypatch.setattr("quantlab.engine.memory.TOKENS_PER_BATCH", 96)  # 3 batches
    monkeypatch.setattr(
        stream.LocalShards, "collect", lambda self, *rest: passes.append(len(self._ranges)) or collect(self, *rest)
    )
    folder = model_folder(architecture)
    one, hidden = quantize(folder, tmp_path / "one", token_ids, 1)
    assert set(passes) == {1}
    three, _ = quantize(folder, tmp_path / "three", token_ids, 3)
    assert set(passes) == {1, 3}
    again, hidden_again = quantize(folder, tmp_path / "again", token_ids, 8)  # no more than there are batches
    assert again == three
    assert one.keys() == three.keys()
    assert len(hidden) == len(hidden_again)
