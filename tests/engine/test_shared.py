"""Statistics of the float model that several runs share must be those that each run would collect."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from quantlab.api import CodebookSpec, QuantizerInfo, Statistic
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine import shared, stream
from quantlab.engine.journal import Journal
from quantlab.engine.options import EngineOptions
from quantlab.engine.solve import SolveOptions
from quantlab.engine.statistics import StatisticsOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.engine.suspend import SuspendingDriver
from quantlab.errors import CheckpointError, ResumableError
from quantlab.progress import NoProgress
from quantlab.solvers.grid import round_to_nearest

FLOAT = StatisticsOptions(inputs="float")
FISHER = frozenset({Statistic.HESSIAN, Statistic.FISHER})
ARCHITECTURES = ["llama", "gpt2", "gemma3", "mixtral", "deepseek_v3", "dbrx"]


@dataclass(frozen=True)
class Rounding:
    """Round-to-nearest; keeps the statistics it is given."""

    seen: dict
    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="rounding", summary="", paper="", bits=frozenset({3, 4}), needs=frozenset({Statistic.HESSIAN})
    )

    def quantize(self, problem):
        self.seen[problem.name] = problem.statistics
        return round_to_nearest(problem.weight, problem.spec)


@dataclass(frozen=True)
class FisherRounding(Rounding):
    info: ClassVar[QuantizerInfo] = replace(Rounding.info, needs=FISHER)


@dataclass(frozen=True)
class Outcome:
    result: object
    statistics: dict
    files: dict


def quantize(folder, target, token_ids, *, bits=4, method=Rounding, stop=lambda: False, **settings):
    seen = {}
    options = SolveOptions(quantizer=method(seen), spec=CodebookSpec(bits=bits), allow_fallbacks=True)
    settings = {"options_of": lambda layer: options, "statistics": FLOAT} | settings
    request = StreamRequest(source=folder, calibration_ids=token_ids, dtype=torch.float32, **settings)
    work = target.parent / f"{target.name}-work"
    work.mkdir(exist_ok=True)
    with Journal.opened(work) as journal:
        result = quantize_model(request, CheckpointWriter(target), journal, work, NoProgress(), stop)
    return Outcome(result, seen, {path.name: path.read_bytes() for path in target.glob("*.safetensors")})


def after(blocks):
    """Asks to stop after so many blocks."""
    asked = iter(range(1, blocks + 1))
    return lambda: next(asked, blocks) == blocks


def require_same(one, other):
    assert one.files == other.files
    assert one.result.layers == other.result.layers
    assert torch.equal(one.result.check_logits, other.result.check_logits)
    assert one.statistics.keys() == other.statistics.keys()
    for name, statistics in one.statistics.items():
        assert torch.equal(statistics.hessian, other.statistics[name].hessian)
        assert statistics.num_tokens == other.statistics[name].num_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runs_that_share_statistics_end_as_a_run_alone(model_folder, token_ids, tmp_path, architecture):
    folder = model_folder(architecture)
    for bits in (4, 3):
        alone = quantize(folder, tmp_path / f"alone-{bits}", token_ids, bits=bits)
        sharing = quantize(folder, tmp_path / f"{bits}", token_ids, bits=bits, shared_statistics=tmp_path / "shared")
        require_same(sharing, alone)


@contextmanager
def open_suspending(model, blocks, input_ids, device):
    driver = SuspendingDriver(model, blocks, device)
    try:
        yield driver
    finally:
        driver.close()


def test_forwards_that_pause_inside_their_blocks_share_statistics_and_go_on(
    model_folder, token_ids, tmp_path, monkeypatch
):
    for module in (stream, shared):
        monkeypatch.setattr(module, "open_driver", open_suspending)
    folder, where = model_folder("llama"), {"shared_statistics": tmp_path / "shared"}
    alone = quantize(folder, tmp_path / "alone", token_ids)
    require_same(quantize(folder, tmp_path / "one", token_ids, **where), alone)
    with pytest.raises(ResumableError):
        quantize(folder, tmp_path / "two", token_ids, stop=lambda: True, **where)  # after the first block of the run
    assert quantize(folder, tmp_path / "two", token_ids, **where).files == alone.files


def test_experts_that_see_too_few_tokens_are_widened_as_in_a_run_alone(model_folder, token_ids, tmp_path):
    few = token_ids[:1, :4]
    folder = model_folder("mixtral")
    alone = quantize(folder, tmp_path / "alone", few)
    sharing = quantize(folder, tmp_path / "sharing", few, shared_statistics=tmp_path / "shared")
    require_same(sharing, alone)
    assert any("routed_tokens" in layer.diagnostics for layer in sharing.result.layers)


@pytest.mark.parametrize("method", [Rounding, FisherRounding])
def test_saliency_shards_and_a_budget_are_kept_to(model_folder, token_ids, tmp_path, method):
    settings = {
        "method": method,
        "statistics": StatisticsOptions(inputs="float", saliency_groups=2, fisher=method is FisherRounding),
        "engine": EngineOptions(calibration_shards=2, memory_budget_bytes=2**30),
    }
    ids = token_ids.repeat(4, 1)
    alone = quantize(model_folder("llama"), tmp_path / "alone", ids, **settings)
    shared_statistics = tmp_path / "shared"
    sharing = quantize(model_folder("llama"), tmp_path / "one", ids, shared_statistics=shared_statistics, **settings)
    require_same(sharing, alone)
    for name, statistics in alone.statistics.items():
        if method is FisherRounding:
            assert torch.equal(statistics.fisher, sharing.statistics[name].fisher)


def test_the_float_model_is_passed_once_and_its_time_counts_for_every_run(
    model_folder, token_ids, tmp_path, monkeypatch
):
    passes = []
    propagate = shared.Chain.propagate

    def remember(chain, index, name):
        passes.append(len(chain))
        return propagate(chain, index, name)

    monkeypatch.setattr(shared.Chain, "propagate", remember)
    monkeypatch.setattr(stream, "plan_memory", one_sequence_per_batch(stream.plan_memory))
    batches = len(token_ids)
    first = quantize(model_folder("llama"), tmp_path / "first", token_ids, shared_statistics=tmp_path / "shared")
    assert passes == [batches] * 2 + [1] * 3  # nothing reads what leaves the last block
    passes.clear()
    second = quantize(model_folder("llama"), tmp_path / "second", token_ids, shared_statistics=tmp_path / "shared")
    assert passes == [1] * 3
    seconds = json.loads((tmp_path / "shared" / shared.COMPLETE).read_text())["seconds"]
    assert first.result.borrowed_s == 0
    assert 0 < second.result.borrowed_s <= seconds + 0.001  # rounded
    for outcome in (first, second):
        assert outcome.result.seconds["statistics"] >= seconds - 0.001


def one_sequence_per_batch(plan_memory):
    def plan(sizes, samples, tokens, *rest, **settings):
        return replace(plan_memory(sizes, samples, tokens, *rest, **settings), tokens_per_batch=tokens)

    return plan


def test_layers_that_keep_their_weights_have_no_statistics(model_folder, token_ids, tmp_path):
    options = SolveOptions(quantizer=Rounding({}), spec=CodebookSpec(bits=4))
    settings = {"options_of": lambda layer: None if "k_proj" in layer or ".1." in layer else options}
    quantize(model_folder("llama"), tmp_path / "one", token_ids, shared_statistics=tmp_path / "shared", **settings)
    groups = json.loads((tmp_path / "shared" / shared.COMPLETE).read_text())["groups"]
    assert [list(group["moments"]) for group in groups[:2]] == [
        ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"],
        ["model.layers.0.self_attn.o_proj"],
    ]
    assert len(groups) == 2 * 4


def test_a_stopped_run_goes_on_with_what_is_shared(model_folder, token_ids, tmp_path):
    folder, where = model_folder("llama"), {"shared_statistics": tmp_path / "shared"}
    alone = quantize(folder, tmp_path / "alone", token_ids)
    with pytest.raises(ResumableError):
        quantize(folder, tmp_path / "one", token_ids, stop=after(4), **where)  # three of the pass, one of the run
    continued = quantize(folder, tmp_path / "one", token_ids, **where)
    assert continued.files == alone.files
    assert continued.result.borrowed_s == 0


@pytest.mark.parametrize("statistics", [FLOAT, StatisticsOptions(saliency_groups=1)], ids=["statistics", "gradients"])
def test_a_pass_through_the_float_model_is_stopped_after_a_block_and_begins_anew(
    model_folder, token_ids, tmp_path, statistics
):
    where = {"shared_statistics": tmp_path / "shared"} if statistics is FLOAT else {"gradients": tmp_path / "shared"}
    settings = {"statistics": statistics, **where}
    with pytest.raises(ResumableError, match="of the float model"):
        quantize(model_folder("llama"), tmp_path / "one", token_ids, stop=after(2), **settings)
    alone = quantize(model_folder("llama"), tmp_path / "alone", token_ids, statistics=statistics)
    assert quantize(model_folder("llama"), tmp_path / "one", token_ids, **settings).files == alone.files


def test_a_run_that_was_begun_in_a_comparison_goes_on_only_there(model_folder, token_ids, tmp_path):
    folder = model_folder("llama")
    with pytest.raises(ResumableError):
        quantize(folder, tmp_path / "one", token_ids, stop=after(4), shared_statistics=tmp_path / "shared")
    with pytest.raises(CheckpointError, match="begun in a comparison"):
        quantize(folder, tmp_path / "one", token_ids)


def test_a_damaged_file_is_refused(model_folder, token_ids, tmp_path):
    folder, where = model_folder("llama"), {"shared_statistics": tmp_path / "shared"}
    quantize(folder, tmp_path / "one", token_ids, **where)
    path = next((tmp_path / "shared").glob("block-00001-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{path.name} is missing or not as it was written"):
        quantize(folder, tmp_path / "two", token_ids, **where)


def test_statistics_behind_quantized_layers_are_not_shared(model_folder, token_ids, tmp_path):
    with pytest.raises(ValueError, match="those of one run"):
        quantize(
            model_folder("llama"),
            tmp_path / "one",
            token_ids,
            statistics=StatisticsOptions(),
            shared_statistics=tmp_path / "shared",
        )
