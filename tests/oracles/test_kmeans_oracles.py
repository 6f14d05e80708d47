"""k-means against the exact optimum by dynamic programming."""

import pytest
import torch

from quantlab.solvers.kmeans import kmeans_levels


def squared_error(rows, levels, weights=1.0):
    return ((rows[..., None] - levels[:, None]).abs().amin(dim=2).square() * weights).sum(dim=1)


def optimal_squared_error(row, levels, weights=None):
    """Clusters of sorted values are intervals: best[k][j] is the least error of the first j values in k intervals."""
    values, order = row.sort()
    weights = (torch.ones_like(row) if weights is None else weights)[order].tolist()
    values, n = values.tolist(), len(values)

    def cost(i, j):
        members = list(zip(values[i:j], weights[i:j], strict=True))
        mass = sum(weight for _, weight in members)
        mean = sum(value * weight for value, weight in members) / mass if mass else 0.0
        return sum(weight * (value - mean) ** 2 for value, weight in members)

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


def skewed_weights(count, size, power, seed=1):
    """Weights over several orders of magnitude, as powers of second moments are."""
    return normal_rows(count, size, seed).mul(power).exp()


@pytest.mark.parametrize("power", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_weighted_error_is_between_the_optimum_and_a_little_more(levels, power):
    rows, weights = normal_rows(20, 32), skewed_weights(20, 32, power)
    pairs = zip(rows, weights, strict=True)
    optimum = torch.tensor([optimal_squared_error(row, levels, part) for row, part in pairs], dtype=torch.float64)
    found = squared_error(rows, kmeans_levels(rows, levels, 50, weights), weights)
    assert (found >= optimum * (1 - 1e-9)).all()
    assert (found / optimum).mean() < 1.05
    unweighted = squared_error(rows, kmeans_levels(rows, levels, 50), weights)
    assert (unweighted / optimum).mean() > (found / optimum).mean()


@pytest.mark.parametrize("power", [1.0, 8.0])
def test_separated_clusters_have_their_weighted_means_as_levels(power):
    centers = torch.tensor([-9.0, -2.0, 3.0, 10.0], dtype=torch.float64)
    rows = (centers[:, None] + normal_rows(4, 25) / 10).flatten()[None]
    weights = skewed_weights(1, 100, power)
    levels = kmeans_levels(rows, 4, 50, weights)
    clusters, parts = rows.view(4, 25), weights.view(4, 25)
    torch.testing.assert_close(levels[0], (clusters * parts).sum(dim=1) / parts.sum(dim=1), rtol=1e-9, atol=0)
    optimum = optimal_squared_error(rows[0], 4, weights[0])
    assert squared_error(rows, levels, weights).item() == pytest.approx(optimum, rel=1e-9)


def test_weighted_levels_are_the_weighted_means_of_their_nearest_values():
    rows, weights = normal_rows(5, 200), skewed_weights(5, 200, 2.0)
    levels = kmeans_levels(rows, 8, 1000, weights)
    nearest = (rows[..., None] - levels[:, None]).abs().argmin(dim=2)
    for level in range(8):
        members = weights * (nearest == level)
        means = (rows * members).sum(dim=1) / members.sum(dim=1)
        torch.testing.assert_close(levels[:, level], means, rtol=1e-9, atol=1e-9)


def test_a_whole_weight_counts_as_that_many_values():
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(1, 5, (24,), generator=generator)
    row = normal_rows(1, 24)
    repeated = row.repeat_interleave(counts, dim=1)
    for levels in (2, 4):
        weighted = squared_error(repeated, kmeans_levels(row, levels, 100, counts.double()))
        by_repetition = squared_error(repeated, kmeans_levels(repeated, levels, 100))
        optimum = optimal_squared_error(repeated[0], levels)
        assert weighted.item() == pytest.approx(optimum, rel=0.2)
        assert by_repetition.item() == pytest.approx(optimum, rel=0.2)


@pytest.mark.parametrize("levels", [3, 16])
def test_values_without_weight_are_as_good_as_absent(levels):
    rows, weights = normal_rows(6, 64), skewed_weights(6, 64, 2.0)
    silent = torch.arange(64) % 3 == 0
    expected = kmeans_levels(rows[:, ~silent], levels, 50, weights[:, ~silent])
    rows[:, silent] = 1e3 * normal_rows(6, int(silent.sum()), seed=5)
    torch.testing.assert_close(kmeans_levels(rows, levels, 50, weights * ~silent), expected, rtol=1e-12, atol=1e-12)


def test_few_values_with_weight_are_represented_exactly():
    rows = normal_rows(8, 100)
    weights = skewed_weights(8, 100, 3.0) * (torch.arange(100) % 10 == 4)
    assert (squared_error(rows, kmeans_levels(rows, 10, 50, weights), weights) == 0).all()


@pytest.mark.parametrize("levels", [2, 4])
def test_weights_over_many_orders_of_magnitude_are_no_obstacle(levels):
    rows, weights = normal_rows(8, 32), skewed_weights(8, 32, 20.0)
    assert weights.amax() / weights.amin() > 1e30
    found = kmeans_levels(rows, levels, 50, weights)
    assert (found >= rows.amin(dim=1, keepdim=True)).all()
    assert (found <= rows.amax(dim=1, keepdim=True)).all()
    pairs = zip(rows, weights, strict=True)
    optimum = torch.tensor([optimal_squared_error(row, levels, part) for row, part in pairs], dtype=torch.float64)
    assert (squared_error(rows, found, weights) / optimum).mean() < 1.05


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [4, 8, 16])
def test_a_histogram_costs_less_than_a_tenth_of_error_even_with_a_far_value(levels, weighted):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2048, generator=generator)
    rows[1, 7] = 60.0
    rows[2] = rows[2].sign() * rows[2].abs() ** 1.7
    weights = torch.randn(2048, generator=generator).exp() if weighted else None

    def error(table):
        distance = (rows - table.gather(1, torch.searchsorted(table[:, 1:] + table[:, :-1], 2 * rows))).square()
        return (distance * (1.0 if weights is None else weights)).sum(dim=1)

    exact, coarse = (error(kmeans_levels(rows, levels, 50, weights, cells=cells)) for cells in (None, 256))
    assert (coarse <= 1.1 * exact).all()
    assert not torch.equal(exact, coarse)


def test_a_histogram_does_not_depend_on_scale_and_short_rows_have_none():
    rows = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    table = kmeans_levels(rows, 8, 50, cells=256)
    assert torch.equal(kmeans_levels(rows * 2.0**-20, 8, 50, cells=256), table * 2.0**-20)
    short = rows[:, :1023]
    assert torch.equal(kmeans_levels(short, 8, 50, cells=256), kmeans_levels(short, 8, 50))


def test_histograms_of_constant_rows_are_finite_and_exact():
    rows = torch.tensor([0.0, 0.3, -7.0])[:, None].repeat(1, 1024)
    table = kmeans_levels(rows, 4, 50, cells=256)
    torch.testing.assert_close(table, rows[:, :4])
