import pytest
import torch

from quantlab.solvers.kmeans import kmeans_levels


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_levels_ascend_inside_the_range_of_the_row(levels):
    rows = normal(6, 100)
    found = kmeans_levels(rows, levels, iterations=50)
    assert found.shape == (6, levels)
    assert (found.diff(dim=1) >= 0).all()
    assert (found >= rows.amin(dim=1, keepdim=True)).all()
    assert (found <= rows.amax(dim=1, keepdim=True)).all()


def test_precision_of_the_rows_is_kept():
    assert kmeans_levels(normal(2, 10), 4, 5).dtype == torch.float32
    assert kmeans_levels(normal(2, 10).double(), 4, 5).dtype == torch.float64


def test_order_of_values_does_not_matter():
    rows = normal(3, 50)
    assert torch.equal(kmeans_levels(rows.flip(1), 8, 50), kmeans_levels(rows, 8, 50))


def test_transposed_rows_are_accepted():
    rows = normal(50, 3).T
    assert torch.equal(kmeans_levels(rows, 8, 50), kmeans_levels(rows.contiguous(), 8, 50))


def test_one_far_value_does_not_spoil_the_others():
    rows = normal(4, 256)
    rows[:, 0] = 1e4
    found = kmeans_levels(rows, 16, iterations=50)
    distance = (rows[:, 1:, None] - found[:, None]).abs().amin(dim=2)
    assert (found[:, -1] == 1e4).all()
    assert (distance.square().mean(dim=1) < 0.03).all()
