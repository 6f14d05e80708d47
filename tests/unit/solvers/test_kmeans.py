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


def test_equal_weights_are_one_whatever_their_size_and_not_worse_than_none():
    rows = normal(6, 100)
    expected = kmeans_levels(rows, 8, 50, torch.ones(100))
    for weights in (torch.full((100,), 0.3), torch.full((6, 100), 7), torch.zeros(100)):
        assert torch.equal(kmeans_levels(rows, 8, 50, weights), expected)
    errors = [
        (rows[..., None] - levels[:, None]).abs().amin(dim=2).square().sum(dim=1)
        for levels in (expected, kmeans_levels(rows, 8, 50))
    ]
    assert (errors[0] <= errors[1]).all()


def test_one_row_of_weights_serves_all_rows():
    rows, weights = normal(6, 100), normal(100).exp()
    assert torch.equal(kmeans_levels(rows, 8, 50, weights), kmeans_levels(rows, 8, 50, weights.repeat(6, 1)))


def test_only_ratios_of_weights_count_row_by_row():
    rows, weights = normal(6, 100), normal(6, 100).exp()
    scale = torch.tensor([2.0**-60, 1.0, 2.0, 4.0, 2.0**40, 2.0**80])[:, None]
    assert torch.equal(kmeans_levels(rows, 8, 50, weights * scale), kmeans_levels(rows, 8, 50, weights))


def test_order_of_weighted_values_does_not_matter_even_if_they_are_equal():
    rows, weights = normal(3, 60).mul(3).round(), normal(3, 60).exp() * (torch.arange(60) % 4 > 0)
    shuffle = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = kmeans_levels(rows[:, shuffle], 8, 50, weights[:, shuffle])
    assert torch.equal(shuffled, kmeans_levels(rows, 8, 50, weights))


def test_weighted_rows_do_not_depend_on_their_neighbours(monkeypatch):
    rows, weights = normal(10, 64), normal(10, 64).exp()
    whole = kmeans_levels(rows, 4, 3, weights)
    monkeypatch.setattr("quantlab.solvers.kmeans._CHUNK_ELEMENTS", 3 * 64)
    assert torch.equal(kmeans_levels(rows, 4, 3, weights), whole)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_negative_or_not_finite_are_refused(wrong):
    weights = torch.ones(10)
    weights[3] = wrong
    with pytest.raises(ValueError, match="must be finite and not negative"):
        kmeans_levels(normal(2, 10), 4, 5, weights)
