"""Block descent: its identity, its monotony, and what it finds where single codes are at their end."""

from itertools import product

import pytest
import torch

from quantlab.api import Lut, layer_loss
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.descent import descend
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder, nearest_codes
from quantlab.solvers.order import processing_order
from quantlab.solvers.sweep import Assignment, factor_for_sweep, sweep


def start_of(layer, levels):
    """Nearest codes, and their error and loss."""
    codes = nearest_codes(layer.weight, Lut(values=levels[:, None]))
    error = layer.weight - levels.gather(1, codes.long())
    return Assignment(codes=codes, error=error, loss=layer_loss(error, torch.zeros_like(error), layer.hessian))


def improve(layer, start, levels, passes=1, seed=0, block_size=16):
    order = processing_order(layer.hessian, "hessian_diagonal", backwards=False)
    generator = torch.Generator().manual_seed(seed)
    return descend_in_blocks(
        layer.weight, start, levels, layer.hessian, order, passes=passes, generator=generator, block_size=block_size
    )


def row_losses(layer, assignment):
    return layer_loss(assignment.error, torch.zeros_like(assignment.error), layer.hessian)


@pytest.mark.parametrize("block_size", [5, 16, 48])
def test_no_pass_raises_the_loss_of_any_row_and_the_reported_loss_is_true(make_layer, block_size):
    layer = make_layer(seed=1)
    levels = kmeans_levels(layer.weight, 8, 50)
    assignment = start_of(layer, levels)
    for seed in range(4):
        improved = improve(layer, assignment, levels, seed=seed, block_size=block_size)
        losses = row_losses(layer, improved)
        assert (losses <= row_losses(layer, assignment) * (1 + 1e-12)).all()
        torch.testing.assert_close(improved.loss, losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(improved.error, layer.weight - levels.gather(1, improved.codes.long()))
        assignment = improved


def test_one_block_of_all_inputs_is_the_sweep_where_that_is_better(make_layer):
    layer = make_layer(seed=2)
    levels = kmeans_levels(layer.weight, 8, 50)
    start = start_of(layer, levels)
    order = processing_order(layer.hessian, "hessian_diagonal", backwards=False)
    factor = factor_for_sweep(layer.hessian, order, 1e-4, torch.float64)
    swept = sweep(layer.weight, factor, LutRounder(Lut(values=levels[:, None]), 48))
    better = (row_losses(layer, swept) < row_losses(layer, start))[:, None]
    improved = improve(layer, start, levels, block_size=48)
    assert better.any()
    assert torch.equal(improved.codes, torch.where(better, swept.codes, start.codes))


def test_others_are_accounted_for_as_if_they_were_part_of_the_weight(make_layer):
    # A block of one input: the nearest level to the minimum of the loss, as in coordinate descent.
    layer = make_layer(seed=3, in_features=8)
    levels = kmeans_levels(layer.weight, 4, 50)
    start = start_of(layer, levels)
    improved = improve(layer, start, levels, block_size=1)
    order = processing_order(layer.hessian, "hessian_diagonal", backwards=False)
    visited = order[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    nearest = LutRounder(Lut(values=levels[:, None]), 8)
    assert torch.equal(improved.codes, descend(layer.weight, start, layer.hessian, visited, nearest, sweeps=1).codes)


def test_blocks_improve_on_codes_that_no_single_change_improves(make_layer):
    before = after = 0.0
    for seed in range(3):
        layer = make_layer(seed, in_features=96)
        levels = kmeans_levels(layer.weight, 8, 50)
        nearest = LutRounder(Lut(values=levels[:, None]), 96)
        stuck = descend(layer.weight, start_of(layer, levels), layer.hessian, torch.arange(96), nearest, sweeps=100)
        before += row_losses(layer, stuck).sum().item()
        after += row_losses(layer, improve(layer, stuck, levels, passes=8, block_size=32)).sum().item()
    assert after < 0.9 * before


def test_no_answer_is_below_the_optimum_and_most_reach_it(make_layer):
    reached = 0
    for seed in range(10):
        layer = make_layer(seed, out_features=1, in_features=6, tokens=40)
        levels = kmeans_levels(layer.weight, 3, 50)
        choices = torch.tensor(list(product(range(3), repeat=6)))
        errors = layer.weight - levels[0][choices]
        optimum = layer_loss(errors, torch.zeros_like(errors), layer.hessian).min()
        found = row_losses(layer, improve(layer, start_of(layer, levels), levels, passes=20, block_size=3))[0]
        assert found >= optimum * (1 - 1e-9)
        reached += bool(found <= optimum * (1 + 1e-9))
    assert reached >= 7


def test_dead_inputs_keep_their_codes_and_change_nothing_for_the_others(make_layer):
    layer = make_layer(seed=4)
    dead = torch.arange(48) % 6 == 0
    silent = type(layer)(weight=layer.weight, inputs=layer.inputs * ~dead)
    without = type(layer)(weight=layer.weight[:, ~dead], inputs=layer.inputs[:, ~dead])
    levels = kmeans_levels(layer.weight, 8, 50)
    start = start_of(silent, levels)
    improved = improve(silent, start, levels)
    assert torch.equal(improved.codes[:, dead], start.codes[:, dead])
    assert torch.equal(improved.codes[:, ~dead], improve(without, start_of(without, levels), levels).codes)


def test_rows_are_independent_and_operands_are_left_alone(make_layer):
    layer = make_layer(seed=5)
    levels = kmeans_levels(layer.weight, 8, 50)
    start = start_of(layer, levels)
    codes, error = start.codes.clone(), start.error.clone()
    whole = improve(layer, start, levels, passes=2)
    part = type(layer)(weight=layer.weight[3:9], inputs=layer.inputs)
    assert torch.equal(improve(part, start_of(part, levels[3:9]), levels[3:9], passes=2).codes, whole.codes[3:9])
    assert torch.equal(start.codes, codes)
    assert torch.equal(start.error, error)


def test_a_layer_without_input_is_left_alone(make_layer):
    layer = make_layer(seed=6)
    silent = type(layer)(weight=layer.weight, inputs=torch.zeros_like(layer.inputs))
    levels = kmeans_levels(layer.weight, 8, 50)
    start = start_of(silent, levels)
    assert torch.equal(improve(silent, start, levels).codes, start.codes)


def test_single_precision_has_the_loss_of_double_precision(make_layer):
    layer = make_layer(seed=7, in_features=96)
    levels = kmeans_levels(layer.weight, 8, 50)
    double = row_losses(layer, improve(layer, start_of(layer, levels), levels, passes=3)).sum()
    start = start_of(layer, levels)
    single = descend_in_blocks(
        layer.weight.float(),
        Assignment(codes=start.codes, error=start.error.float()),
        levels.float(),
        layer.hessian.float(),
        processing_order(layer.hessian, "hessian_diagonal", backwards=False),
        passes=3,
        generator=torch.Generator().manual_seed(0),
        block_size=16,
    )
    error = layer.weight - levels.gather(1, single.codes.long())
    loss = layer_loss(error, torch.zeros_like(error), layer.hessian).sum()
    assert loss.item() == pytest.approx(double.item(), rel=1e-2)
