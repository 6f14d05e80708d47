import pytest
import torch

from quantlab.api import CodebookSpec
from quantlab.solvers.grid import minmax_grid, round_to_nearest


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
