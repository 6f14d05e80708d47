"""The codebook step against least squares on the inputs themselves, in float64."""

import pytest
import torch

from quantlab.api import Lut, layer_loss
from quantlab.solvers.codebook import LevelGram, refit_codebook
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import nearest_codes


def start(layer, levels=8):
    table = kmeans_levels(layer.weight, levels, iterations=5)
    codes = nearest_codes(layer.weight, Lut(values=table[:, None]))
    return table, codes, layer.weight - table.gather(1, codes.long())


def one_hot(codes, levels):
    return torch.nn.functional.one_hot(codes.long(), levels).double()


def refit(layer, levels=8):
    return refit_codebook(*start(layer, levels), layer.hessian)


def loss(layer, weight_hat):
    return layer_loss(layer.weight, weight_hat, layer.hessian)


def test_loss_falls_in_every_row(make_layer):
    layer = make_layer()
    _, _, error = start(layer)
    assert (loss(layer, refit(layer).dequantize()) < loss(layer, layer.weight - error)).all()


def test_levels_solve_least_squares_on_the_inputs(make_layer):
    layer = make_layer(seed=1, out_features=6)
    _, codes, _ = start(layer)
    design = layer.inputs @ one_hot(codes, 8)  # (rows, tokens, levels)
    outputs = (layer.weight @ layer.inputs.T)[..., None]
    expected = torch.linalg.lstsq(design, outputs).solution[..., 0]
    torch.testing.assert_close(refit(layer).levels, expected.sort(dim=1).values, rtol=1e-7, atol=1e-8)


def test_gradient_of_every_level_is_zero(make_layer):
    layer = make_layer(seed=2)
    _, codes, error = start(layer)
    result = refit(layer)
    before = (error @ layer.hessian)[:, None] @ one_hot(codes, 8)
    after = ((layer.weight - result.dequantize()) @ layer.hessian)[:, None] @ one_hot(result.codes, 8)
    assert after.abs().max() < 1e-8 * before.abs().max()


def test_moving_any_level_raises_the_loss(make_layer):
    layer = make_layer(seed=3, out_features=6)
    result = refit(layer)
    best = loss(layer, result.dequantize())
    for level in range(8):
        for step in (-1e-2, 1e-2):
            moved = result.levels.clone()
            moved[:, level] += step
            assert (loss(layer, moved.gather(1, result.codes.long())) > best).all()


def test_a_second_refit_changes_nothing(make_layer):
    layer = make_layer(seed=4)
    result = refit(layer)
    again = refit_codebook(result.levels, result.codes, layer.weight - result.dequantize(), layer.hessian)
    torch.testing.assert_close(again.levels, result.levels, rtol=1e-8, atol=1e-9)
    assert torch.equal(again.codes, result.codes)


def test_uncorrelated_inputs_give_weighted_cluster_means(make_layer):
    layer = make_layer(seed=5)
    table, codes, error = start(layer)
    energy = layer.hessian.diagonal()
    members = one_hot(codes, 8)
    means = ((layer.weight * energy)[:, None] @ members)[:, 0] / (energy @ members)
    levels = refit_codebook(table, codes, error, energy.diag()).levels
    torch.testing.assert_close(levels, means, rtol=1e-8, atol=1e-9)


def test_the_right_table_is_left_alone(make_layer):
    layer = make_layer(seed=6)
    table, codes, _ = start(layer)
    result = refit_codebook(table, codes, torch.zeros_like(layer.weight), layer.hessian)
    assert torch.equal(result.levels, table)
    assert torch.equal(result.codes, codes)


def test_unused_levels_keep_their_value_and_do_no_harm(make_layer):
    layer = make_layer(seed=7)
    table, codes, error = start(layer)
    with_spare = torch.cat([table, torch.full((24, 1), 1e3, dtype=torch.float64)], dim=1)
    result = refit_codebook(with_spare, codes, error, layer.hessian)
    assert (result.levels[:, -1] == 1e3).all()
    torch.testing.assert_close(result.dequantize(), refit(layer).dequantize(), rtol=1e-8, atol=1e-9)


def test_levels_of_dead_inputs_keep_their_value(make_layer):
    layer = make_layer(seed=8)
    inputs = layer.inputs.clone()
    inputs[:, :2] = 0
    table, codes, error = start(layer)
    codes = codes.clone().clamp_(max=6)
    codes[:, :2] = 7  # only dead inputs use the last level
    error = layer.weight - table.gather(1, codes.long())
    result = refit_codebook(table, codes, error, inputs.T @ inputs)
    weight_hat = result.dequantize()
    assert torch.equal(weight_hat[:, :2], table[:, 7:].expand(-1, 2))


def test_gram_is_the_sum_of_the_hessian_over_pairs_of_codes(make_layer):
    layer = make_layer(seed=9, in_features=300)  # more than two panels
    _, codes, _ = start(layer)
    members = one_hot(codes, 8)
    expected = members.mT @ layer.hessian @ members
    torch.testing.assert_close(LevelGram(layer.hessian)(codes, 8), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("kernels")
def test_fewer_tokens_than_levels_leave_the_levels_finite_and_the_loss_lower(make_layer):
    for dtype in (torch.float32, torch.float64):
        layer = make_layer(seed=10, tokens=3)
        table, codes, error = start(layer, levels=16)
        operands = (table.to(dtype), codes, error.to(dtype), layer.hessian.to(dtype))
        result = refit_codebook(*operands)
        assert torch.isfinite(result.levels).all()
        assert result.levels.abs().max() < 100 * table.abs().max()
        assert (loss(layer, result.dequantize()) <= loss(layer, layer.weight - error)).all()


@pytest.mark.usefixtures("kernels")
def test_single_precision_has_the_loss_of_double_precision(make_layer):
    layer = make_layer(seed=11, in_features=96)
    table, codes, error = start(layer)
    single = refit_codebook(table.float(), codes, error.float(), layer.hessian.float())
    torch.testing.assert_close(
        loss(layer, single.dequantize()), loss(layer, refit(layer).dequantize()), rtol=1e-4, atol=0
    )


def test_rows_do_not_depend_on_their_neighbours(make_layer, monkeypatch):
    layer = make_layer(seed=12)
    whole = refit(layer)
    monkeypatch.setattr("quantlab.solvers.codebook._CHUNK_ELEMENTS", 5 * 8 * 48)
    by_chunks = refit(layer)
    torch.testing.assert_close(by_chunks.levels, whole.levels, rtol=1e-12, atol=0)
    assert torch.equal(by_chunks.codes, whole.codes)
