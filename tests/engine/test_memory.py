"""How much memory a run is expected to take, and what it takes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from quantlab.engine.memory import RUNTIME_BYTES, ModelSizes, plan_memory
from quantlab.engine.options import EngineOptions
from quantlab.engine.statistics import StatisticsOptions
from quantlab.engine.survey import survey_model
from quantlab.errors import RecipeError

GIB = 2**30
SEVEN = ModelSizes(
    outside_bytes=2 * 2 * 32000 * 4096,
    block_bytes=2 * (4 * 4096**2 + 3 * 4096 * 11008),
    hidden_size=4096,
    vocabulary=32000,
    shapes=frozenset({(4096, 4096), (11008, 4096), (4096, 11008)}),
    expert_groups=0,
    itemsize=2,
)
SAMPLES, LENGTH = 128, 2048
BENCHMARK = Path(__file__).parent.parent / "bench" / "streaming.py"


def plan(gib=None, *, activations="auto", sizes=SEVEN, units=None, shards=1, **statistics):
    budget = None if gib is None else int(gib * GIB)
    options = EngineOptions(
        memory_budget_bytes=budget, activations=activations, rows_per_unit=units, calibration_shards=shards
    )
    return plan_memory(sizes, SAMPLES, LENGTH, options, StatisticsOptions(**statistics))


@pytest.mark.parametrize("gib", [5, 6, 8, 12, 24, 64])
def test_the_expected_peak_stays_within_the_budget(gib):
    assert plan(gib).peak_bytes <= gib * GIB


def test_a_larger_budget_never_cuts_finer():
    plans = [plan(gib) for gib in (5, 6, 8, 12, 24, 64)]
    rows = [memory.max_rows or 10**9 for memory in plans]
    assert rows == sorted(rows)
    assert [memory.tokens_per_batch for memory in plans] == sorted(memory.tokens_per_batch for memory in plans)
    assert [memory.activations_in_memory for memory in plans] == [False, False, False, True, True, True]
    assert plans[0].max_rows is not None
    assert plans[-1].max_rows is None


def test_without_a_budget_nothing_is_cut():
    memory = plan()
    assert memory.max_rows is None
    assert memory.tokens_per_batch == 4096


def test_a_budget_that_cannot_be_kept_is_refused_with_what_needs_how_much():
    with pytest.raises(RecipeError, match=r"engine\.memory_budget=2,048 MiB is too small") as caught:
        plan(2)
    needed = int(str(caught.value).split("it needs ")[1].split(" MiB")[0].replace(",", ""))
    assert plan((needed + 1) / 1024).peak_bytes <= (needed + 1) * 2**20
    assert f"runtime: {RUNTIME_BYTES // 2**20} MiB" in str(caught.value)


def test_hidden_states_are_kept_where_the_recipe_says():
    assert not plan(64, activations="disk").activations_in_memory
    assert plan(12, activations="ram").activations_in_memory
    with pytest.raises(RecipeError, match=r"hidden states: 4,096 MiB"):
        plan(6, activations="ram")


def test_what_decides_about_digits_does_not_depend_on_where_hidden_states_are_kept():
    cut = [(memory.tokens_per_batch, memory.max_rows) for memory in (plan(9), plan(9, activations="disk"))]
    assert cut[0] == cut[1]


def test_a_second_chain_and_saliency_are_counted():
    assert plan(64, target_alpha=0.5).parts["hidden states"] == 2 * plan(64).parts["hidden states"]
    assert plan(64, saliency_groups=4).parts["statistics"] == 4 * plan(64).parts["statistics"] == 4 * 4 * 11008**2


def test_the_peak_is_that_of_the_largest_phase():
    parts = plan(64).parts
    inside = 1.5 * parts["block"] + parts["statistics"] + parts["solver"] + parts["layers"]
    assert parts["rows"] < parts["factoring"]
    assert plan(64).peak_bytes == parts["runtime"] + parts["hidden states"] + inside + parts["factoring"]
    uncalibrated = plan_memory(SEVEN, 1, LENGTH, EngineOptions(), StatisticsOptions(), calibrated=False)
    occupied = {name: uncalibrated.parts[name] for name in ("runtime", "hidden states", "statistics", "layers", "rows")}
    assert uncalibrated.peak_bytes == 1.5 * parts["block"] + sum(occupied.values())
    wide = dataclasses.replace(SEVEN, outside_bytes=8 * GIB)
    assert plan(64, sizes=wide).peak_bytes == 8 * GIB + sum(
        parts[name] for name in ("runtime", "hidden states", "block")
    )
    many = dataclasses.replace(SEVEN, vocabulary=1 << 20)
    assert plan(64, sizes=many).peak_bytes == sum(
        plan(64, sizes=many).parts[name] for name in ("runtime", "hidden states", "outside", "logits")
    )


def test_weights_outside_the_blocks_that_stay_are_counted_while_solving():
    engine = EngineOptions(memory_budget_bytes=8 * GIB)
    left, kept = (
        plan_memory(SEVEN, SAMPLES, LENGTH, engine, StatisticsOptions(), outside_stays=stays) for stays in (False, True)
    )
    assert kept.peak_bytes - left.peak_bytes == SEVEN.outside_bytes


def test_a_method_without_statistics_needs_no_matrices_beside_the_hessian():
    engine = EngineOptions()
    memory = plan_memory(SEVEN, SAMPLES, LENGTH, engine, StatisticsOptions(), calibrated=False)
    assert memory.parts["solver"] == memory.parts["factoring"] == 0
    assert memory.statistics_bytes == plan().statistics_bytes
    assert memory.peak_bytes < plan().peak_bytes


def test_experts_share_what_is_left():
    mixture = dataclasses.replace(SEVEN, expert_groups=2 * 64)
    assert plan(64).statistics_bytes == plan(64).parts["statistics"]
    assert plan(64, sizes=mixture).statistics_bytes > 16 * plan(64).statistics_bytes
    for gib in (6, 8, 24, 64):
        assert plan(gib, sizes=mixture).peak_bytes <= gib * GIB


def test_the_sizes_of_a_model_are_those_of_its_weights(model_folder):
    config = AutoConfig.from_pretrained(model_folder("llama"))
    sizes = survey_model(config, torch.bfloat16).sizes
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert sizes.block_bytes == 2 * block
    assert sizes.outside_bytes == 2 * (2 * 96 * 32 + 32)
    assert (sizes.hidden_size, sizes.vocabulary, sizes.itemsize) == (32, 96, 2)
    assert sizes.shapes == {(32, 32), (16, 32), (64, 32), (32, 64)}


@pytest.mark.slow
def test_a_model_four_times_the_budget_is_quantized_within_it():
    """4.2 GiB of weights, 1 GiB of memory, enforced by the kernel; the resident memory includes mapped files."""
    command = [sys.executable, BENCHMARK, "narrow", "--budget", "1GiB", "--tokens", "256", "--enforced", "--json"]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert result["source_bytes"] >= 4 * GIB
    assert result["peak_bytes"] <= GIB
    assert result["peak_bytes"] <= 1.1 * result["expected_bytes"]


def test_rows_are_cut_by_the_recipe_and_by_the_budget_whichever_is_finer():
    assert plan(units=1000).max_rows == 1000
    assert plan(64, units=1000).max_rows == 1000
    assert plan(64, units=16).max_rows == 16  # fewer than a budget may ask for
    assert plan(64, units=1000).parts["rows"] < plan(64).parts["rows"]
    by_budget = plan(5).max_rows
    assert plan(5, units=by_budget + 1).max_rows == by_budget
    assert plan(5, units=by_budget - 1).max_rows == by_budget - 1


@pytest.mark.parametrize("gib", [None, 6, 12])
def test_shards_hold_their_sums_beside_those_before_them(gib):
    one, more = plan(gib), plan(gib, shards=4)
    assert more.parts["statistics"] == 2 * one.parts["statistics"]
    assert more.statistics_bytes <= one.statistics_bytes
    assert gib is None or more.peak_bytes <= gib * GIB
