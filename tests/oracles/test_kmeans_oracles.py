"""k-means against the exact optimum by dynamic programming."""

import pytest
import torch

from quantlab.solvers.kmeans import kmeans_levels


def squared_error(rows, levels):
    return (rows[..., None] - levels[:, None]).abs().amin(dim=2).square().sum(dim=1)


def optimal_squared_error(row, levels):
    """Clusters of sorted values are intervals: best[k][j] is the least error of the first j values in k intervals."""
    values = row.sort().values.tolist()
    n = len(values)

    def cost(i, j):
        mean = sum(values[i:j]) / (j - i)
        return sum((value - mean) ** 2 for value in values[i:j])

    costs = {(i, j): cost(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    best = [0.0] + [float("inf")] * n
    for _ in range(levels):
        best = [0.0] + [min(best[i] + costs[i, j] for i in range(j)) for j in range(1, n + 1)]
    return best[n]


def normal_rows(count, size, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_error_is_between_the_optimum_and_a_little_more(levels):
    rows = normal_rows(20, 32)
    optimum = torch.tensor([optimal_squared_error(row, levels) for row in rows], dtype=torch.float64)
    found = squared_error(rows, kmeans_levels(rows, levels, iterations=50))
    assert (found >= optimum * (1 - 1e-12)).all()
    assert (found / optimum).mean() < 1.15


def test_separated_clusters_are_found_exactly():
    centers = torch.tensor([-9.0, -2.0, 3.0, 11.0], dtype=torch.float64)
    rows = centers.repeat(6, 9) + 0.1 * normal_rows(6, 36)
    optimum = torch.tensor([optimal_squared_error(row, 4) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(squared_error(rows, kmeans_levels(rows, 4, iterations=50)), optimum, rtol=1e-10, atol=0)


def test_every_level_is_the_mean_of_the_values_nearest_to_it():
    rows = normal_rows(4, 200)
    levels = kmeans_levels(rows, 8, iterations=1000)
    nearest = (rows[..., None] - levels[:, None]).abs().argmin(dim=2)
    for level in range(8):
        members = nearest == level
        means = (rows * members).sum(dim=1) / members.sum(dim=1)
        torch.testing.assert_close(levels[:, level], means, rtol=1e-10, atol=1e-12)


def test_more_iterations_never_raise_the_error():
    rows = normal_rows(8, 300)
    errors = torch.stack([squared_error(rows, kmeans_levels(rows, 8, iterations)) for iterations in range(1, 12)])
    assert (errors.diff(dim=0) <= 1e-12).all()
    assert (errors[-1] < errors[0]).all()


@pytest.mark.parametrize(("distinct", "levels"), [(1, 4), (3, 4), (4, 4), (16, 16), (5, 256)])
def test_few_distinct_values_are_represented_exactly_however_often_they_repeat(distinct, levels):
    generator = torch.Generator().manual_seed(distinct)
    values = torch.randn(10, distinct, generator=generator)
    # The first value takes nearly all places, which starves starts at quantiles.
    places = torch.cat([torch.arange(distinct), torch.zeros(200, dtype=torch.long)])
    rows = values[:, places]
    assert (squared_error(rows, kmeans_levels(rows, levels, iterations=50)) == 0).all()


def test_distinct_values_close_together_are_kept_apart():
    rows = torch.tensor([[0.0, 1.0, 2.0, 2.000001, 2.000002], [0.0, 0.000001, 0.000002, 1.0, 2.0]]).repeat(1, 5)
    assert (squared_error(rows, kmeans_levels(rows, 5, iterations=50)) == 0).all()


@pytest.mark.parametrize("levels", [16, 256])
def test_error_is_below_that_of_a_uniform_grid(levels):
    rows = normal_rows(8, 1024)
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    uniform = low + (high - low) * torch.linspace(0, 1, levels, dtype=torch.float64)
    assert (squared_error(rows, kmeans_levels(rows, levels, iterations=50)) < squared_error(rows, uniform) / 1.3).all()


def test_rows_do_not_depend_on_their_neighbours(monkeypatch):
    rows = normal_rows(10, 64)
    whole = kmeans_levels(rows, 4, iterations=3)
    monkeypatch.setattr("quantlab.solvers.kmeans._CHUNK_ELEMENTS", 3 * 64)
    assert torch.equal(kmeans_levels(rows, 4, iterations=3), whole)


@pytest.mark.parametrize("levels", [4, 16, 64])
def test_one_outlier_costs_one_level(levels):
    rows = normal_rows(8, 512)
    with_outlier = torch.cat([rows, torch.full((8, 1), 1e4, dtype=torch.float64)], dim=1)
    error = squared_error(with_outlier, kmeans_levels(with_outlier, levels, iterations=50)).sum()
    assert error < 1.05 * squared_error(rows, kmeans_levels(rows, levels - 1, iterations=50)).sum()
