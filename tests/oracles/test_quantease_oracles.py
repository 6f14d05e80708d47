"""QuantEase against the published bookkeeping, and its outliers against what their mathematics promises."""

import pytest
import torch

from quantlab.api import CodebookSpec, layer_loss
from quantlab.solvers.grid import minmax_grid
from quantlab.solvers.nearest import GridRounder
from quantlab.solvers.sweep import factor_for_sweep, sweep
from quantlab_gptq import GptqQuantizer
from quantlab_quantease import QuanteaseQuantizer
from quantlab_quantease.outliers import OutlierSupport, largest_eigenvalue_bound, thresholding_step
from quantlab_quantease.state import DescentState
from quantlab_rtn import RtnQuantizer

KINDS = ["unstructured", "structured"]


def row_losses(quantizer, problem):
    weight_hat = quantizer.quantize(problem).dequantize()
    return layer_loss(problem.weight, weight_hat, problem.require_hessian())


def relative_loss(quantizer, problem):
    zero = torch.zeros_like(problem.weight)
    scale = layer_loss(problem.weight, zero, problem.require_hessian()).sum()
    return (row_losses(quantizer, problem).sum() / scale).item()


def published_quantease(weight, hessian, grid, group_size, iterations, relaxed, sparse=0.0, update=None):
    """Algorithms 1 and 2 of arXiv:2309.01885 on weights instead of errors: codes, and outliers, of the last pass."""
    weight_hat = weight - sparse
    codes = torch.zeros_like(weight)
    for iteration in range(iterations):
        for j in range(weight.shape[1]):
            others = weight_hat @ hessian[:, j] - weight_hat[:, j] * hessian[j, j]
            target = ((weight - sparse) @ hessian[:, j] - others) / hessian[j, j]
            scale, zero = grid.scale[:, j // group_size], grid.zero[:, j // group_size]
            codes[:, j] = (target / scale + zero).round().clamp(0, 2**grid.bits - 1)
            weight_hat[:, j] = target if iteration in relaxed else (codes[:, j] - zero) * scale
        sparse = update(sparse, 2 * (weight_hat + sparse - weight) @ hessian) if update else sparse
    return codes.to(torch.uint8), sparse


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize(
    ("iterations", "relaxed"),
    [(1, []), (2, []), (3, [1]), (5, [1]), (6, [1, 4]), (30, range(1, 26, 3)), (31, range(1, 26, 3))],
)
def test_quantease_is_the_published_algorithm(make_layer, iterations, relaxed, group_size):
    layer = make_layer(seed=1, out_features=8, in_features=24)
    grid = minmax_grid(layer.weight, CodebookSpec(bits=3, group_size=group_size))
    expected, _ = published_quantease(layer.weight, layer.hessian, grid, group_size or 24, iterations, relaxed)
    answer = QuanteaseQuantizer(iterations=iterations).quantize(layer.problem(bits=3, group_size=group_size))
    assert torch.equal(answer.codes, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_quantease_with_outliers_is_the_published_algorithm(make_layer, kind):
    layer = make_layer(seed=1, out_features=8, in_features=24)
    support = OutlierSupport(kind, 0.1)
    step = 1 / (2 * largest_eigenvalue_bound(layer.hessian))

    def update(sparse, gradient):
        return support.keep_largest(sparse - step * gradient)

    start = support.keep_largest(layer.weight)
    grid = minmax_grid(support.without(layer.weight, None), CodebookSpec(bits=3))
    codes, sparse = published_quantease(layer.weight, layer.hessian, grid, 24, 6, [1, 4], start, update)
    quantizer = QuanteaseQuantizer(iterations=6, outliers=kind, outlier_fraction=0.1)
    answer = quantizer.quantize(layer.problem(bits=3))
    assert torch.equal(answer.codes, codes)
    dense = sparse.new_zeros(sparse.shape)
    dense[answer.outliers.rows, answer.outliers.columns] = answer.outliers.values.double()
    torch.testing.assert_close(dense, sparse, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_from_gptq_with_outliers_rounds_what_they_leave_and_descends(make_layer, kind):
    layer = make_layer(seed=2)
    support, order = OutlierSupport(kind, 0.1), torch.arange(48)
    grid = minmax_grid(support.without(layer.weight, None), CodebookSpec(bits=3))
    state = DescentState(layer.weight, layer.hessian, order, grid, support)
    factor = factor_for_sweep(layer.hessian, order, 0.01, torch.float64)
    state.start_from_gptq(factor)
    left = layer.weight - support.keep_largest(layer.weight)
    expected = sweep(left, factor, GridRounder(grid, 48))
    assert torch.equal(state.codes, expected.codes)

    losses = []
    for iterations in (1, 2, 3, 8):
        quantizer = QuanteaseQuantizer(start="gptq", iterations=iterations, outliers=kind, outlier_fraction=0.1)
        losses.append(row_losses(quantizer, layer.problem(bits=3)).sum())
    losses = torch.stack([layer_loss(expected.error, torch.zeros_like(left), layer.hessian).sum(), *losses])
    assert (losses.diff() <= 1e-6 * losses[0]).all()


def test_relaxed_passes_help_on_average(make_layer):
    with_relaxation = without = 0.0
    for seed in range(4):
        layer = make_layer(seed, in_features=32)
        grid = minmax_grid(layer.weight, CodebookSpec(bits=3))
        codes, _ = published_quantease(layer.weight, layer.hessian, grid, 32, 30, relaxed=[])
        weight_hat = (codes - grid.zero) * grid.scale
        zero = torch.zeros_like(layer.weight)
        scale = layer_loss(layer.weight, zero, layer.hessian).sum()
        without += (layer_loss(layer.weight, weight_hat, layer.hessian).sum() / scale).item()
        with_relaxation += relative_loss(QuanteaseQuantizer(), layer.problem(bits=3))
    assert with_relaxation < 0.97 * without


def test_quantease_is_far_better_than_rounding(make_layer):
    for bits in (2, 3, 4):
        problems = [make_layer(seed).problem(bits) for seed in range(2)]
        rounded, descended = (
            sum(relative_loss(method, problem) for problem in problems)
            for method in (RtnQuantizer(), QuanteaseQuantizer())
        )
        assert descended < 0.5 * rounded


@pytest.mark.parametrize("column_order", ["natural", "hessian_diagonal"])
@pytest.mark.parametrize("group_size", [None, 16])
def test_a_start_from_gptq_only_descends(make_layer, column_order, group_size):
    problem = make_layer(seed=2).problem(bits=3, group_size=group_size)
    losses = [row_losses(GptqQuantizer(column_order=column_order), problem)]
    for iterations in (1, 2, 3, 5, 30):
        quantizer = QuanteaseQuantizer(start="gptq", iterations=iterations, column_order=column_order)
        losses.append(row_losses(quantizer, problem))
    losses = torch.stack(losses)
    assert (losses.diff(dim=0) <= 1e-6 * losses[0]).all()
    assert losses[2].sum() < 0.99 * losses[0].sum()


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_start_from_rounding_begins_there_and_descends(make_layer, group_size):
    layer = make_layer(seed=2)
    spec, order = CodebookSpec(bits=3, group_size=group_size), torch.arange(48)
    problem = layer.problem(bits=3, group_size=group_size)
    state = DescentState(
        layer.weight, layer.hessian, order, minmax_grid(layer.weight, spec), OutlierSupport("none", 0.0)
    )
    state.start_from_rtn()
    rounded = RtnQuantizer().quantize(problem)
    assert torch.equal(state.codes, rounded.codes)
    losses = [row_losses(RtnQuantizer(), problem)]
    losses += [row_losses(QuanteaseQuantizer(start="rtn", iterations=count), problem) for count in (1, 2, 5)]
    losses = torch.stack(losses)
    assert (losses.diff(dim=0) <= 1e-6 * losses[0]).all()
    assert losses[-1].sum() < 0.7 * losses[0].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_no_outliers_are_the_dense_answer(make_layer, kind):
    problem = make_layer(seed=3).problem(bits=3)
    answer = QuanteaseQuantizer(outliers=kind, outlier_fraction=0.0).quantize(problem)
    assert answer.outliers is None
    assert torch.equal(answer.codes, QuanteaseQuantizer().quantize(problem).codes)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_outliers_has_no_loss(make_layer, kind):
    problem = make_layer(seed=4).problem(bits=2)
    assert relative_loss(QuanteaseQuantizer(outliers=kind, outlier_fraction=1.0), problem) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_more_outliers_have_less_loss(make_layer, kind):
    problems = [make_layer(seed, in_features=32).problem(bits=3) for seed in range(2)]
    quantizers = [
        QuanteaseQuantizer(iterations=8, outliers=kind, outlier_fraction=share) for share in (0.0, 0.05, 0.1, 0.2, 0.5)
    ]
    losses = [sum(relative_loss(quantizer, each) for each in problems) for quantizer in quantizers]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("group_size", [None, 48])
def test_outliers_take_wide_weights_off_the_grid(make_layer, group_size):
    layer = make_layer(seed=5, out_features=24, in_features=96)
    wide = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    layer = type(layer)(weight=torch.where(wide, 8 * layer.weight, layer.weight), inputs=layer.inputs)
    problem = layer.problem(bits=3, group_size=group_size)
    dense = relative_loss(QuanteaseQuantizer(), problem)
    assert relative_loss(QuanteaseQuantizer(outliers="unstructured", outlier_fraction=0.03), problem) < 0.4 * dense


def test_structured_outliers_take_wide_columns_off_the_grid(make_layer):
    layer = make_layer(seed=6)
    layer.weight[:, [3, 17]] *= 8
    problem = layer.problem(bits=3)
    quantizer = QuanteaseQuantizer(outliers="structured", outlier_fraction=2 / 48)
    assert set(quantizer.quantize(problem).outliers.columns.tolist()) == {3, 17}
    assert relative_loss(quantizer, problem) < 0.2 * relative_loss(QuanteaseQuantizer(), problem)


@pytest.mark.parametrize("kind", KINDS)
def test_no_thresholding_step_raises_the_loss(make_layer, kind):
    layer = make_layer(seed=7)
    support = OutlierSupport(kind, 0.1)
    sparse = support.keep_largest(torch.ones_like(layer.weight))  # a poor one
    residual = layer.weight - 0.3 * layer.weight.round()
    bound = largest_eigenvalue_bound(layer.hessian)
    losses = []
    for _ in range(40):
        losses.append(layer_loss(residual, sparse, layer.hessian).sum())
        sparse = thresholding_step(sparse, residual - sparse, layer.hessian, bound, support)
    losses = torch.stack(losses)
    assert (losses.diff() <= 1e-13 * losses[0]).all()
    assert losses[-1] < 0.9 * losses[0]


def test_thresholding_steps_on_everything_lead_to_the_residual(make_layer):
    layer = make_layer(seed=8, in_features=12, tokens=600)
    hessian = layer.hessian + layer.hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    support, bound = OutlierSupport("unstructured", 1.0), largest_eigenvalue_bound(hessian)
    sparse = torch.zeros_like(layer.weight)
    for _ in range(200):
        sparse = thresholding_step(sparse, layer.weight - sparse, hessian, bound, support)
    torch.testing.assert_close(sparse, layer.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [10, 200])
def test_eigenvalue_bound_is_above_the_largest_eigenvalue_and_near(make_layer, tokens):
    hessian = make_layer(seed=9, in_features=64, tokens=tokens).hessian
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    for scale in (1e-12, 1.0, 1e12):
        ratio = largest_eigenvalue_bound(scale * hessian) / (scale * largest)
        assert 1 - 1e-12 < ratio < 1.02
    identity = torch.eye(64, dtype=torch.float64)
    assert largest_eigenvalue_bound(identity) == pytest.approx(64 ** (1 / 64))
    assert largest_eigenvalue_bound(0 * identity) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_outliers_do_no_harm_to_layers_without_input(make_layer, kind):
    layer = make_layer(seed=10)
    silent = type(layer)(weight=layer.weight, inputs=torch.zeros_like(layer.inputs))
    answer = QuanteaseQuantizer(outliers=kind).quantize(silent.problem(bits=3))
    assert torch.isfinite(answer.dequantize()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dead_inputs_stay_near_their_weights(make_layer, kind):
    layer = make_layer(seed=11)
    dead = torch.arange(48) % 6 == 0
    layer = type(layer)(weight=layer.weight, inputs=layer.inputs * ~dead)
    answer = QuanteaseQuantizer(outliers=kind, outlier_fraction=0.05).quantize(layer.problem(bits=4))
    weight_hat, levels = answer.dequantize()[:, dead], answer.codebook.levels()
    inside = (layer.weight[:, dead] - weight_hat).abs() <= levels.diff(dim=2).amax(dim=2) * 0.51
    clipped = (layer.weight[:, dead] < levels[..., 0]) | (layer.weight[:, dead] > levels[..., -1])
    assert (inside | clipped).all()
