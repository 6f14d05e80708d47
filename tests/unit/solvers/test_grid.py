import pytest
import torch

import quantlab.solvers.grid as grid_module
from quantlab.api import CodebookSpec
from quantlab.solvers.grid import ClipSearch, fit_grid, minmax_grid, round_to_grid, round_to_nearest
from quantlab.solvers.options import check_choice


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_asymmetric_grid_follows_its_formula():
    grid = minmax_grid(torch.tensor([[-1.0, 0.5, 2.0]]), CodebookSpec(bits=2))
    assert grid.scale.tolist() == [[1.0]]
    assert grid.zero.tolist() == [[1.0]]
    assert grid.levels().tolist() == [[[-1.0, 0.0, 1.0, 2.0]]]


def test_range_is_widened_to_contain_zero():
    levels = minmax_grid(torch.tensor([[3.0, 6.0], [-6.0, -3.0]]), CodebookSpec(bits=2)).levels()
    assert levels[:, 0].tolist() == [[0.0, 2.0, 4.0, 6.0], [-6.0, -4.0, -2.0, 0.0]]


def test_symmetric_grid_follows_its_formula():
    grid = minmax_grid(torch.tensor([[-3.0, 1.0]]), CodebookSpec(bits=2), symmetric=True)
    assert grid.levels().tolist() == [[[-4.0, -2.0, 0.0, 2.0]]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_no_weight_is_farther_from_its_level_than_the_grid_allows(bits, group_size, symmetric):
    weight = normal(5, 32)
    layer = round_to_nearest(weight, CodebookSpec(bits=bits, group_size=group_size), symmetric=symmetric)
    step = layer.codebook.scale.repeat_interleave(group_size or 32, dim=1)
    # A rounded zero shifts an asymmetric grid by up to half a step against the range.
    allowed = step / 2 if symmetric else step
    rounding = 1e-6 * weight.abs()
    assert ((layer.dequantize() - weight).abs() <= allowed + rounding).all()


def test_every_weight_gets_the_nearest_level():
    weight = normal(5, 32)
    layer = round_to_nearest(weight, CodebookSpec(bits=3, group_size=16))
    levels = layer.codebook.levels().repeat_interleave(16, dim=1)
    nearest = (weight[..., None] - levels).abs().amin(dim=2)
    torch.testing.assert_close((weight - layer.dequantize()).abs(), nearest)


def test_zero_is_exact():
    weight = normal(6, 20)
    weight[:, ::3] = 0
    for symmetric in (False, True):
        layer = round_to_nearest(weight, CodebookSpec(bits=3), symmetric=symmetric)
        assert (layer.dequantize()[:, ::3] == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-45])
def test_constant_rows_have_a_positive_scale_and_are_exact(value):
    layer = round_to_nearest(torch.full((1, 6), value), CodebookSpec(bits=4))
    assert (layer.codebook.scale > 0).all()
    torch.testing.assert_close(layer.dequantize(), torch.full((1, 6), value))


def test_groups_are_rows_of_their_own():
    weight = normal(3, 24)
    grouped = round_to_nearest(weight, CodebookSpec(bits=3, group_size=8))
    stacked = round_to_nearest(weight.view(9, 8), CodebookSpec(bits=3))
    assert torch.equal(grouped.codes.view(9, 8), stacked.codes)
    assert torch.equal(grouped.dequantize().view(9, 8), stacked.dequantize())


def test_half_precision_weights_are_rounded_in_single_precision():
    weight = normal(4, 16).bfloat16()
    half = round_to_nearest(weight, CodebookSpec(bits=8))
    assert torch.equal(half.dequantize(), round_to_nearest(weight.float(), CodebookSpec(bits=8)).dequantize())
    assert half.codebook.scale.dtype == torch.float32


def test_double_precision_grids_are_stored_in_single_precision():
    weight = normal(4, 16).double()
    assert minmax_grid(weight, CodebookSpec(bits=3)).scale.dtype == torch.float64
    assert round_to_nearest(weight, CodebookSpec(bits=3)).dequantize().dtype == torch.float32


def criterion(weight, grid, clip_search, diagonal):
    error = (weight - round_to_grid(weight, grid).dequantize()).abs().double()
    penalty = error**2.4 if clip_search == "weight" else error**2 * diagonal
    return penalty.view(*grid.scale.shape, -1).sum(dim=2)


def naive_search(values, bits, symmetric, clip_search, diagonal):
    """The least criterion over all fractions of the range of one group, by the formulas of the module, in Python."""
    top, totals = 2**bits - 1, []
    for percent in range(100, 20, -1):
        low, high = percent / 100 * min(0.0, *values), percent / 100 * max(0.0, *values)
        scale = 2 * max(-low, high) / top if symmetric else (high - low) / top
        zero = 2 ** (bits - 1) if symmetric else round(-low / scale)
        rounded = [(min(max(round(value / scale) + zero, 0), top) - zero) * scale for value in values]
        errors = [abs(value - level) for value, level in zip(values, rounded, strict=True)]
        penalties = [e**2.4 if clip_search == "weight" else h * e**2 for e, h in zip(errors, diagonal, strict=True)]
        totals.append(sum(penalties))
    return min(totals)


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, None), (3, 8)])
def test_clip_search_finds_the_best_fraction_of_every_group(bits, group_size, symmetric, clip_search):
    weight, diagonal = normal(4, 24).double(), normal(24, seed=1).double().exp()
    grid = fit_grid(
        weight, CodebookSpec(bits=bits, group_size=group_size), clip_search, symmetric=symmetric,
        hessian_diagonal=diagonal,
    )  # fmt: skip
    size = group_size or 24
    expected = [
        naive_search(values.tolist(), bits, symmetric, clip_search, diagonal.view(-1, size)[group].tolist())
        for row in weight.view(4, -1, size)
        for group, values in enumerate(row)
    ]
    found = criterion(weight, grid, clip_search, diagonal)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clip_search_is_never_worse_than_none_in_its_own_criterion(bits, symmetric, clip_search):
    weight = normal(32, 64) * normal(32, 64, seed=1).abs()  # heavy tails
    diagonal, spec = normal(64, seed=2).exp(), CodebookSpec(bits=bits, group_size=16)
    searched = fit_grid(weight, spec, clip_search, symmetric=symmetric, hessian_diagonal=diagonal)
    full = minmax_grid(weight, spec, symmetric=symmetric)
    after, before = (criterion(weight, grid, clip_search, diagonal) for grid in (searched, full))
    assert (after <= before * (1 + 1e-5)).all()
    assert bits == 8 or after.sum() < before.sum()  # a step of 8 bits is too fine to be worth clipping for


def test_no_clip_search_is_the_min_max_grid():
    weight, spec = normal(4, 24), CodebookSpec(bits=2)
    assert torch.equal(fit_grid(weight, spec, "none").scale, minmax_grid(weight, spec).scale)


def test_inputs_without_energy_do_not_take_part_in_the_search():
    weight, diagonal = normal(6, 24), normal(24, seed=1).exp()
    diagonal[::2] = 0
    noisy = weight.clone()
    noisy[:, ::2] *= 0.5
    noisy[:, 0] = weight.amin(dim=1)  # the range stays the same
    noisy[:, 2] = weight.amax(dim=1)
    grids = [fit_grid(w, CodebookSpec(bits=2), "hessian", hessian_diagonal=diagonal) for w in (weight, noisy)]
    assert torch.equal(grids[0].scale, grids[1].scale)


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
def test_fractions_on_a_tie_give_the_full_range(clip_search):
    spec, silence = CodebookSpec(bits=2), torch.zeros(24)
    exact = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(2, 6)
    for weight in (exact, torch.zeros(2, 24), normal(2, 24) if clip_search == "hessian" else exact):
        grid = fit_grid(weight, spec, clip_search, hessian_diagonal=silence)
        assert torch.equal(grid.scale, minmax_grid(weight, spec).scale)


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
def test_clip_search_does_not_depend_on_the_scale_of_weight_or_hessian(clip_search):
    weight, diagonal, spec = normal(8, 32), normal(32, seed=1).exp(), CodebookSpec(bits=3)
    scale = fit_grid(weight, spec, clip_search, hessian_diagonal=diagonal).scale
    for factor in (2.0**-60, 2.0**60):
        scaled = fit_grid(weight * factor, spec, clip_search, hessian_diagonal=diagonal * factor)
        assert torch.equal(scaled.scale, scale * factor)


def test_searching_with_the_hessian_needs_its_diagonal():
    with pytest.raises(ValueError, match="hessian_diagonal"):
        fit_grid(normal(2, 4), CodebookSpec(bits=2), "hessian")


def test_unknown_clip_searches_are_refused():
    with pytest.raises(ValueError, match="none, weight, hessian"):
        check_choice("clip_search", "mse", ClipSearch)


@pytest.mark.parametrize("group_size", [None, 8])
def test_clip_search_does_not_depend_on_how_many_rows_are_searched_at_a_time(group_size, monkeypatch):
    weight, spec = normal(7, 32), CodebookSpec(bits=2, group_size=group_size)
    at_once = fit_grid(weight, spec, "weight")
    monkeypatch.setattr(grid_module, "_CHUNK_ELEMENTS", 64)
    in_parts = fit_grid(weight, spec, "weight")
    assert torch.equal(in_parts.scale, at_once.scale)
    assert torch.equal(in_parts.zero, at_once.zero)
