"""LNQ: both of its steps descend, so it ends where neither can."""

from itertools import product

import pytest
import torch

from quantlab.api import Lut, layer_loss
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import nearest_codes
from quantlab_kmeans import KmeansQuantizer
from quantlab_lnq import LnqQuantizer
from quantlab_rtn import RtnQuantizer

ORDERS = ["natural", "hessian_diagonal"]


def row_losses(quantizer, problem):
    weight_hat = quantizer.quantize(problem).dequantize()
    return layer_loss(problem.weight, weight_hat, problem.require_hessian())


def relative_loss(quantizer, problem):
    zero = torch.zeros_like(problem.weight)
    scale = layer_loss(problem.weight, zero, problem.require_hessian()).sum()
    return (row_losses(quantizer, problem).sum() / scale).item()


def naive_lnq(w, hessian, levels, order, iterations, cd_sweeps):
    """One row: least squares for the levels, then one code after the other by enumeration."""
    root = torch.linalg.cholesky(hessian)

    def refit(levels, codes):
        one_hot = torch.nn.functional.one_hot(codes, len(levels)).to(w)
        solution = torch.linalg.lstsq(root.T @ one_hot, (w @ root)[:, None], driver="gelsd").solution[:, 0]
        return torch.where(one_hot.sum(dim=0) > 0, solution, levels)

    codes = (w[:, None] - levels).abs().argmin(dim=1)
    levels = refit(levels, codes)
    for _ in range(iterations):
        for _, j in product(range(cd_sweeps), order.tolist()):
            error = (w - levels[codes]).repeat(len(levels), 1)
            error[:, j] = w[j] - levels
            codes[j] = ((error @ hessian) * error).sum(dim=1).argmin()
        levels = refit(levels, codes)
    return levels[codes]


@pytest.mark.parametrize("column_order", ORDERS)
def test_lnq_is_its_naive_form(make_layer, column_order):
    layer = make_layer(seed=1, out_features=5, in_features=20)
    start = kmeans_levels(layer.weight, 4, 50, layer.hessian.diagonal())
    order = torch.arange(20) if column_order == "natural" else layer.hessian.diagonal().argsort(descending=True)
    rows = [
        naive_lnq(w, layer.hessian, levels, order, iterations=2, cd_sweeps=3)
        for w, levels in zip(layer.weight, start, strict=True)
    ]
    answer = LnqQuantizer(iterations=2, cd_sweeps=3, column_order=column_order).quantize(layer.problem(bits=2))
    torch.testing.assert_close(answer.dequantize(), torch.stack(rows).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column_order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_iterations_never_raise_the_loss_of_any_row(make_layer, bits, column_order):
    problem = make_layer(seed=2).problem(bits)
    losses = [row_losses(LnqQuantizer(iterations=count, column_order=column_order), problem) for count in (1, 2, 3, 10)]
    losses = torch.stack(losses)
    assert (losses.diff(dim=0) <= 1e-6 * losses[0]).all()
    assert losses[-1].sum() < losses[0].sum()


def test_no_code_and_no_level_of_a_converged_answer_can_be_improved(make_layer):
    problem = make_layer(seed=3, out_features=6, in_features=20).problem(bits=2)
    answer = LnqQuantizer(iterations=50, cd_sweeps=10).quantize(problem)
    hessian, levels = problem.require_hessian(), answer.codebook.levels()[:, 0].double()
    error = problem.weight - answer.dequantize().double()
    loss = layer_loss(problem.weight, answer.dequantize(), hessian)
    for j, k in product(range(20), range(4)):
        changed = error.clone()
        changed[:, j] = problem.weight[:, j] - levels[:, k]
        assert (((changed @ hessian) * changed).sum(dim=1) >= loss * (1 - 1e-6)).all()
    for k in range(4):
        gradient = torch.where(answer.codes == k, error @ hessian, 0.0).sum(dim=1)
        scale = torch.where(answer.codes == k, (error @ hessian).abs(), 0.0).sum(dim=1)
        assert (gradient.abs() <= 1e-5 * scale + 1e-6).all()


def test_lnq_is_better_than_what_it_starts_from(make_layer):
    for bits in (2, 3, 4):
        problems = [make_layer(seed).problem(bits) for seed in range(4)]
        rounded, clustered, fitted = (
            sum(relative_loss(method, problem) for problem in problems)
            for method in (RtnQuantizer(), KmeansQuantizer(), LnqQuantizer())
        )
        assert fitted < 0.3 * min(rounded, clustered)


def test_uncorrelated_inputs_of_equal_strength_leave_k_means(make_layer):
    layer = make_layer(seed=4)
    layer = type(layer)(weight=layer.weight, inputs=torch.eye(48, dtype=torch.float64))
    levels = kmeans_levels(layer.weight, 8, 50, torch.ones(48, dtype=torch.float64))
    codes = nearest_codes(layer.weight, Lut(values=levels[:, None]))
    assert torch.equal(LnqQuantizer().quantize(layer.problem(bits=3)).codes, codes)


def test_codes_do_not_depend_on_scales(make_layer):
    layer = make_layer(seed=5)
    codes = LnqQuantizer().quantize(layer.problem(bits=3)).codes
    for changed in (
        type(layer)(weight=layer.weight, inputs=1e4 * layer.inputs),
        type(layer)(weight=1e4 * layer.weight, inputs=layer.inputs),
    ):
        assert torch.equal(LnqQuantizer().quantize(changed.problem(bits=3)).codes, codes)


def test_dead_inputs_are_nearest_to_their_weights_and_change_nothing_for_the_others(make_layer):
    layer = make_layer(seed=6)
    dead = torch.arange(48) % 6 == 0
    with_dead = type(layer)(weight=layer.weight, inputs=layer.inputs * ~dead).problem(bits=3)
    without = type(layer)(weight=layer.weight[:, ~dead], inputs=layer.inputs[:, ~dead]).problem(bits=3)
    answer = LnqQuantizer().quantize(with_dead)
    torch.testing.assert_close(row_losses(LnqQuantizer(), with_dead), row_losses(LnqQuantizer(), without))
    assert torch.equal(answer.codes[:, dead], nearest_codes(layer.weight, answer.codebook)[:, dead])


def test_rows_with_few_distinct_values_are_reproduced(make_layer):
    layer = make_layer(seed=7)
    coarse = type(layer)(weight=layer.weight.clamp(-1.4, 1.4).mul(2).round() / 2, inputs=layer.inputs)
    assert torch.equal(LnqQuantizer().quantize(coarse.problem(bits=3)).dequantize().double(), coarse.weight)


@pytest.mark.parametrize("tokens", [10, 40])
def test_rank_deficient_hessians_are_solved_better_than_by_rounding(make_layer, tokens):
    problem = make_layer(seed=8, tokens=tokens).problem(bits=2, dtype=torch.float32)
    assert relative_loss(LnqQuantizer(), problem) < relative_loss(RtnQuantizer(), problem)
