"""Joint descent: where it ends, what it finds beyond the alternation of descent and codebook step, what it leaves."""

import pytest
import torch

from quantlab.api import Lut, layer_loss
from quantlab.solvers.codebook import CodebookFit, Codebooks, refit_codebook
from quantlab.solvers.descent import descend
from quantlab.solvers.joint import descend_jointly
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder, nearest_codes
from quantlab.solvers.sweep import Assignment


def start_of(layer, levels):
    """k-means and its best tables."""
    table = kmeans_levels(layer.weight, levels, 50)
    codes = nearest_codes(layer.weight, Lut(values=table[:, None]))
    return refit_codebook(table, codes, layer.weight - table.gather(1, codes.long()), layer.hessian)


def row_losses(layer, fitted):
    return layer_loss(layer.weight, fitted.dequantize(), layer.hessian)


def improve(layer, start, passes=1):
    order, fit = torch.arange(layer.weight.shape[1]), CodebookFit(layer.weight, layer.hessian)
    return descend_jointly(layer.weight, start, row_losses(layer, start), layer.hessian, order, fit, passes=passes)


def best_loss(weight, hessian, codes, levels):
    """Of any table with these codes, by least squares: weight and codes are one row."""
    root = torch.linalg.cholesky(hessian)
    design = root.T @ torch.nn.functional.one_hot(codes, levels).double()
    target = (weight @ root)[:, None]
    return (target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution).square().sum()


@pytest.mark.parametrize("levels", [3, 16])
def test_the_loss_of_no_row_rises_and_the_reported_loss_is_true(make_layer, levels):
    layer = make_layer(seed=1)
    fitted = start_of(layer, levels)
    for _ in range(3):
        improved, loss = improve(layer, fitted)
        torch.testing.assert_close(loss, row_losses(layer, improved), rtol=1e-9, atol=0)
        assert (loss <= row_losses(layer, fitted) * (1 + 1e-9)).all()
        assert (improved.levels.diff(dim=1) >= 0).all()
        fitted = improved


def test_in_the_end_no_single_change_pays_even_with_the_best_table(make_layer):
    layer, levels = make_layer(seed=2, out_features=4, in_features=20), 3
    fitted, losses = improve(layer, start_of(layer, levels), passes=100)
    for weight, row, loss in zip(layer.weight, fitted.codes.long(), losses, strict=True):
        for column in range(len(row)):
            if (row == row[column]).sum() == 1:
                continue
            for level in range(levels):
                changed = row.clone()
                changed[column] = level
                assert best_loss(weight, layer.hessian, changed, levels) >= loss * (1 - 2e-6)


def test_it_goes_on_where_descent_and_codebook_step_end(make_layer):
    before = after = 0.0
    for seed in range(3):
        layer, levels = make_layer(seed), 8
        fitted = start_of(layer, levels)
        for _ in range(50):
            start = Assignment(codes=fitted.codes, error=layer.weight - fitted.dequantize())
            nearest = LutRounder(Lut(values=fitted.levels[:, None]), 48)
            found = descend(layer.weight, start, layer.hessian, torch.arange(48), nearest, sweeps=20)
            fitted = refit_codebook(fitted.levels, found.codes, found.error, layer.hessian)
        before += row_losses(layer, fitted).sum().item()
        after += improve(layer, fitted, passes=20)[1].sum().item()
    assert after < 0.9 * before


def test_dead_inputs_keep_their_codes_and_change_nothing_for_the_others(make_layer):
    layer = make_layer(seed=4)
    dead = torch.arange(48) % 6 == 0
    silent = type(layer)(weight=layer.weight, inputs=layer.inputs * ~dead)
    without = type(layer)(weight=layer.weight[:, ~dead], inputs=layer.inputs[:, ~dead])
    start = start_of(without, 8)
    codes = torch.zeros(24, 48, dtype=torch.uint8)
    codes[:, ~dead] = start.codes
    improved, _ = improve(silent, Codebooks(levels=start.levels, codes=codes))
    expected, _ = improve(without, start)
    torch.testing.assert_close(improved.dequantize()[:, ~dead], expected.dequantize(), rtol=1e-9, atol=1e-9)
