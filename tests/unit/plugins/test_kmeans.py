import math
from dataclasses import replace

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, Lut, Statistic
from quantlab.solvers.kmeans import kmeans_levels
from quantlab_kmeans import KmeansQuantizer


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(bits=3, group_size=None):
    inputs = normal(100, 32, seed=1) @ normal(32, 32, seed=2)
    return LayerProblem(
        name="layer",
        weight=normal(8, 32, seed=0),
        spec=CodebookSpec(bits=bits, group_size=group_size),
        statistics=InputStatistics(
            hessian=inputs.T @ inputs / 100, num_tokens=100, fisher=normal(8, 32, seed=3).exp() ** 2
        ),
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("iterations", 0, "iterations=0"),
        ("weighting", "hessian", "none, hessian_diagonal, fisher"),
        ("hessian_power", -0.5, "hessian_power=-0.5"),
        ("hessian_power", math.nan, "hessian_power=nan"),
        ("outlier_fraction", 1.5, "outlier_fraction=1.5"),
        ("sensitive_fraction", -0.1, "sensitive_fraction=-0.1"),
    ],
)
def test_impossible_options_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        KmeansQuantizer(**{option: value})


@pytest.mark.parametrize("weighting", ["none", "hessian_diagonal"])
def test_sensitive_outliers_need_to_know_what_is_sensitive(weighting):
    with pytest.raises(ValueError, match="set weighting: fisher"):
        KmeansQuantizer(weighting=weighting, sensitive_fraction=0.1)


def test_each_weighting_needs_its_own_statistic_and_outliers_tie_rows_together():
    assert KmeansQuantizer().info == KmeansQuantizer.info
    assert KmeansQuantizer(weighting="hessian_diagonal").info.needs == {Statistic.HESSIAN}
    assert KmeansQuantizer(weighting="fisher").info.needs == {Statistic.FISHER}
    assert KmeansQuantizer(weighting="fisher").info.row_independent
    assert not KmeansQuantizer(outlier_fraction=0.01).info.row_independent
    assert not KmeansQuantizer(weighting="fisher", sensitive_fraction=0.01).info.row_independent


def test_squeezellm_is_a_preset():
    preset = KmeansQuantizer(**KmeansQuantizer.info.presets["squeezellm"])
    assert preset == KmeansQuantizer(
        iterations=50, weighting="fisher", outlier_fraction=0.004, sensitive_fraction=0.0005
    )


def test_a_table_is_fitted_per_group():
    answer = KmeansQuantizer().quantize(problem(group_size=8))
    assert isinstance(answer.codebook, Lut)
    assert answer.codebook.values.shape == (8, 4, 8)
    assert torch.equal(answer.dequantize(), problem().weight)  # eight values on eight levels


def test_more_iterations_have_another_and_no_worse_answer():
    few, many = (KmeansQuantizer(iterations=count).quantize(problem()).dequantize() for count in (1, 50))
    assert (many - problem().weight).norm() < (few - problem().weight).norm()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("weighting", ["hessian_diagonal", "fisher"])
def test_each_value_counts_by_its_weight(group_size, weighting):
    layer = problem(bits=2, group_size=group_size)
    size = group_size or 32
    weights = layer.require_fisher()
    if weighting == "hessian_diagonal":
        weights = layer.require_hessian().diagonal().sqrt().expand(8, -1)
    values = KmeansQuantizer(weighting=weighting, hessian_power=0.5).quantize(layer).codebook.values
    for group in range(32 // size):
        columns = slice(group * size, (group + 1) * size)
        expected = kmeans_levels(layer.weight[:, columns], 4, 50, weights[:, columns])
        torch.testing.assert_close(values[:, group], expected)


def test_weighting_lowers_the_error_that_it_weighs():
    layer = problem(bits=2)

    def error(weights, **options):
        return ((layer.weight - KmeansQuantizer(**options).quantize(layer).dequantize()).square() * weights).sum()

    diagonal, fisher = layer.require_hessian().diagonal(), layer.require_fisher()
    powers = [error(diagonal, weighting="hessian_diagonal", hessian_power=power) for power in (1.0, 0.5, 0.0)]
    assert powers[0] < powers[1] < powers[2]
    assert error(fisher, weighting="fisher") < error(fisher)


def test_fisher_is_missed_by_name():
    layer = problem()
    blind = replace(layer, statistics=replace(layer.statistics, fisher=None))
    with pytest.raises(ValueError, match=r"layer: .*Fisher"):
        KmeansQuantizer(weighting="fisher").quantize(blind)


def test_there_is_no_overflow_at_any_power():
    answer = KmeansQuantizer(weighting="hessian_diagonal", hessian_power=1e4).quantize(problem())
    assert torch.isfinite(answer.dequantize()).all()


def test_outliers_are_the_largest_weights_of_all_rows_and_exact():
    layer = problem(bits=2)
    layer.weight[2] *= 10
    answer = KmeansQuantizer(outlier_fraction=0.05).quantize(layer)
    count = round(0.05 * 8 * 32)
    largest = layer.weight.abs().flatten().topk(count).indices.sort().values
    assert torch.equal(answer.outliers.rows * 32 + answer.outliers.columns, largest)
    restored = answer.dequantize().flatten()[largest]
    torch.testing.assert_close(restored, layer.weight.flatten()[largest])


def test_sensitive_outliers_are_those_with_the_largest_fisher_information():
    layer = problem(bits=2)
    answer = KmeansQuantizer(weighting="fisher", sensitive_fraction=0.05).quantize(layer)
    sensitive = layer.require_fisher().flatten().topk(round(0.05 * 8 * 32)).indices.sort().values
    assert torch.equal(answer.outliers.rows * 32 + answer.outliers.columns, sensitive)


def test_outliers_attract_no_level():
    layer = problem(bits=2)
    layer.weight[:, 5] = 100.0
    answer = KmeansQuantizer(outlier_fraction=1 / 32).quantize(layer)
    assert answer.codebook.values.abs().max() < 10
    others = layer.weight[:, torch.arange(32) != 5]
    expected = kmeans_levels(others, 4, 50, torch.ones_like(others))
    torch.testing.assert_close(answer.codebook.values[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_nothing_but_outliers_has_no_error():
    answer = KmeansQuantizer(outlier_fraction=1.0).quantize(problem(bits=2))
    torch.testing.assert_close(answer.dequantize(), problem().weight)
