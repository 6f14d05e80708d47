"""The methods that come with quantlab keep the contract that they ask of others."""

import pytest
import torch

from quantlab import registry
from quantlab.testing import Status, check_quantizer, parametrize_with_checks
from quantlab.testing.settings import reference_kernels

BUNDLED = ("ganq", "gptq", "kmeans", "leanquant", "lnq", "quantease", "rtn")
VARIANTS = [
    ("gptq", {"clip_search": "hessian"}),
    ("gptq", {"groups": "dynamic", "column_order": "natural", "clip_search": "weight"}),
    ("ganq", {"iterations": 2, "polish_rounds": 2, "outlier_fraction": 0.1}),
    ("ganq", {"iterations": 1, "polish_rounds": 1, "outlier_fraction": 0.1, "outlier_selection": "cost"}),
    ("kmeans", {"weighting": "hessian_diagonal", "hessian_power": 0.5}),
    ("kmeans", {"weighting": "fisher"}),
    ("leanquant", {"exponent": 2.0, "column_order": "natural"}),
    ("quantease", {"start": "gptq", "iterations": 2, "column_order": "hessian_diagonal"}),
    ("kmeans", {"outlier_fraction": 0.05}),
    ("quantease", {"start": "rtn", "iterations": 5}),
    ("quantease", {"iterations": 8, "outliers": "unstructured", "outlier_fraction": 0.05}),
    ("quantease", {"iterations": 8, "outliers": "structured", "outlier_fraction": 0.05}),
    ("rtn", {"clip_search": "weight"}),
    ("rtn", {"clip_search": "hessian"}),
]
PUBLISHED_CODE = ("ganq", "published_code")
PRESETS = [
    (name, preset)
    for name in BUNDLED
    for preset in registry.load(name).info.presets
    if (name, preset) != PUBLISHED_CODE
]


def test_all_bundled_methods_are_offered_by_this_distribution():
    offered = [name for name, entry in registry.available().items() if entry.distribution == "quantlab-ptq"]
    assert tuple(offered) == BUNDLED


@parametrize_with_checks([registry.configure(name) for name in BUNDLED])
def test_bundled_method_keeps_the_contract(quantizer, check):
    check(quantizer)


@parametrize_with_checks([registry.configure(name, preset=preset) for name, preset in PRESETS])
def test_preset_keeps_the_contract(quantizer, check):
    check(quantizer)


@parametrize_with_checks([registry.configure(name, options=options) for name, options in VARIANTS])
def test_method_with_other_options_keeps_the_contract(quantizer, check):
    check(quantizer)


@parametrize_with_checks([registry.configure("gptq", options={"column_order": "natural", "block_size": 7})])
def test_gptq_in_natural_order_with_ragged_blocks_keeps_the_contract(quantizer, check):
    check(quantizer)


@pytest.mark.slow
@parametrize_with_checks([registry.configure(name) for name in BUNDLED])
def test_bundled_method_keeps_the_contract_without_native_code(quantizer, check):
    with reference_kernels():
        check(quantizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_method_keeps_the_contract_on_a_gpu(name):
    results = check_quantizer(registry.configure(name), device="cuda")
    assert [result for result in results if result.status is Status.FAILED] == []


def test_symmetric_rounding_gives_up_what_its_grid_cannot_represent():
    # A grid centred on zero wastes levels on skewed rows; at 2 bits it has no level at both ends of a row's range.
    reason = "the grid is centred on zero"
    expected = dict.fromkeys(
        (
            "weights_on_a_grid_are_reproduced",
            "loss_does_not_exceed_that_of_rounding",
            "constant_rows_are_reproduced",
        ),
        reason,
    )
    results = check_quantizer(registry.configure("rtn", options={"symmetric": True}), expected_failures=expected)
    assert [result for result in results if result.status is Status.FAILED] == []


def test_the_published_code_of_ganq_gives_up_what_its_first_table_lacks():
    # Its tables have levels twice, and its preconditioner leaves hardly any feedback to separate them.
    expected = {"weights_on_a_grid_are_reproduced": "some levels of the first table are equal"}
    name, preset = PUBLISHED_CODE
    results = check_quantizer(registry.configure(name, preset=preset), expected_failures=expected)
    assert [result for result in results if result.status is Status.FAILED] == []
