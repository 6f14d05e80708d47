"""The demo model can tell methods apart; minutes, so not in the default run: `pytest -m slow tests/demo`."""

import json

import pytest

import quantlab

METHODS = ["rtn", "gptq", "ganq"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Held-out perplexities at 3 bits per row, by method, and that of the float model."""
    root = tmp_path_factory.mktemp("ranking")
    perplexities = {}
    for method in METHODS:
        overrides = ["method.bits=3"]
        folder = quantlab.run(f"{method}_w4", overrides=overrides, output_dir=root / method)
        measured = json.loads((folder / "eval.json").read_text())["perplexity"]["stdlib"]
        perplexities[method] = measured["quantized"]
        perplexities["float"] = measured["float"]
    return perplexities


@pytest.mark.slow
def test_three_bit_rounding_costs_at_least_a_tenth_of_perplexity(results):
    assert results["rtn"] >= 1.10 * results["float"]


@pytest.mark.slow
def test_gptq_lies_between_rounding_and_the_float_model(results):
    assert results["float"] < results["gptq"] < results["rtn"]


@pytest.mark.slow
def test_the_gap_of_ganq_is_at_most_four_fifths_of_that_of_gptq(results):
    assert results["ganq"] - results["float"] <= 0.8 * (results["gptq"] - results["float"])
