import pytest
import torch

from quantlab.api import CodebookSpec, Lut
from quantlab.solvers.grid import minmax_grid
from quantlab.solvers.nearest import GridRounder, LutRounder, nearest_codes


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lut(out_features, groups, levels):
    return Lut(values=normal(out_features, groups, levels, seed=1).sort(dim=2).values)


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_codes_select_the_nearest_entry(levels):
    weight, table = normal(5, 12), lut(5, 3, levels)
    expected = (weight.view(5, 3, 4, 1) - table.values[:, :, None]).abs().argmin(dim=3).view(5, 12)
    codes = nearest_codes(weight, table)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_columns_are_rounded_as_the_whole_matrix_is(groups):
    weight, table = normal(5, 12), lut(5, groups, 8)
    grid = minmax_grid(weight, CodebookSpec(bits=3, group_size=12 // groups))
    for rounder, codebook in ((LutRounder(table, 12), table), (GridRounder(grid, 12), grid)):
        codes = nearest_codes(weight, codebook)
        selected = codebook.levels().gather(2, codes.view(5, groups, -1).long()).view(5, 12)
        for column in range(12):
            column_codes, levels = rounder(column, weight[:, column].contiguous())
            assert torch.equal(column_codes.to(torch.uint8), codes[:, column])
            assert torch.equal(levels, selected[:, column])


def test_ties_go_to_the_lower_entry():
    table = Lut(values=torch.tensor([[[0.0, 1.0, 1.0, 2.0]]]))
    assert nearest_codes(torch.tensor([[0.5, 1.0, 1.5, 9.0]]), table).tolist() == [[0, 1, 2, 3]]


def test_values_outside_a_grid_get_its_ends():
    weight = torch.tensor([[-1.0, 2.0]])
    grid = minmax_grid(weight, CodebookSpec(bits=2))
    assert nearest_codes(torch.tensor([[-50.0, 50.0]]), grid).tolist() == [[0, 3]]


def test_tables_that_do_not_ascend_are_refused():
    table = Lut(values=torch.tensor([[[0.0, 2.0, 1.0, 3.0]]]))
    with pytest.raises(ValueError, match="ascend"):
        nearest_codes(torch.zeros(1, 1), table)
    with pytest.raises(ValueError, match="ascend"):
        LutRounder(table, 1)


def test_transposed_weights_give_contiguous_codes():
    weight, table = normal(12, 5).T, lut(5, 3, 4)
    grid = minmax_grid(weight, CodebookSpec(bits=2, group_size=4))
    for codebook in (table, grid):
        codes = nearest_codes(weight, codebook)
        assert codes.is_contiguous()
        assert torch.equal(codes, nearest_codes(weight.contiguous(), codebook))
