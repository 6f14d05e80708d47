"""The triangular sweep against slow, independent forms of the same mathematics, in float64."""

import pytest
import torch

from quantlab.api import CodebookSpec, Lut, layer_loss
from quantlab.solvers.grid import minmax_grid, round_to_nearest
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import GridRounder, LutRounder, nearest_codes
from quantlab.solvers.order import processing_order
from quantlab.solvers.sweep import factor_for_sweep, sweep

DAMPING = 0.01


def damped(hessian, damping=DAMPING):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def table(weight, levels=8):
    return kmeans_levels(weight, levels, iterations=20)


def select(table_of_row, targets):
    return (targets[:, None] - table_of_row).abs().argmin(dim=1)


def back_to_front(layer):
    return processing_order(layer.hessian, "natural", backwards=True)


def run_sweep(layer, levels, order=None, block_size=128, weight=None):
    weight = layer.weight if weight is None else weight
    order = back_to_front(layer) if order is None else order
    factor = factor_for_sweep(layer.hessian, order, DAMPING, torch.float64)
    return sweep(weight, factor, LutRounder(Lut(values=levels[:, None]), weight.shape[1]), block_size=block_size)


def naive_assignment(weight, hessian, levels):
    """Back substitution column by column (arXiv:2501.12956, Eq. 20), with the targets it met."""
    lower = torch.linalg.cholesky(damped(hessian))
    error, targets = torch.zeros_like(weight), torch.zeros_like(weight)
    codes = torch.zeros(weight.shape, dtype=torch.long)
    for j in reversed(range(weight.shape[1])):
        residual = sum((error[:, u] * lower[u, j] for u in range(j + 1, weight.shape[1])), torch.zeros(()))
        targets[:, j] = weight[:, j] + residual / lower[j, j]
        codes[:, j] = select(levels, targets[:, j])
        error[:, j] = weight[:, j] - levels.gather(1, codes[:, j : j + 1])[:, 0]
    return codes, error, targets


def printed_assignment(weight, hessian, levels):
    """The algorithm as misprinted in a version of the paper: the residual is formed with the column before its own."""
    lower = torch.linalg.cholesky(damped(hessian))
    error = torch.zeros_like(weight)
    residual = torch.zeros(len(weight), dtype=weight.dtype)
    for j in reversed(range(weight.shape[1])):
        codes = select(levels, weight[:, j] + residual / lower[j, j])
        error[:, j] = weight[:, j] - levels.gather(1, codes[:, None])[:, 0]
        residual = error[:, j:] @ lower[j:, j]
    return error


def textbook_gptq(weight, hessian, choose):
    """Algorithm 1 of arXiv:2210.17323: inverse Cholesky factor, first column to last, weights updated in place."""
    weight = weight.clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    codes = torch.zeros(weight.shape, dtype=torch.long)
    loss = torch.zeros(len(weight), dtype=weight.dtype)
    for j in range(weight.shape[1]):
        codes[:, j], value = choose(j, weight[:, j])
        error = (weight[:, j] - value) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        loss += error**2
    return codes, loss


def choose_from(levels):
    def choose(column, targets):
        codes = select(levels, targets)
        return codes, levels.gather(1, codes[:, None])[:, 0]

    return choose


def test_loss_is_the_same_from_inputs_from_the_hessian_and_from_the_targets(make_layer):
    layer = make_layer()
    codes, error, targets = naive_assignment(layer.weight, layer.hessian, table(layer.weight))
    weight_hat = table(layer.weight).gather(1, codes)

    from_inputs = (layer.inputs @ error.T).square().mean(dim=0)
    torch.testing.assert_close(layer_loss(layer.weight, weight_hat, layer.hessian), from_inputs, rtol=1e-12, atol=0)

    pivots = torch.linalg.cholesky(damped(layer.hessian)).diagonal() ** 2
    from_targets = (targets - weight_hat).square() @ pivots
    damped_loss = layer_loss(layer.weight, weight_hat, damped(layer.hessian))
    torch.testing.assert_close(from_targets, damped_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("block_size", [1, 7, 32, 48, 128])
def test_blocked_sweep_is_the_naive_recursion(make_layer, block_size):
    layer = make_layer()
    levels = table(layer.weight)
    codes, error, _ = naive_assignment(layer.weight, layer.hessian, levels)
    result = run_sweep(layer, levels, block_size=block_size)
    assert torch.equal(result.codes.long(), codes)
    torch.testing.assert_close(result.error, error, rtol=0, atol=1e-12)


def test_every_level_is_the_nearest_to_its_target(make_layer):
    layer = make_layer(seed=3)
    levels = table(layer.weight)
    order = processing_order(layer.hessian, "hessian_diagonal", backwards=True)
    result = run_sweep(layer, levels, order)
    columns = order.flip(0)
    lower = torch.linalg.cholesky(damped(layer.hessian[columns][:, columns]))
    feedback = (lower / lower.diagonal()).tril(-1)
    targets = layer.weight[:, columns] + result.error[:, columns] @ feedback
    distance = (targets[..., None] - levels[:, None]).abs()
    chosen = distance.gather(2, result.codes[:, columns].long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(dim=2), rtol=0, atol=1e-12)


def test_sweep_is_gptq_on_reversed_inputs_with_a_look_up_table(make_layer):
    layer = make_layer(seed=1)
    levels = table(layer.weight)
    codes, _ = textbook_gptq(layer.weight.flip(1), layer.hessian.flip(0, 1), choose_from(levels))
    assert torch.equal(run_sweep(layer, levels).codes.long(), codes.flip(1))


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("column_order", ["natural", "hessian_diagonal"])
def test_sweep_is_textbook_gptq_on_a_uniform_grid(make_layer, column_order, group_size):
    layer = make_layer(seed=2)
    grid = minmax_grid(layer.weight, CodebookSpec(bits=3, group_size=group_size))
    order = processing_order(layer.hessian, column_order, backwards=False)

    def choose(position, targets):
        group = order[position] // (group_size or layer.weight.shape[1])
        codes = (targets / grid.scale[:, group] + grid.zero[:, group]).round().clamp(0, 7)
        return codes.long(), (codes - grid.zero[:, group]) * grid.scale[:, group]

    permuted, loss = textbook_gptq(layer.weight[:, order], layer.hessian[order][:, order], choose)
    codes = torch.empty_like(permuted)
    codes[:, order] = permuted
    factor = factor_for_sweep(layer.hessian, order, DAMPING, torch.float64)
    result = sweep(layer.weight, factor, GridRounder(grid, layer.weight.shape[1]))
    assert torch.equal(result.codes.long(), codes)
    # What GPTQ reports while it runs is the damped loss of its answer.
    weight_hat = layer.weight - result.error
    torch.testing.assert_close(layer_loss(layer.weight, weight_hat, damped(layer.hessian)), loss, rtol=1e-10, atol=0)


def test_permuted_problem_has_the_permuted_answer(make_layer):
    layer = make_layer(seed=4)
    levels = table(layer.weight)
    order = processing_order(layer.hessian, "hessian_diagonal", backwards=True)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = type(layer)(weight=layer.weight[:, shuffle], inputs=layer.inputs[:, shuffle])
    order_there = processing_order(shuffled.hessian, "hessian_diagonal", backwards=True)
    assert torch.equal(shuffle[order_there], order)
    assert torch.equal(
        run_sweep(shuffled, levels, order_there).codes, run_sweep(layer, levels, order).codes[:, shuffle]
    )


def test_uncorrelated_inputs_give_nearest_rounding(make_layer):
    layer = make_layer()
    levels = table(layer.weight)
    factor = factor_for_sweep(layer.hessian.diagonal().diag(), back_to_front(layer), DAMPING, torch.float64)
    lut = Lut(values=levels[:, None])
    assert torch.equal(sweep(layer.weight, factor, LutRounder(lut, 48)).codes, nearest_codes(layer.weight, lut))


def test_codes_do_not_depend_on_the_scale_of_hessian_or_weight_nor_on_a_shift(make_layer):
    layer = make_layer(seed=5)
    levels = table(layer.weight)
    codes = run_sweep(layer, levels).codes
    louder = type(layer)(weight=layer.weight, inputs=1e3 * layer.inputs)
    assert torch.equal(run_sweep(louder, levels).codes, codes)
    assert torch.equal(run_sweep(layer, 1e-3 * levels, weight=1e-3 * layer.weight).codes, codes)
    assert torch.equal(run_sweep(layer, levels + 0.25, weight=layer.weight + 0.25).codes, codes)


def test_rows_are_independent(make_layer):
    layer = make_layer(seed=6)
    levels = table(layer.weight)
    codes = run_sweep(layer, levels).codes
    rows = torch.tensor([5, 3, 17])
    assert torch.equal(run_sweep(layer, levels[rows], weight=layer.weight[rows]).codes, codes[rows])


def test_weights_on_their_table_are_reproduced(make_layer):
    layer = make_layer(seed=7)
    levels = table(layer.weight)
    codes = torch.randint(0, 8, layer.weight.shape, generator=torch.Generator().manual_seed(0))
    result = run_sweep(layer, levels, weight=levels.gather(1, codes))
    assert torch.equal(result.codes.long(), codes)
    assert (result.error == 0).all()


def test_a_single_input_is_solved_exactly(make_layer):
    layer = make_layer(in_features=1, tokens=5)
    levels = torch.linspace(-1, 1, 4, dtype=torch.float64).repeat(24, 1)
    assert torch.equal(run_sweep(layer, levels).codes.long()[:, 0], select(levels, layer.weight[:, 0]))


def test_loss_on_an_unbounded_grid_has_its_bound(make_layer):
    layer = make_layer(seed=8)
    step = 0.25
    levels = torch.arange(-4096, 4096, dtype=torch.float64) * step  # wide enough that no target is clipped
    lower = torch.linalg.cholesky(damped(layer.hessian))
    factor = factor_for_sweep(layer.hessian, back_to_front(layer), DAMPING, torch.float64)

    def nearest(column, targets):
        rounded = (targets / step).round() * step
        assert (rounded.abs() < levels.max()).all()
        return torch.zeros_like(rounded), rounded

    error = sweep(layer.weight, factor, nearest).error
    loss = layer_loss(error, torch.zeros_like(error), damped(layer.hessian))
    assert (loss <= step**2 / 4 * lower.diagonal().square().sum()).all()


@pytest.mark.parametrize("seed", range(5))
def test_printed_algorithm_is_worse_than_rounding_and_the_sweep_is_better(make_layer, seed):
    layer = make_layer(seed)
    levels = table(layer.weight)

    def loss(error):
        return layer_loss(error, torch.zeros_like(error), layer.hessian).sum()

    rounded = loss(layer.weight - round_to_nearest(layer.weight, CodebookSpec(bits=3)).dequantize())
    assert loss(printed_assignment(layer.weight, layer.hessian, levels)) > rounded
    assert loss(run_sweep(layer, levels).error) < rounded / 2


def test_strong_inputs_first_is_better_on_average(make_layer):
    natural = strong_first = 0.0
    for seed in range(5):
        layer = make_layer(seed)
        levels = table(layer.weight)
        for_layer = processing_order(layer.hessian, "hessian_diagonal", backwards=True)
        zero = torch.zeros_like(layer.weight)
        natural += layer_loss(run_sweep(layer, levels).error, zero, layer.hessian).sum()
        strong_first += layer_loss(run_sweep(layer, levels, for_layer).error, zero, layer.hessian).sum()
    assert strong_first < natural


@pytest.mark.usefixtures("kernels")
def test_single_precision_has_the_loss_of_double_precision(make_layer):
    layer = make_layer(seed=9, in_features=96)
    levels = table(layer.weight)
    factor = factor_for_sweep(layer.hessian.float(), back_to_front(layer), DAMPING, torch.float32)
    single = sweep(layer.weight.float(), factor, LutRounder(Lut(values=levels[:, None].float()), 96))
    double = run_sweep(layer, levels)
    zero = torch.zeros_like(layer.weight)
    torch.testing.assert_close(
        layer_loss(single.error, zero, layer.hessian).sum(),
        layer_loss(double.error, zero, layer.hessian).sum(),
        rtol=1e-4,
        atol=0,
    )


def test_fewer_tokens_than_inputs_are_better_than_rounding(make_layer):
    layer = make_layer(seed=10, tokens=20)
    error = run_sweep(layer, table(layer.weight)).error
    weight_hat = round_to_nearest(layer.weight, CodebookSpec(bits=3)).dequantize()
    assert torch.isfinite(error).all()
    zero = torch.zeros_like(error)
    assert layer_loss(error, zero, layer.hessian).sum() < layer_loss(layer.weight, weight_hat, layer.hessian).sum()
