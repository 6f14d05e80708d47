"""The native stages of the solvers against float64, for every instruction set of this machine."""

import pytest
import torch

from quantlab.api import CodebookSpec, Lut, UniformGrid, layer_loss
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.codebook import CodebookFit, Codebooks, LevelGram, refit_codebook
from quantlab.solvers.descent import descend, relax, round_descending
from quantlab.solvers.grid import minmax_grid
from quantlab.solvers.joint import descend_jointly
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import GridRounder, LutRounder
from quantlab.solvers.products import add_products
from quantlab.solvers.sweep import Assignment, factor_for_sweep, sweep, sweep_targets
from quantlab_kernels import solver
from quantlab_kernels.build import BuildError, build_library
from quantlab_kernels.isa import Isa, detected_isa
from quantlab_kernels.native import open_library
from quantlab_kernels.solver_library import LIBRARY, declare, solver_recipe


def isas():
    try:
        return [isa for isa in (Isa.PORTABLE, Isa.AVX2, Isa.AVX512) if isa <= detected_isa()]
    except BuildError:
        return []


@pytest.fixture(scope="module", params=isas(), ids=lambda isa: isa.name.lower())
def library(request):
    opened = open_library(build_library(solver_recipe(request.param)))
    declare(opened)
    return opened


@pytest.fixture(autouse=True)
def native(request, monkeypatch):
    if "library" in request.fixturenames:
        library = request.getfixturevalue("library")
        monkeypatch.setattr(LIBRARY, "get", lambda: library)
    elif not solver.usable(torch.zeros(1)):
        pytest.skip("no native library on this machine")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(rows, inputs, dead=0):
    """A weight and the Hessian of correlated inputs of unequal strength, in float32."""
    data = normal(4 * inputs, inputs, seed=1) @ normal(inputs, inputs, seed=2) / inputs**0.5
    data = data * normal(inputs, seed=3).mul(0.7).exp()
    data[:, :dead] = 0
    return normal(rows, inputs, seed=4), data.T @ data / len(data)


def tables(rows, levels, groups=1):
    return Lut(values=normal(rows, groups, levels, seed=5).sort(dim=2).values)


def books(kind, weight, levels, groups=1):
    """A codebook of either kind, and its rounder."""
    rows, inputs = weight.shape
    if kind == "table":
        codebook = tables(rows, levels, groups)
        return codebook, LutRounder(codebook, inputs)
    codebook = minmax_grid(weight, CodebookSpec(bits=levels.bit_length() - 1, group_size=inputs // groups))
    return codebook, GridRounder(codebook, inputs)


def selected(codes, codebook):
    rows = len(codes)
    groups = codebook.levels().shape[1]
    return codebook.levels().gather(2, codes.long().view(rows, groups, -1)).view(rows, -1)


def in_double(codebook):
    if isinstance(codebook, Lut):
        return Lut(values=codebook.values.double())
    return UniformGrid(scale=codebook.scale.double(), zero=codebook.zero.double(), bits=codebook.bits)


def excess_distance(targets, codes, codebook):
    """How much farther than the nearest level the chosen one is from each target, in float64."""
    inputs = targets.shape[1]
    levels = in_double(codebook).levels()
    per_input = levels.repeat_interleave(inputs // levels.shape[1], dim=1)
    distance = (targets[..., None] - per_input).abs()
    return distance.gather(2, codes.long()[..., None])[..., 0] - distance.amin(dim=2)


SHAPES = [(1, 1), (3, 24), (64, 48), (65, 100), (130, 29)]


@pytest.mark.parametrize("kind", ["table", "grid"])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_every_level_of_a_sweep_is_nearest_to_its_target(library, kind, rows, inputs):
    weight, hessian = problem(rows, inputs)
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(6))
    factor = factor_for_sweep(hessian, order, 0.01, torch.float32)
    codebook, rounder = books(kind, weight, 8)
    result = sweep(weight, factor, rounder)
    assert torch.equal(result.error, weight - selected(result.codes, codebook))
    strict = factor.feedback.double().tril(-1)
    errors = result.error.double()[:, factor.columns]
    targets = torch.empty_like(errors)
    targets[:, factor.columns] = weight.double()[:, factor.columns] + errors @ strict
    assert (excess_distance(targets, result.codes, codebook) <= 1e-5 * targets.abs().amax()).all()
    torch.testing.assert_close(sweep_targets(weight, factor, rounder).double(), targets, rtol=1e-4, atol=1e-4)
    loss = layer_loss(weight, weight.double() - result.error.double(), hessian)
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-5 * loss.max().item())


@pytest.mark.parametrize("kind", ["table", "grid"])
def test_every_input_uses_the_codebook_of_its_group(library, kind):
    weight, hessian = problem(70, 60)
    factor = factor_for_sweep(hessian, torch.randperm(60), 0.01, torch.float32)
    codebook, rounder = books(kind, weight, 4, groups=5)
    result = sweep(weight, factor, rounder)
    assert torch.equal(result.error, weight - selected(result.codes, codebook))


@pytest.mark.parametrize("levels", [2, 4, 32, 256])
def test_any_number_of_levels(library, levels):
    weight, hessian = problem(20, 40)
    factor = factor_for_sweep(hessian, torch.arange(40), 0.01, torch.float32)
    codebook = tables(20, levels)
    uncorrelated = factor_for_sweep(torch.eye(40), torch.arange(40), 0.0, torch.float32)
    assert int(sweep(weight, factor, LutRounder(codebook, 40)).codes.max()) < levels
    codes = sweep(weight, uncorrelated, LutRounder(codebook, 40)).codes
    assert torch.equal(codes.long(), (weight[..., None] - codebook.values).abs().argmin(dim=2))


def test_ties_go_to_the_lower_entry_of_a_table_and_to_the_even_code_of_a_grid(library):
    factor = factor_for_sweep(torch.eye(5), torch.arange(5), 0.0, torch.float32)
    table = LutRounder(Lut(values=torch.tensor([[[0.0, 1.0, 1.0, 2.0]]])), 5)
    assert sweep(torch.tensor([[0.5, 1.0, 1.5, 9.0, -9.0]]), factor, table).codes.tolist() == [[0, 1, 2, 3, 0]]
    grid = GridRounder(UniformGrid(scale=torch.ones(1, 1), zero=torch.zeros(1, 1), bits=3), 5)
    assert sweep(torch.tensor([[0.5, 1.5, 2.5, 99.0, -99.0]]), factor, grid).codes.tolist() == [[0, 2, 2, 7, 0]]


def test_dead_inputs_are_rounded_to_nearest_by_a_sweep_and_kept_by_descent(library):
    weight, hessian = problem(66, 40, dead=3)
    factor = factor_for_sweep(hessian, torch.arange(40), 0.01, torch.float32)
    codebook, rounder = books("table", weight, 4)
    swept = sweep(weight, factor, rounder)
    nearest = (weight[:, :3, None] - codebook.values).abs().argmin(dim=2)
    assert torch.equal(swept.codes[:, :3].long(), nearest)
    loss = layer_loss(weight, weight.double() - swept.error.double(), hessian)
    torch.testing.assert_close(swept.loss, loss, rtol=1e-4, atol=0)
    wrong = Assignment(codes=torch.zeros_like(swept.codes), error=weight - codebook.values[:, :, 0])
    descended = descend(weight, wrong, hessian, torch.arange(40), rounder, sweeps=3)
    assert (descended.codes[:, :3] == 0).all()


@pytest.mark.parametrize("kind", ["table", "grid"])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_descent_ends_where_no_single_code_lowers_the_loss(library, kind, rows, inputs):
    weight, hessian = problem(rows, inputs)
    codebook, rounder = books(kind, weight, 4)
    codes = torch.zeros(rows, inputs, dtype=torch.uint8)
    error = weight - selected(codes, codebook)
    loss = layer_loss(weight, weight.double() - error.double(), hessian)
    start = Assignment(codes=codes, error=error, loss=loss)
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(7))
    result = descend(weight, start, hessian, order, rounder, sweeps=100)
    assert torch.equal(result.error, weight - selected(result.codes, codebook))
    final = layer_loss(weight, weight.double() - result.error.double(), hessian)
    assert (final <= loss).all()
    torch.testing.assert_close(result.loss, final, rtol=1e-4, atol=1e-5 * loss.max().item())
    error, exact = result.error.double(), hessian.double()
    minima = weight.double() - error + (error @ exact) / exact.diagonal()
    assert (excess_distance(minima, result.codes, codebook) <= 1e-4 * minima.abs().amax()).all()


def test_passes_of_descent_are_those_of_the_reference(library):
    weight, hessian = problem(70, 60)
    codebook, rounder = books("table", weight, 8)
    codes = torch.zeros(70, 60, dtype=torch.uint8)
    start = Assignment(codes=codes, error=weight - selected(codes, codebook))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(8))
    operands = (hessian.double(), order, LutRounder(in_double(codebook), 60))
    exact = descend(weight.double(), Assignment(codes=codes, error=start.error.double()), *operands, sweeps=1)
    native = descend(weight, start, hessian, order, rounder, sweeps=1)
    assert (native.codes != exact.codes).double().mean() < 2e-3
    exact = round_descending(weight.double(), torch.zeros(70, 60, dtype=torch.float64), *operands)
    native = round_descending(weight, torch.zeros(70, 60), hessian, order, rounder)
    assert (native.codes != exact.codes).double().mean() < 2e-3
    exact_error = relax(start.error.double(), hessian.double(), order)
    torch.testing.assert_close(relax(start.error, hessian, order).double(), exact_error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cells", [None, 64])
def test_kmeans_is_that_of_the_reference(library, monkeypatch, weighted, cells):
    rows = normal(9, 600)
    rows[0] = 1.0
    rows[1, 3:] = rows[1, 0]  # three distinct values for five levels
    weights = normal(600, seed=12).square().masked_fill(torch.arange(600) % 7 == 0, 0.0) if weighted else None
    native = kmeans_levels(rows, 5, 30, weights, cells=cells)
    monkeypatch.setattr(LIBRARY, "get", lambda: None)
    torch.testing.assert_close(native, kmeans_levels(rows, 5, 30, weights, cells=cells), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_losses_are_those_in_double_precision(library, rows, inputs):
    error, hessian = problem(rows, inputs)
    expected = layer_loss(error, torch.zeros_like(error), hessian)
    torch.testing.assert_close(solver.row_losses(error, hessian), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [7, 64])
def test_factors_of_blocks_are_those_of_their_damped_hessians(library, size):
    _, hessian = problem(1, 150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(13))[:140]
    factors, failures = solver.factor_blocks(hessian, order, size, 0.01)
    assert failures == 0
    for index, block in enumerate(order.split(size)):
        count = len(block)
        expected = hessian[block][:, block]
        assert torch.equal(factors.within[index, :count, :count], expected)
        unit = factors.feedback[index, :count, :count].double()
        assert torch.equal(factors.upper[index, :count, :count].double(), unit.T)
        assert torch.equal(unit.diagonal(), torch.ones(count, dtype=torch.float64))
        squares = factors.precision[size * index : size * index + count].double().reciprocal()
        damped = expected.double() + 0.01 * expected.diagonal().double().mean() * torch.eye(count)
        torch.testing.assert_close(unit * squares @ unit.T, damped, rtol=1e-5, atol=1e-5 * damped.max().item())


def test_blocks_that_are_singular_are_damped_more_and_indefinite_ones_are_counted(library):
    order = torch.arange(6)
    factors, failures = solver.factor_blocks(torch.ones(6, 6), order, 3, 0.0)
    assert failures == 0
    assert torch.isfinite(factors.precision).all()
    indefinite = torch.block_diag(torch.eye(3), torch.full((3, 3), 9.0) - 8 * torch.eye(3))
    indefinite[4, 5] = indefinite[5, 4] = -9.0
    assert solver.factor_blocks(indefinite, order, 3, 0.01)[1] == 1


@pytest.mark.parametrize("dead", [0, 5])
def test_block_descent_keeps_what_its_losses_say(library, dead):
    weight, hessian = problem(70, 150, dead)
    table = tables(70, 8).values[:, 0]
    codes = torch.zeros(70, 150, dtype=torch.uint8)
    error = weight - table[:, :1]
    loss = layer_loss(weight, weight.double() - error.double(), hessian)
    start = Assignment(codes=codes, error=error, loss=loss)

    def run(operands):
        generator = torch.Generator().manual_seed(11)
        return descend_in_blocks(*operands, torch.arange(150), passes=2, generator=generator)

    native = run((weight, start, table, hessian))
    assert torch.equal(native.error, weight - table.gather(1, native.codes.long()))
    assert (native.codes[:, :dead] == 0).all()
    final = layer_loss(weight, weight.double() - native.error.double(), hessian)
    torch.testing.assert_close(native.loss, final, rtol=1e-3, atol=1e-5 * loss.max().item())
    exact_start = Assignment(codes=codes, error=error.double())
    exact = run((weight.double(), exact_start, table.double(), hessian.double()))
    assert (native.codes != exact.codes).double().mean() < 0.02
    expected = layer_loss(weight, weight.double() - exact.error, hessian).sum()
    torch.testing.assert_close(final.sum(), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("levels", [2, 5, 16])
def test_joint_descent_is_that_of_the_reference(library, monkeypatch, levels, dead):
    weight, hessian = problem(20, 90, dead)
    table = tables(20, levels).values[:, 0]
    codes = (weight[..., None] - table[:, None]).abs().argmin(dim=2).to(torch.uint8)
    start, order = Codebooks(levels=table, codes=codes), torch.arange(90).flip(0)
    loss = layer_loss(weight, start.dequantize(), hessian)

    def run():
        return descend_jointly(weight, start, loss, hessian, order, CodebookFit(weight, hessian), passes=3)

    fitted, found = run()
    assert (found <= loss * (1 + 1e-5)).all()
    torch.testing.assert_close(found, layer_loss(weight, fitted.dequantize(), hessian), rtol=1e-4, atol=0)
    monkeypatch.setattr(LIBRARY, "get", lambda: None)
    expected, expected_loss = run()
    assert (fitted.codes != expected.codes).double().mean() < 0.02
    torch.testing.assert_close(found.sum(), expected_loss.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("levels", [2, 5, 16, 17, 256])
@pytest.mark.parametrize("inputs", [1, 31, 33, 160, 1100])
def test_gram_is_the_sum_of_the_hessian_over_pairs_of_codes(library, levels, inputs):
    data = normal(inputs, inputs, seed=9)
    hessian = data + data.T
    codes = torch.randint(0, levels, (3, inputs), generator=torch.Generator().manual_seed(10)).to(torch.uint8)
    members = torch.nn.functional.one_hot(codes.long(), levels).double()
    expected = members.mT @ hessian.double() @ members
    gram = LevelGram(hessian)(codes, levels)
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-6 * inputs)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (63, 65), (300, 64), (517, 130)])
def test_products_are_added_to_the_upper_triangle(library, tokens, features):
    inputs, start = normal(tokens, features, seed=11), normal(features, features, seed=12)
    sums = start.clone()
    add_products(sums, inputs, inputs)
    expected = start.double() + inputs.double().T @ inputs.double()
    torch.testing.assert_close(sums.double().triu(), expected.triu(), rtol=1e-5, atol=1e-5 * tokens**0.5)


@pytest.mark.parametrize(("tokens", "left", "right"), [(1, 1, 3), (63, 65, 7), (517, 5, 130)])
def test_products_of_two_matrices_are_added_everywhere(library, tokens, left, right):
    drift, inputs = normal(tokens, left, seed=11), normal(tokens, right, seed=13)
    start = normal(left, right, seed=12)
    sums = start.clone()
    add_products(sums, drift, inputs)
    expected = start.double() + drift.double().T @ inputs.double()
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5 * tokens**0.5)


@pytest.mark.parametrize("levels", [8, 16])
def test_the_gram_of_a_level_without_live_inputs_has_an_exact_zero_on_its_diagonal(library, levels):
    _, hessian = problem(1, 300, dead=120)
    codes = (torch.arange(300) % (levels - 2) + 1).to(torch.uint8)
    codes[:120] = 0  # the most frequent code; the last level has no input at all
    gram = LevelGram(hessian)(codes.expand(70, 300), levels)
    energy = gram.diagonal(dim1=1, dim2=2)
    assert (energy[:, [0, levels - 1]] == 0).all()
    assert (energy[:, 1 : levels - 1] > 0).all()


def test_a_prepared_fit_finds_the_levels_and_the_loss_of_the_refit(library):
    weight, hessian = problem(70, 60)
    _, rounder = books("table", weight, 8)
    table = tables(70, 8).values[:, 0]
    assignment = sweep(weight, factor_for_sweep(hessian, torch.arange(60), 0.01, torch.float32), rounder)
    fitted, loss = CodebookFit(weight, hessian).refit(table, assignment)
    expected = refit_codebook(table.double(), assignment.codes, assignment.error.double(), hessian.double())
    torch.testing.assert_close(fitted.dequantize().double(), expected.dequantize(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss, layer_loss(weight, fitted.dequantize(), hessian), rtol=1e-4, atol=0)
    unknown = Assignment(codes=assignment.codes, error=assignment.error)
    torch.testing.assert_close(CodebookFit(weight, hessian).refit(table, unknown)[1], loss, rtol=1e-4, atol=0)


def test_blocks_are_entered_as_in_the_reference_and_may_change_their_grid(library, monkeypatch):
    weight, hessian = problem(70, 60)
    factor = factor_for_sweep(hessian, torch.arange(60), 0.01, torch.float32)
    blank = UniformGrid(scale=torch.ones(70, 4), zero=torch.zeros(70, 4), bits=3)

    def run():
        rounder, entered = GridRounder(blank, 60), []

        def enter(columns, updated):
            entered.append(updated)
            rounder.replace_group(int(columns.min()) // 15, minmax_grid(updated, CodebookSpec(bits=3)))

        return sweep(weight, factor, rounder, block_size=15, enter_block=enter), entered

    result, entered = run()
    monkeypatch.setattr(LIBRARY, "get", lambda: None)
    expected, expected_entered = run()
    assert (result.codes != expected.codes).double().mean() < 0.01
    torch.testing.assert_close(entered[0], expected_entered[0])
    torch.testing.assert_close(result.loss.sum(), expected.loss.sum(), rtol=0.02, atol=0)
