"""The CUDA stages of the solvers against the same stages in PyTorch and float64.

Without a device, the source of the kernels is executed on the host. Where all numbers are small multiples of a power of
two, sums in float32 are exact in any order, so that results must be those of float64 to the last bit.
"""

import ast
import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantlab.api import CodebookSpec, Lut, UniformGrid, layer_loss
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.cholesky import damped_cholesky
from quantlab.solvers.codebook import CodebookFit, Codebooks, LevelGram, refit_codebook
from quantlab.solvers.descent import descend, relax, round_descending
from quantlab.solvers.grid import minmax_grid
from quantlab.solvers.joint import descend_jointly
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import GridRounder, LutRounder
from quantlab.solvers.sweep import Assignment, SweepFactor, factor_for_sweep, sweep, sweep_targets
from quantlab_kernels import solver, solver_cuda, solver_cuda_library, status

FORWARD, BACKWARD, RANDOM = range(3)
# One panel and several, ragged rows, and inputs that are no multiple of a vector.
SHAPES = [(1, 1), (5, 31), (33, 130), (34, 301)]
KINDS = ["table of 2", "table of 8", "table of 32", "table of 40", "grid of 4", "grid of 16"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def whole(low, high, *shape, seed=0):
    """Random whole numbers from low to high, as float32."""
    return torch.randint(low, high + 1, shape, generator=seeded(seed)).float()


def dyadic_codebook(kind, rows, groups=1):
    """A codebook whose levels, midpoints and grid are multiples of 1/8."""
    name, _, levels = kind.split()
    levels = int(levels)
    if name == "table":
        steps = whole(1, 3, rows, groups, levels, seed=1)
        return Lut(values=(steps.cumsum(dim=2) - steps.sum(dim=2, keepdim=True) / 2).floor() / 4)
    scale = 2.0 ** whole(-2, 0, rows, groups, seed=1)
    return UniformGrid(scale=scale, zero=whole(0, levels, rows, groups, seed=2), bits=levels.bit_length() - 1)


def moved(codebook, device, dtype):
    if isinstance(codebook, Lut):
        return Lut(values=codebook.values.to(device, dtype))
    return UniformGrid(scale=codebook.scale.to(device, dtype), zero=codebook.zero.to(device, dtype), bits=codebook.bits)


def rounder(codebook, inputs):
    return (LutRounder if isinstance(codebook, Lut) else GridRounder)(codebook, inputs)


def dyadic_factor(inputs, device, dtype):
    """A factor in a random order, sparse and with multiples of 1/2, as no Cholesky factor would be."""
    feedback = whole(-1, 1, inputs, inputs, seed=3) / 2
    feedback *= torch.rand(inputs, inputs, generator=seeded(4)) < 0.2
    feedback = feedback.tril(-1) + torch.eye(inputs)
    return SweepFactor(
        columns=torch.randperm(inputs, generator=seeded(5)).to(device),
        feedback=feedback.to(device, dtype),
        pivots=2.0 ** whole(-1, 1, inputs, seed=6).double().to(device),
        added=0.25 * torch.ones(inputs, dtype=torch.float64, device=device),
        live=torch.arange(inputs, device=device) % 7 != 3,
        requested_damping=0.0,
        damping=0.0,
    )


def dyadic_hessian(inputs):
    """A symmetric matrix of whole numbers, with powers of two on the diagonal; some inputs are dead."""
    upper = whole(-1, 1, inputs, inputs, seed=7) * (torch.rand(inputs, inputs, generator=seeded(8)) < 0.1)
    hessian = upper.triu(1) + upper.triu(1).T
    hessian.diagonal().copy_(2.0 ** whole(1, 3, inputs, seed=9))
    dead = torch.arange(inputs) % 11 == 5
    hessian[dead] = 0
    hessian[:, dead] = 0
    return hessian


def problem(rows, inputs, device, dead=0):
    """A random weight and the Hessian of correlated inputs of unequal strength."""
    normal = partial(torch.randn, generator=seeded(10))
    data = normal(4 * inputs, inputs) @ normal(inputs, inputs) / inputs**0.5
    data = data * normal(inputs).mul(0.7).exp()
    data[:, :dead] = 0
    return normal(rows, inputs).to(device), (data.T @ data / len(data)).to(device)


def on_host(tensor):
    return tensor.detach().cpu()


def same(found, expected):
    """Equal to a result in float64, which has to be a float32."""
    assert torch.equal(on_host(found).double(), expected.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_sweep_is_that_of_float64(rows, inputs, kind, device, kernels_run):
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook(kind, rows)
    expected = sweep(
        weight.double(),
        dyadic_factor(inputs, "cpu", torch.float64),
        rounder(moved(codebook, "cpu", torch.float64), inputs),
    )
    found = sweep(
        weight.to(device),
        dyadic_factor(inputs, device, torch.float32),
        rounder(moved(codebook, device, torch.float32), inputs),
    )
    assert kernels_run == ["sweep"]
    assert torch.equal(on_host(found.codes), expected.codes)
    same(found.error, expected.error)
    torch.testing.assert_close(on_host(found.loss), expected.loss, rtol=1e-6, atol=1e-6)


def test_targets_of_a_sweep_are_those_of_float64(device, kernels_run):
    rows, inputs = 33, 150
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook("table of 8", rows)
    exact = rounder(moved(codebook, "cpu", torch.float64), inputs)
    expected = sweep_targets(weight.double(), dyadic_factor(inputs, "cpu", torch.float64), exact)
    native = rounder(moved(codebook, device, torch.float32), inputs)
    same(sweep_targets(weight.to(device), dyadic_factor(inputs, device, torch.float32), native), expected)
    assert kernels_run == ["sweep"]


@pytest.mark.parametrize("kind", ["table of 8", "table of 40", "grid of 16"])
def test_every_input_uses_the_codebook_of_its_group(kind, device):
    rows, inputs, groups = 33, 156, 6
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook(kind, rows, groups)
    exact = moved(codebook, "cpu", torch.float64), dyadic_factor(inputs, "cpu", torch.float64)
    native = moved(codebook, device, torch.float32), dyadic_factor(inputs, device, torch.float32)
    expected = sweep(weight.double(), exact[1], rounder(exact[0], inputs))
    found = sweep(weight.to(device), native[1], rounder(native[0], inputs))
    assert torch.equal(on_host(found.codes), expected.codes)
    hessian, order = dyadic_hessian(inputs), torch.randperm(inputs, generator=seeded(11))
    operands = (hessian.double(), order, rounder(exact[0], inputs))
    expected = descend(weight.double(), expected, *operands, sweeps=2)
    operands = (hessian.to(device), order.to(device), rounder(native[0], inputs))
    found = descend(weight.to(device), found, *operands, sweeps=2)
    assert torch.equal(on_host(found.codes), expected.codes)
    same(found.error, expected.error)


@pytest.mark.parametrize("block_size", [13, 50, 128, 200])
@pytest.mark.parametrize("inputs", [1, 130, 153])
def test_blocks_of_a_sweep_are_entered_as_in_float64(inputs, block_size, device, kernels_run):
    rows = 33
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook("grid of 8", rows)
    entered = {}

    def run(weight, factor, codebook):
        def enter(columns, updated):
            entered.setdefault(updated.dtype, []).append((on_host(columns), on_host(updated)))

        return sweep(weight, factor, rounder(codebook, inputs), block_size=block_size, enter_block=enter)

    factor = dyadic_factor(inputs, "cpu", torch.float64)
    expected = run(weight.double(), factor, moved(codebook, "cpu", torch.float64))
    factor = dyadic_factor(inputs, device, torch.float32)
    found = run(weight.to(device), factor, moved(codebook, device, torch.float32))
    assert kernels_run == ["sweep"] * -(-inputs // block_size)
    for (columns, updated), (exact_columns, exact) in zip(*reversed(entered.values()), strict=True):
        assert torch.equal(columns, exact_columns)
        torch.testing.assert_close(updated.double(), exact, rtol=1e-5, atol=1e-4 * exact.abs().max().item())
    assert torch.equal(on_host(found.codes), expected.codes)
    same(found.error, expected.error)
    torch.testing.assert_close(on_host(found.loss), expected.loss, rtol=1e-6, atol=1e-6)


def test_codebook_may_change_when_a_block_is_entered(device):
    weight, hessian = problem(40, 60, device)
    factor = factor_for_sweep(hessian, torch.arange(60, device=device), 0.01, torch.float32)
    blank = UniformGrid(scale=torch.ones(40, 4, device=device), zero=torch.zeros(40, 4, device=device), bits=3)
    nearest = GridRounder(blank, 60)

    def enter(columns, updated):
        nearest.replace_group(int(columns.min()) // 15, minmax_grid(updated, CodebookSpec(bits=3)))

    result = sweep(weight, factor, nearest, block_size=15, enter_block=enter)
    levels = (result.codes.view(40, 4, 15) - nearest._zero.T[..., None]) * nearest._scale.T[..., None]
    assert torch.equal(result.error, weight - levels.view(40, 60))
    loss = layer_loss(weight, weight.double() - result.error.double(), hessian)
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_passes_of_descent_are_those_of_float64(rows, inputs, kind, device, kernels_run):
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook(kind, rows)
    hessian, order = dyadic_hessian(inputs), torch.randperm(inputs, generator=seeded(12))
    first = moved(codebook, "cpu", torch.float64).levels()[:, :, 0]
    codes = torch.zeros(rows, inputs, dtype=torch.uint8)

    def run(place, dtype):
        nearest = rounder(moved(codebook, place, dtype), inputs)
        start = Assignment(codes=codes.to(place), error=(weight - first).to(place, dtype), loss=torch.zeros(rows))
        return descend(weight.to(place, dtype), start, hessian.to(place, dtype), order.to(place), nearest, sweeps=3)

    expected = run("cpu", torch.float64)
    found = run(device, torch.float32)
    assert kernels_run == ["descend"]
    assert torch.equal(on_host(found.codes), expected.codes)
    same(found.error, expected.error)
    torch.testing.assert_close(on_host(found.loss), expected.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_descent_is_that_of_float64(kind, device, kernels_run):
    rows, inputs = 33, 150
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook(kind, rows)
    hessian, order = dyadic_hessian(inputs), torch.randperm(inputs, generator=seeded(13))

    def run(place, dtype):
        nearest, error = rounder(moved(codebook, place, dtype), inputs), torch.zeros(rows, inputs)
        operands = (weight.to(place, dtype), error.to(place, dtype), hessian.to(place, dtype), order.to(place))
        return round_descending(*operands, nearest)

    expected, found = run("cpu", torch.float64), run(device, torch.float32)
    assert kernels_run == ["descend"]
    assert torch.equal(on_host(found.codes), expected.codes)
    same(found.error, expected.error)


@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_relaxation_is_that_of_float64(rows, inputs, device, kernels_run):
    error, hessian = problem(rows, inputs, device)
    order = torch.randperm(inputs, generator=seeded(14)).to(device)
    expected = relax(error.double(), hessian.double(), order)
    torch.testing.assert_close(relax(error, hessian, order).double(), expected, rtol=1e-4, atol=1e-4)
    assert kernels_run == ["descend"]


def test_descent_ends_where_no_code_of_any_row_can_be_improved(device):
    weight, hessian = problem(70, 60, device)
    table = Lut(values=torch.randn(70, 1, 8, generator=seeded(15)).sort(dim=2).values.to(device))
    order, nearest = torch.randperm(60, generator=seeded(16)).to(device), LutRounder(table, 60)
    codes = torch.zeros(70, 60, dtype=torch.uint8, device=device)
    start = Assignment(codes=codes, error=weight - table.values[:, :, 0])
    result = descend(weight, start, hessian, order, nearest, sweeps=100)
    again = descend(weight, result, hessian, order, nearest, sweeps=1)
    assert torch.equal(again.codes, result.codes)
    assert torch.equal(result.error, weight - table.values[:, 0].gather(1, result.codes.long()))


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize(("rows", "inputs", "size"), [(40, 150, 64), (5, 37, 9), (3, 4, 1)])
def test_block_descent_keeps_what_its_losses_say(rows, inputs, size, dead, device, kernels_run):
    weight, hessian = problem(rows, inputs, device, min(dead, inputs - 1))
    table = torch.randn(rows, 8, generator=seeded(17)).sort(dim=1).values.to(device)
    codes, error = torch.zeros(rows, inputs, dtype=torch.uint8, device=device), weight - table[:, :1]
    loss = layer_loss(weight, weight.double() - error.double(), hessian)

    def run(weight, start, table, hessian):
        order = torch.arange(inputs, device=device)
        operands = (weight, start, table, hessian, order)
        return descend_in_blocks(*operands, passes=2, generator=seeded(18), block_size=size)

    native = run(weight, Assignment(codes=codes, error=error, loss=loss), table, hessian)
    assert kernels_run == ["factor_blocks", "descend_in_blocks"] * 2
    assert torch.equal(native.error, weight - table.gather(1, native.codes.long()))
    assert (native.codes[:, : min(dead, inputs - 1)] == 0).all()
    final = layer_loss(weight, weight.double() - native.error.double(), hessian)
    torch.testing.assert_close(native.loss, final, rtol=1e-3, atol=1e-5 * loss.max().item())
    exact_start = Assignment(codes=codes, error=error.double())
    exact = run(weight.double(), exact_start, table.double(), hessian.double())
    assert (native.codes != exact.codes).double().mean() < 0.02
    expected = layer_loss(weight, weight.double() - exact.error, hessian).sum()
    torch.testing.assert_close(final.sum(), expected, rtol=5e-3, atol=0)


def test_blocks_are_factored_with_more_damping_where_they_need_it(device):
    _, hessian = problem(1, 20, torch.device("cpu"))
    hessian[:8, :8] = 0.901 - 0.001 * torch.eye(8)  # the least eigenvalue is -0.001
    order = torch.arange(20)
    factors, failures = solver.factor_blocks(hessian.to(device), order.to(device), 8, 1e-4)
    assert failures == 0
    for index, inputs in enumerate(order.split(8)):
        count, block = len(inputs), hessian[inputs][:, inputs]
        exact = damped_cholesky(block, 1e-4)
        assert (exact.damping > 1e-4) == (index == 0)
        expected = exact.lower / exact.lower.diagonal()
        assert torch.equal(on_host(factors.within[index, :count, :count]), block)
        feedback = on_host(factors.feedback[index])
        torch.testing.assert_close(feedback[:count, :count].double(), expected, rtol=1e-4, atol=1e-5)
        assert (feedback[count:] == 0).all()
        assert (feedback[:, count:] == 0).all()
        assert torch.equal(on_host(factors.upper[index]), feedback.T)
        precision = on_host(factors.precision)[8 * index : 8 * index + count].double()
        torch.testing.assert_close(precision, exact.lower.diagonal() ** -2, rtol=1e-4, atol=0)
    assert solver.factor_blocks(-hessian.to(device), order.to(device), 8, 1e-4)[1] == 3


def test_losses_of_rows_are_those_of_float64(device):
    error, hessian = problem(9, 40, device)
    expected = layer_loss(error.double(), torch.zeros_like(error).double(), hessian.double())
    torch.testing.assert_close(solver.row_losses(error, hessian), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("levels", [2, 5, 16])
def test_joint_descent_is_that_of_pytorch(levels, dead, device, kernels_run, monkeypatch):
    monkeypatch.setattr(solver_cuda, "_WORKSPACE_BYTES", 5 * levels * 60 * 4)
    weight, hessian = problem(9, 60, device, dead)
    table = torch.randn(9, levels, generator=seeded(34)).sort(dim=1).values.to(device)
    codes = (weight[..., None] - table[:, None]).abs().argmin(dim=2).to(torch.uint8)
    start, order = Codebooks(levels=table, codes=codes), torch.arange(60, device=device).flip(0)
    loss = layer_loss(weight, start.dequantize(), hessian)

    def run():
        return descend_jointly(weight, start, loss, hessian, order, CodebookFit(weight, hessian), passes=3)

    fitted, found = run()
    assert kernels_run.count("descend_jointly") == 2, "five rows, then four"
    assert (found <= loss * (1 + 1e-5)).all()
    # The codebook step rounds relative to the weight, of whose loss this one is a small part.
    torch.testing.assert_close(found, layer_loss(weight, fitted.dequantize(), hessian), rtol=1e-3, atol=0)
    monkeypatch.setattr(solver_cuda_library.LIBRARY, "get", lambda: None)
    expected, expected_loss = run()
    assert (fitted.codes != expected.codes).double().mean() < 0.02
    torch.testing.assert_close(found.sum(), expected_loss.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("levels", [2, 4, 5, 16, 17])
@pytest.mark.parametrize("inputs", [1, 33, 223, 225, 500])
def test_gram_is_the_sum_of_the_hessian_over_pairs_of_codes(inputs, levels, device, kernels_run):
    hessian = whole(-9, 9, inputs, inputs, seed=19)
    hessian = hessian + hessian.T
    codes = torch.randint(0, levels, (19, inputs), generator=seeded(20)).to(torch.uint8)
    codes[0] = levels - 1
    members = torch.nn.functional.one_hot(codes.long(), levels).double()
    gram = LevelGram(hessian.to(device))(codes.to(device), levels)
    assert kernels_run == ["sort_codes", "sum_hessian_rows", "sums_by_code"]
    same(gram, members.mT @ hessian.double() @ members)


def test_gram_of_256_levels_in_chunks_of_rows(device, kernels_run, monkeypatch):
    monkeypatch.setattr(solver_cuda, "_WORKSPACE_BYTES", 2 * 256 * 40 * 4)
    hessian = whole(-9, 9, 40, 40, seed=21)
    hessian = hessian + hessian.T
    codes = torch.randint(0, 256, (3, 40), generator=seeded(22)).to(torch.uint8)
    members = torch.nn.functional.one_hot(codes.long(), 256).double()
    same(LevelGram(hessian.to(device))(codes.to(device), 256), members.mT @ hessian.double() @ members)
    assert kernels_run.count("sum_hessian_rows") == 2


@pytest.mark.parametrize("levels", [2, 16, 100, 200])
def test_sums_by_code_are_exact(levels, device):
    values = whole(-(2**20), 2**20, 9, 70, seed=23)
    codes = torch.randint(0, levels, (9, 70), generator=seeded(24)).to(torch.uint8)
    expected = torch.zeros(9, levels, dtype=torch.float64).scatter_add_(1, codes.long(), values.double())
    assert torch.equal(on_host(solver.sums_by_code(codes.to(device), values.to(device), levels)), expected)


@pytest.mark.parametrize("levels", [1, 4, 16, 40])
def test_systems_are_solved(levels, device):
    factors = torch.randn(11, levels, levels + 5, generator=seeded(25))
    gram = factors @ factors.mT
    gram[0] *= 1e6
    gram[1, 0] = gram[1, :, 0] = 0
    right = torch.randn(11, levels, generator=seeded(26), dtype=torch.float64)
    solution, failures = solver.solve_levels(gram.to(device), right.to(device), ridge=1e-12, growth=100.0, attempts=5)
    assert failures == 0
    solution = on_host(solution)
    assert solution[1, 0] == 0
    rest = torch.arange(11) != 1
    expected = torch.linalg.solve(gram[rest].double(), right[rest])
    torch.testing.assert_close(solution[rest], expected, rtol=1e-6, atol=1e-9)


def test_indefinite_systems_try_a_stronger_ridge_and_are_counted(device):
    barely = torch.tensor([[1.0, 1.001], [1.001, 1.0]])
    hopeless = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    gram, right = torch.stack([barely, hopeless, torch.eye(2)]).to(device), torch.ones(3, 2).double().to(device)
    solution, failures = solver.solve_levels(gram, right, ridge=1e-5, growth=10.0, attempts=4)
    assert failures == 1
    ridge = 1e-5 * 10**3
    expected = torch.linalg.solve(barely.double() + ridge * torch.eye(2), torch.ones(2).double())
    torch.testing.assert_close(on_host(solution[0]), expected)
    assert torch.equal(solution[1], right[1]), "a row that fails keeps its right side"


def test_codes_are_looked_up_in_either_type(device):
    codes = torch.randint(0, 16, (5, 300), generator=seeded(27)).to(torch.uint8)
    levels, labels = torch.randn(5, 16), torch.randperm(16).to(torch.uint8).repeat(5, 1)
    found = solver.select_levels(codes.to(device), levels.to(device))
    assert torch.equal(on_host(found), levels.gather(1, codes.long()))
    assert torch.equal(on_host(solver.relabel(codes.to(device), labels.to(device))), labels.gather(1, codes.long()))


def test_fit_finds_the_levels_and_the_loss_of_float64(device, kernels_run):
    weight, hessian = problem(70, 60, device)
    table = torch.randn(70, 8, generator=seeded(28)).sort(dim=1).values.to(device)
    factor = factor_for_sweep(hessian, torch.arange(60, device=device), 0.01, torch.float32)
    assignment = sweep(weight, factor, LutRounder(Lut(values=table[:, None]), 60))
    fitted, loss = CodebookFit(weight, hessian).refit(table, assignment)
    assert {"sum_hessian_rows", "sums_by_code", "solve", "look_up"} <= set(kernels_run)
    expected = refit_codebook(table.double(), assignment.codes, assignment.error.double(), hessian.double())
    torch.testing.assert_close(fitted.dequantize().double(), expected.dequantize(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss, layer_loss(weight, fitted.dequantize(), hessian), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [2, 5, 40])
def test_kmeans_is_that_of_pytorch(levels, weighted, device, kernels_run, monkeypatch):
    rows = torch.randn(9, 300, generator=seeded(29)).to(device)
    rows[0] = 1.0
    rows[1, 3:] = rows[1, 0]  # three distinct values
    weights = rows[2].square().masked_fill(torch.arange(300, device=device) % 7 == 0, 0.0) if weighted else None
    native = kmeans_levels(rows, levels, 30, weights)
    assert kernels_run == ["cluster"]
    monkeypatch.setattr(solver_cuda_library.LIBRARY, "get", lambda: None)
    torch.testing.assert_close(native, kmeans_levels(rows, levels, 30, weights), rtol=1e-6, atol=1e-7)


# Cells of one window in shared memory and of two; values of one batch and of two.
@pytest.mark.parametrize(("cells", "values"), [(64, 600), (1100, 4500)])
@pytest.mark.parametrize("weighted", ["not", "alike", "apart"])
def test_kmeans_of_a_histogram_is_that_of_pytorch(weighted, cells, values, device, kernels_run, monkeypatch):
    rows = torch.randn(4, values, generator=seeded(32)).pow(3).to(device)
    rows[0, 5:] = rows[0, 0]
    weights = torch.rand(4, values, generator=seeded(33)).to(device)
    weights[:, ::5] = 0
    weights = {"not": None, "alike": weights[0], "apart": weights}[weighted]
    native = kmeans_levels(rows, 6, 20, weights, cells=cells)
    assert kernels_run == ["fill_cells", "cluster"]
    monkeypatch.setattr(solver_cuda_library.LIBRARY, "get", lambda: None)
    expected = kmeans_levels(rows, 6, 20, weights, cells=cells)
    torch.testing.assert_close(native, expected, rtol=1e-5, atol=1e-6)


def test_kmeans_of_few_values(device):
    for values in (torch.zeros(3, 1), torch.ones(2, 2), torch.tensor([[3.0, 1.0, 2.0]])):
        found = kmeans_levels(values.to(device), 4, 9)
        assert torch.equal(
            on_host(found).gather(1, (on_host(found) < values[:, :1]).sum(dim=1, keepdim=True)), values[:, :1]
        )


def everything(rows, device, inputs=140):
    """Results of all stages for a selection of rows."""
    weight, hessian = problem(70, inputs, device)
    table = torch.randn(70, 8, generator=seeded(30)).sort(dim=1).values.to(device)
    weight, table, order = weight[rows], table[rows], torch.arange(inputs, device=device)
    nearest = LutRounder(Lut(values=table[:, None]), inputs)
    swept = sweep(weight, factor_for_sweep(hessian, order, 0.01, torch.float32), nearest)
    descended = descend(weight, swept, hessian, order, nearest, sweeps=2)
    blocks = descend_in_blocks(weight, descended, table, hessian, order, passes=1, generator=seeded(31))
    gram = LevelGram(hessian)(blocks.codes, 8)
    right = solver.sums_by_code(blocks.codes, weight, 8)
    levels, _ = solver.solve_levels(gram, right, ridge=1e-7, growth=10.0, attempts=3)
    start = Codebooks(levels=table, codes=blocks.codes)
    jointly, _ = descend_jointly(weight, start, blocks.loss, hessian, order, CodebookFit(weight, hessian), passes=2)
    return [
        *(swept.codes, swept.error, swept.loss, descended.codes, descended.error, descended.loss),
        *(blocks.codes, blocks.error, blocks.loss, gram, right, levels, jointly.codes),
        *(relax(weight, hessian, order), kmeans_levels(weight, 8, 9, hessian.diagonal(), cells=16)),
    ]


def test_rows_do_not_depend_on_their_neighbours(device):
    rows = torch.tensor([3, 69, 40, 41, 5, 68])
    whole_layer, alone = everything(slice(None), device), everything(rows, device)
    assert all(torch.equal(found, result[rows]) for found, result in zip(alone, whole_layer, strict=True))


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch, each of which may be a launch. Random blocks are sorted on the CPU, one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is not torch.ops.aten.sort.default
        return function(*arguments, **(options or {}))


def test_number_of_launches_does_not_grow_with_the_layer(emulation, kernels_run):
    launches = []
    for rows, inputs in ((3, 68), (40, 260)):
        kernels_run.clear()
        with Operations() as operations:
            everything(slice(0, rows), torch.device("cpu"), inputs)
        launches.append((operations.count, list(kernels_run)))
    (small, few), (large, many) = launches
    assert few == many
    assert large < small + 20, "some matrices are copied 256 rows at a time, but nothing is done input by input"


def test_order_of_threads_does_not_change_a_bit(emulation):
    rows, device = slice(0, 34), torch.device("cpu")
    first = everything(rows, device)
    for order, seed in ((BACKWARD, 0), (RANDOM, 1)):
        emulation.emulation_set_order(order, seed)
        assert all(map(torch.equal, everything(rows, device), first))


@pytest.fixture
def guarded(emulation, monkeypatch):
    """Every operand of a kernel lies between pages that nobody may touch, for the length of a launch."""
    copies = []

    def copy(tensor):
        if tensor is None:
            return None
        address = emulation.emulation_allocate(max(tensor.nbytes, 1))
        memory = (ctypes.c_uint8 * tensor.nbytes).from_address(address)
        inside = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
        copies.append((tensor, inside, address))
        return address

    run = solver_cuda._run

    def run_and_copy_back(*arguments):
        run(*arguments)
        for tensor, inside, address in copies:
            tensor.copy_(inside)
            emulation.emulation_free(address, max(tensor.nbytes, 1))
        copies.clear()

    monkeypatch.setattr(solver_cuda, "_pointers", lambda *tensors: [copy(tensor) for tensor in tensors])
    monkeypatch.setattr(solver_cuda, "_run", run_and_copy_back)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 34)], ids=["one row", "ragged rows"])
def test_no_access_leaves_a_buffer(rows, guarded):
    everything(rows, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["table of 8", "table of 40", "grid of 4"])
def test_no_access_leaves_a_buffer_at_ragged_inputs(kind, guarded):
    rows, inputs = 3, 135
    weight, codebook = whole(-16, 16, rows, inputs) / 8, dyadic_codebook(kind, rows, groups=5)
    nearest, factor = rounder(codebook, inputs), dyadic_factor(inputs, "cpu", torch.float32)
    swept = sweep(weight, factor, nearest, block_size=50, enter_block=lambda columns, updated: None)
    descend(weight, swept, dyadic_hessian(inputs), torch.arange(inputs), nearest, sweeps=2)
    round_descending(weight, swept.error, dyadic_hessian(inputs), torch.arange(inputs), nearest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "inputs"), [(4096, 1024), (1000, 4099)])
def test_large_layers_end_where_pytorch_does(rows, inputs, monkeypatch):
    weight, hessian = problem(rows, inputs, torch.device("cuda"))
    order = hessian.diagonal().argsort(descending=True)
    factor = factor_for_sweep(hessian, order, 0.01, torch.float32)
    table = kmeans_levels(weight, 16, 10)

    def run():
        nearest = LutRounder(Lut(values=table[:, None]), inputs)
        swept = sweep(weight, factor, nearest)
        descended = descend(weight, swept, hessian, order, nearest, sweeps=2)
        _, loss = CodebookFit(weight, hessian).refit(table, descended)
        return swept.loss, descended.loss, loss

    found, again = run(), run()
    assert all(map(torch.equal, found, again))
    monkeypatch.setattr(solver_cuda_library.LIBRARY, "get", lambda: None)
    for native, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(native.sum(), expected.sum(), rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_work_goes_to_the_current_stream_and_into_graphs():
    error, hessian = problem(64, 256, torch.device("cuda"))
    order, stream = torch.arange(256, device="cuda"), torch.cuda.Stream()
    expected = relax(error, hessian, order)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Behind a long wait, the copy is still zero for any other stream.
        late = torch.zeros_like(error)
        torch.cuda._sleep(200_000_000)
        late.copy_(error)
        found = relax(late, hessian, order)
    stream.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = relax(late, hessian, order)
    late.copy_(2 * error)
    graph.replay()
    assert torch.equal(replayed, relax(late, hessian, order))


def test_access_outside_of_a_buffer_is_noticed(guarded):
    with pytest.raises(RuntimeError, match=r"look_up .* \(3, 5\) on cpu .* outside of a guarded buffer"):
        solver.select_levels(torch.full((3, 5), 255, dtype=torch.uint8), torch.randn(3, 4))


def test_function_without_a_kernel_has_a_message(emulation):
    values, sums = torch.zeros(2, 9, dtype=torch.float64), torch.zeros(2, 10, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cluster .* \(2, 9\) on cpu failed with status -1: not implemented"):
        solver.cluster(values, values, sums, sums, 300, 3, greedy=False)


def test_stages_need_the_library(emulation, monkeypatch):
    monkeypatch.setattr(solver_cuda_library.LIBRARY, "get", lambda: None)
    assert not solver.usable(torch.zeros(1))
    with pytest.raises(RuntimeError, match="not available"):
        solver.relax(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))


def test_every_stage_asks_where_its_operands_are():
    """One that did not would hand addresses of the device to the library for the CPU."""
    tree = ast.parse(Path(solver.__file__).read_text())
    public = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    stages = [ast.unparse(node) for node in public if "_library()" in ast.unparse(node)]
    assert len(stages) > 10
    assert all("_on_cuda" in stage or "self._cuda" in stage for stage in stages)


def test_library_takes_float32_on_one_device(emulation):
    assert solver.usable(torch.zeros(1), torch.zeros(2))
    assert not solver.usable(torch.zeros(1), torch.zeros(1).double())
    assert not solver.usable(torch.zeros(1), torch.zeros(1, device="meta"))


def test_state_of_the_library_is_reported():
    assert "solver-cuda" in status()
