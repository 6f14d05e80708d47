"""Coordinate descent against a naive loop over coordinates, and its optimality, in float64."""

import pytest
import torch

from quantlab.api import CodebookSpec, Lut, layer_loss
from quantlab.solvers.descent import descend, relax, round_descending
from quantlab.solvers.grid import minmax_grid
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import GridRounder, LutRounder, nearest_codes
from quantlab.solvers.order import processing_order
from quantlab.solvers.sweep import Assignment, factor_for_sweep, sweep

ORDERS = ["natural", "hessian_diagonal"]


def order_of(layer, column_order="natural"):
    return processing_order(layer.hessian, column_order, backwards=False)


def loss_of(error, layer):
    return layer_loss(error, torch.zeros_like(error), layer.hessian)


def codebook_of(layer, kind="lut", group_size=None, bits=3):
    if kind == "grid":
        return minmax_grid(layer.weight, CodebookSpec(bits=bits, group_size=group_size))
    groups = layer.weight.reshape(-1, group_size or layer.weight.shape[1])
    return Lut(values=kmeans_levels(groups, 1 << bits, iterations=20).view(len(layer.weight), -1, 1 << bits))


def rounder(codebook, in_features):
    return (LutRounder if isinstance(codebook, Lut) else GridRounder)(codebook, in_features)


def levels_per_column(codebook, in_features):
    levels = codebook.levels()
    return levels.repeat_interleave(in_features // levels.shape[1], dim=1)


def rounded(layer, codebook):
    codes = nearest_codes(layer.weight, codebook)
    levels = levels_per_column(codebook, layer.weight.shape[1])
    return Assignment(codes=codes, error=layer.weight - levels.gather(2, codes.long()[..., None])[..., 0])


def run(layer, codebook, start=None, column_order="natural", sweeps=1, block_size=128):
    start = rounded(layer, codebook) if start is None else start
    nearest = rounder(codebook, layer.weight.shape[1])
    order = order_of(layer, column_order)
    return descend(layer.weight, start, layer.hessian, order, nearest, sweeps=sweeps, block_size=block_size)


def naive_pass(layer, codebook, error, order):
    """Lemma 1 of arXiv:2309.01885, coordinate by coordinate, without a rule for ties."""
    error, hessian = error.clone(), layer.hessian
    levels = levels_per_column(codebook, layer.weight.shape[1])
    codes = torch.zeros(error.shape, dtype=torch.long)
    for row in range(len(error)):
        for j in order.tolist():
            others = sum(error[row, k] * hessian[k, j] for k in range(error.shape[1]) if k != j)
            target = layer.weight[row, j] + others / hessian[j, j]
            codes[row, j] = (target - levels[row, j]).abs().argmin()
            error[row, j] = layer.weight[row, j] - levels[row, j, codes[row, j]]
    return codes, error


@pytest.mark.parametrize("block_size", [1, 7, 20, 32])
@pytest.mark.parametrize(("kind", "group_size"), [("lut", None), ("lut", 5), ("grid", None), ("grid", 5)])
@pytest.mark.parametrize("column_order", ORDERS)
def test_blocked_pass_is_the_naive_loop_over_coordinates(make_layer, column_order, kind, group_size, block_size):
    layer = make_layer(out_features=3, in_features=20)
    codebook = codebook_of(layer, kind, group_size, bits=2)
    start = rounded(layer, codebook)
    codes, error = naive_pass(layer, codebook, start.error, order_of(layer, column_order))
    assert not torch.equal(codes, start.codes.long())
    result = run(layer, codebook, column_order=column_order, block_size=block_size)
    assert torch.equal(result.codes.long(), codes)
    torch.testing.assert_close(result.error, error, rtol=0, atol=1e-13)


@pytest.mark.parametrize("block_size", [1, 7, 32, 48])
@pytest.mark.parametrize("column_order", ORDERS)
def test_several_blocked_passes_are_as_many_single_ones(make_layer, column_order, block_size):
    layer = make_layer(seed=1)
    codebook = codebook_of(layer)
    expected = rounded(layer, codebook)
    for _ in range(4):
        expected = run(layer, codebook, expected, column_order)
    result = run(layer, codebook, column_order=column_order, sweeps=4, block_size=block_size)
    assert torch.equal(result.codes, expected.codes)
    torch.testing.assert_close(result.error, expected.error, rtol=0, atol=1e-13)


@pytest.mark.parametrize("block_size", [1, 7, 20])
def test_rounding_from_the_weight_is_the_naive_loop_over_coordinates(make_layer, block_size):
    layer = make_layer(seed=2, out_features=3, in_features=20)
    codebook, order = codebook_of(layer, "grid"), order_of(layer)
    nothing = torch.zeros_like(layer.weight)
    codes, error = naive_pass(layer, codebook, nothing, order)
    nearest = rounder(codebook, 20)
    result = round_descending(layer.weight, nothing, layer.hessian, order, nearest, block_size=block_size)
    assert torch.equal(result.codes.long(), codes)
    torch.testing.assert_close(result.error, error, rtol=0, atol=1e-13)


@pytest.mark.parametrize("column_order", ORDERS)
def test_relaxation_is_a_gauss_seidel_iteration(make_layer, column_order):
    layer = make_layer(seed=3)
    order = order_of(layer, column_order)
    error = rounded(layer, codebook_of(layer)).error
    # One iteration for e H = 0 with H = D + lower + upper in the order of visits: (D + lower) e' = -upper e.
    hessian = layer.hessian[order][:, order]
    expected = torch.linalg.solve_triangular(hessian.tril(), -hessian.triu(1) @ error[:, order].T, upper=False).T
    relaxed = relax(error, layer.hessian, order, block_size=7)
    torch.testing.assert_close(relaxed[:, order], expected, rtol=1e-10, atol=1e-12)


def test_relaxation_leads_back_to_the_weight(make_layer):
    layer = make_layer(seed=4, in_features=16, tokens=400)
    error = rounded(layer, codebook_of(layer)).error
    losses = [loss_of(error, layer)]
    for _ in range(60):
        error = relax(error, layer.hessian, order_of(layer))
        losses.append(loss_of(error, layer))
    assert (torch.stack(losses).diff(dim=0) <= 0).all()
    assert (losses[-1] < 1e-3 * losses[0]).all()


@pytest.mark.parametrize("kind", ["lut", "grid"])
@pytest.mark.parametrize("column_order", ORDERS)
def test_no_pass_raises_the_loss_of_any_row(make_layer, column_order, kind):
    layer = make_layer(seed=5)
    codebook = codebook_of(layer, kind, group_size=16)
    state, losses = rounded(layer, codebook), []
    for _ in range(12):
        losses.append(loss_of(state.error, layer))
        state = run(layer, codebook, state, column_order)
    losses = torch.stack(losses)
    assert (losses.diff(dim=0) <= 1e-13 * losses[:-1]).all()
    assert losses[-1].sum() < 0.7 * losses[0].sum()


def test_no_single_visit_raises_the_loss_of_any_row(make_layer):
    layer = make_layer(seed=6, in_features=24)
    codebook = codebook_of(layer)
    nearest, visited = rounder(codebook, 24), []
    weight, error = layer.weight, rounded(layer, codebook).error.clone()

    def watching(column, targets):
        codes, levels = nearest(column, targets)
        error[:, column] = weight[:, column] - levels
        visited.append(loss_of(error, layer))
        return codes, levels

    run_order = order_of(layer, "hessian_diagonal")
    descend(weight, rounded(layer, codebook), layer.hessian, run_order, watching, sweeps=1)
    losses = torch.stack([loss_of(rounded(layer, codebook).error, layer), *visited])
    assert len(losses) == 25
    assert (losses.diff(dim=0) <= 1e-13 * losses[0]).all()


@pytest.mark.parametrize(("kind", "group_size"), [("lut", None), ("grid", 8)])
def test_a_converged_answer_cannot_be_improved_by_any_single_code(make_layer, kind, group_size):
    layer = make_layer(seed=7, out_features=6, in_features=24)
    codebook = codebook_of(layer, kind, group_size)
    result = run(layer, codebook, sweeps=100)
    loss = loss_of(result.error, layer)
    levels = levels_per_column(codebook, 24)
    for j in range(24):
        for k in range(8):
            changed = result.error.clone()
            changed[:, j] = layer.weight[:, j] - levels[:, j, k]
            assert (loss_of(changed, layer) >= loss * (1 - 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("column_order", ORDERS)
@pytest.mark.usefixtures("kernels")
def test_a_converged_answer_stays(make_layer, column_order, dtype):
    layer = make_layer(seed=8)
    layer = type(layer)(weight=layer.weight.to(dtype), inputs=layer.inputs.to(dtype))
    codebook = codebook_of(layer)
    first = run(layer, codebook, column_order=column_order, sweeps=100)
    for block_size in (128, 5):
        again = run(layer, codebook, first, column_order, sweeps=1, block_size=block_size)
        assert torch.equal(again.codes, first.codes)
        assert torch.equal(again.error, first.error)


def test_ties_keep_their_codes(make_layer):
    # Every target is halfway between levels 1 and 2, whichever of them is present; rounding takes the lower one.
    layer = type(make_layer())(
        weight=torch.full((2, 48), 1.5, dtype=torch.float64), inputs=torch.eye(48, dtype=torch.float64)
    )
    codebook = Lut(values=torch.arange(4.0, dtype=torch.float64).repeat(2, 1, 1))
    upper = torch.full((2, 48), 2, dtype=torch.uint8)
    start = Assignment(codes=upper, error=layer.weight - 2.0)
    assert (rounder(codebook, 48)(0, torch.full((2,), 1.5, dtype=torch.float64))[0] == 1).all()
    assert torch.equal(run(layer, codebook, start, sweeps=3).codes, upper)


def test_duplicate_levels_keep_their_codes(make_layer):
    layer = make_layer(seed=10)
    codebook = Lut(values=torch.tensor([-1.0, 0.0, 0.0, 1.0], dtype=torch.float64).repeat(24, 1, 1))
    converged = run(layer, codebook, sweeps=100)
    assert (converged.codes == 1).any()
    other = Assignment(codes=torch.where(converged.codes == 1, 2, converged.codes), error=converged.error)
    assert torch.equal(run(layer, codebook, other).codes, other.codes)


def test_uncorrelated_inputs_converge_in_one_pass_to_nearest_rounding(make_layer):
    layer = make_layer(seed=11)
    layer = type(layer)(weight=layer.weight, inputs=torch.linspace(1, 3, 48, dtype=torch.float64).diag())
    codebook = codebook_of(layer)
    codes = torch.randint(0, 8, layer.weight.shape, generator=torch.Generator().manual_seed(0))
    start = Assignment(codes=codes.to(torch.uint8), error=layer.weight - codebook.values[:, 0].gather(1, codes))
    assert torch.equal(run(layer, codebook, start, sweeps=1).codes, nearest_codes(layer.weight, codebook))


def test_weights_on_their_table_are_reached_and_kept(make_layer):
    layer = make_layer(seed=12)
    codebook = codebook_of(layer)
    codes = torch.randint(0, 8, layer.weight.shape, generator=torch.Generator().manual_seed(0))
    layer = type(layer)(weight=codebook.values[:, 0].gather(1, codes), inputs=layer.inputs)
    order, nearest = order_of(layer), rounder(codebook, 48)
    result = round_descending(layer.weight, torch.zeros_like(layer.weight), layer.hessian, order, nearest)
    assert torch.equal(result.codes.long(), codes)
    assert (result.error == 0).all()
    assert torch.equal(run(layer, codebook, result, sweeps=3).codes, result.codes)


def test_dead_inputs_keep_their_codes_and_take_no_part(make_layer):
    layer = make_layer(seed=13)
    dead = torch.arange(48) % 5 == 0
    layer = type(layer)(weight=layer.weight, inputs=layer.inputs * ~dead)
    codebook = codebook_of(layer)
    start = rounded(layer, codebook)
    strange = Assignment(
        codes=torch.where(dead, 0, start.codes),
        error=torch.where(dead, layer.weight - codebook.values[:, 0, :1], start.error),
    )
    results = [run(layer, codebook, each, sweeps=3) for each in (start, strange)]
    assert torch.equal(results[1].codes[:, dead], strange.codes[:, dead])
    assert torch.equal(results[1].codes[:, ~dead], results[0].codes[:, ~dead])
    without = type(layer)(weight=layer.weight[:, ~dead], inputs=layer.inputs[:, ~dead])
    expected = run(without, codebook, Assignment(codes=start.codes[:, ~dead], error=start.error[:, ~dead]), sweeps=3)
    assert torch.equal(results[0].codes[:, ~dead], expected.codes)


def test_dead_inputs_are_rounded_to_nearest_when_they_have_no_code_yet(make_layer):
    layer = make_layer(seed=14)
    dead = torch.arange(48) % 5 == 0
    layer = type(layer)(weight=layer.weight, inputs=layer.inputs * ~dead)
    codebook, order = codebook_of(layer), order_of(layer)
    relaxed = relax(torch.zeros_like(layer.weight), layer.hessian, order)
    result = round_descending(layer.weight, relaxed, layer.hessian, order, rounder(codebook, 48))
    assert torch.equal(result.codes[:, dead], nearest_codes(layer.weight, codebook)[:, dead])


def test_a_silent_layer_is_left_alone(make_layer):
    layer = make_layer(seed=15)
    layer = type(layer)(weight=layer.weight, inputs=torch.zeros_like(layer.inputs))
    codebook = codebook_of(layer)
    start = rounded(layer, codebook)
    assert torch.equal(run(layer, codebook, start, sweeps=3).codes, start.codes)
    assert torch.equal(relax(start.error, layer.hessian, order_of(layer)), start.error)


def test_rows_are_independent(make_layer):
    layer = make_layer(seed=16)
    codebook = codebook_of(layer)
    codes = run(layer, codebook, sweeps=5).codes
    rows = torch.tensor([5, 3, 17])
    part = type(layer)(weight=layer.weight[rows], inputs=layer.inputs)
    assert torch.equal(run(part, Lut(values=codebook.values[rows]), sweeps=5).codes, codes[rows])


def test_codes_do_not_depend_on_the_scale_of_hessian_or_weight(make_layer):
    layer = make_layer(seed=17)
    codebook = codebook_of(layer)
    codes = run(layer, codebook, sweeps=5).codes
    louder = type(layer)(weight=layer.weight, inputs=1e3 * layer.inputs)
    assert torch.equal(run(louder, codebook, sweeps=5).codes, codes)
    heavier = type(layer)(weight=1e-3 * layer.weight, inputs=layer.inputs)
    assert torch.equal(run(heavier, Lut(values=1e-3 * codebook.values), sweeps=5).codes, codes)


def test_descent_improves_on_the_triangular_sweep_and_is_no_match_for_it_alone(make_layer):
    swept = refined = alone = 0.0
    for seed in range(5):
        layer = make_layer(seed)
        codebook = codebook_of(layer)
        factor = factor_for_sweep(layer.hessian, order_of(layer, "hessian_diagonal"), 0.01, torch.float64)
        start = sweep(layer.weight, factor, rounder(codebook, 48))
        swept += loss_of(start.error, layer).sum()
        refined += loss_of(run(layer, codebook, start, sweeps=10).error, layer).sum()
        alone += loss_of(run(layer, codebook, sweeps=10).error, layer).sum()
    assert refined < 0.98 * swept < swept < alone


@pytest.mark.usefixtures("kernels")
def test_single_precision_has_the_loss_of_double_precision(make_layer):
    layer = make_layer(seed=18, out_features=48)
    codebook = codebook_of(layer)
    single = type(layer)(weight=layer.weight.float(), inputs=layer.inputs.float())
    error = run(single, Lut(values=codebook.values.float()), sweeps=10).error.double()
    loss = loss_of(run(layer, codebook, sweeps=10).error, layer).sum()
    torch.testing.assert_close(loss_of(error, layer).sum(), loss, rtol=1e-3, atol=0)
