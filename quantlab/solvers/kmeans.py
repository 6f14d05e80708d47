"""One-dimensional k-means of every row at once, with or without a weight for each value.

On a sorted row the clusters are intervals, and prefix sums give their means; one Lloyd iteration costs a
binary search per boundary, O(levels log in_features) per row, whatever the number of values in a cluster.

Sorting long rows then takes most of the time. Where the levels are only a start for a method that refits them, a
histogram does instead: the values of a cell count as one value, their mean, with their weights summed.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantlab_kernels import solver

_CHUNK_ELEMENTS = 1 << 20  # sorted values, weights, prefix sums and their indices: about 80 bytes each
_CAP_ROUNDS = 8
_CHUNK_ELEMENTS_IN_CELLS = 1 << 17  # a histogram is made in a core's cache
_VALUES_PER_CELL = 4
_COMPANDING = 3.0  # standard deviations at which a cell is four times as wide as in the middle


def kmeans_levels(
    rows: Tensor, levels: int, iterations: int, weights: Tensor | None = None, *, cells: int | None = None
) -> Tensor:
    """Cluster the values of each row by Lloyd's algorithm.

    Lloyd's algorithm stops at the nearest local optimum, so the start decides. Several are tried, and every row keeps
    the best: equally spaced levels, which bound the squared error by that of the uniform grid; and, because with many
    levels their best density is the cube root of the (weighted) density of values (Panter & Dite 1951), its quantiles,
    moved apart to distinct values of the row. Weights over orders of magnitude have no density to speak of, so with
    weights there is a third: one level after the other at the value whose error costs most by then. A row with no more
    distinct values than levels is represented exactly.

    Args:
        rows: (rows, values) floating point.
        levels: clusters per row.
        iterations: upper limit; stops earlier when nothing changes.
        weights: (rows, values) or (values,), not negative: the factor of each squared error. Only ratios within a row
            count. A value of weight 0 attracts no level; in a row of nothing else all weights count as equal.
        cells: cluster a histogram with this many cells in place of rows that have many more values than that. Fast
            and a little less exact; rows of few distinct values are no longer sure to be represented exactly.

    Returns:
        (rows, levels) ascending cluster means in the dtype of `rows`. A cluster that runs empty keeps its last value.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    if cells is not None and rows.shape[1] < _VALUES_PER_CELL * cells:
        cells = None
    if weights is not None:
        _check(weights)
    if cells is not None and solver.usable(rows):
        shares = None if weights is None else weights.float()
        operands = (rows, shares, levels, iterations)
        return _finished(solver.cluster_in_cells(*operands, cells=cells, greedy=weights is not None), rows)
    rows_per_chunk = max(1, (_CHUNK_ELEMENTS if cells is None else _CHUNK_ELEMENTS_IN_CELLS) // rows.shape[1])
    chunks = torch.split(rows, rows_per_chunk)
    if weights is None and cells is None:
        ordered = (_unweighted(chunk) for chunk in chunks)
    else:
        parts = torch.split((rows.new_ones(()) if weights is None else weights).expand_as(rows), rows_per_chunk)
        prepare = _weighted if cells is None else partial(_histogram, cells=cells)
        ordered = (prepare(chunk, part) for chunk, part in zip(chunks, parts, strict=True))
    found = [_cluster(chunk, levels, iterations, greedy=weights is not None) for chunk in ordered]
    return _finished(torch.cat(found), rows)


def _finished(centers: Tensor, rows: Tensor) -> Tensor:
    # Rounding in the prefix sums can put two nearly equal means in the wrong order.
    return centers.to(rows.dtype).sort(dim=1).values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ordered:
    """Ascending values with their weights, both (rows, values) float64, and with prefix sums from the left.

    `mass` sums the weights and `moment` the weighted values: (rows, values + 1).
    """

    values: Tensor
    weights: Tensor
    mass: Tensor
    moment: Tensor


def _unweighted(rows: Tensor) -> _Ordered:
    values = rows.double().contiguous().sort(dim=1).values
    return _with_prefix_sums(values, torch.ones_like(values))


def _weighted(rows: Tensor, weights: Tensor) -> _Ordered:
    values, weights = rows.double(), _relative(weights.double())
    # Values without weight hide behind the largest one with weight: no gap, no distinct value and no range is theirs.
    largest = values.masked_fill(weights == 0, -torch.inf).amax(dim=1, keepdim=True)
    values = torch.where(weights > 0, values, largest)
    # Among equal values the heaviest come first, so that neither the order of the row nor hidden values matter.
    weights, by_weight = weights.sort(dim=1, descending=True, stable=True)
    values, by_value = values.gather(1, by_weight).sort(dim=1, stable=True)
    return _with_prefix_sums(values, weights.gather(1, by_value))


def _histogram(rows: Tensor, weights: Tensor, cells: int) -> _Ordered:
    """The cells' means and total weights, ascending; an empty cell repeats a neighbour's value, without weight."""
    rows, weights = rows.double(), _relative(weights.float()).double()
    spread, middle = torch.std_mean(rows, dim=1, keepdim=True)
    # Cells widen towards the tails, so that far values share cells among themselves only and take none from the rest.
    centred = (rows - middle) / (_COMPANDING * torch.where(spread > 0, spread, 1.0))
    cell = (centred / (1 + centred.abs())).add_(1).mul_(cells / 2).long().clamp_(0, cells - 1)
    mass = rows.new_zeros(len(rows), cells).scatter_add_(1, cell, weights)
    moment = rows.new_zeros(len(rows), cells).scatter_add_(1, cell, weights * rows)
    means = torch.where(mass > 0, moment / mass, -torch.inf).cummax(dim=1).values
    smallest = means.masked_fill(mass == 0, torch.inf).amin(dim=1, keepdim=True)
    return _with_prefix_sums(torch.maximum(means, smallest), mass)


def _relative(weights: Tensor) -> Tensor:
    """Weights as shares of the largest in their row; all 1 if that is 0."""
    heaviest = weights.amax(dim=1, keepdim=True)
    return torch.where(heaviest > 0, weights / torch.where(heaviest > 0, heaviest, 1.0), 1.0)


def _with_prefix_sums(values: Tensor, weights: Tensor) -> _Ordered:
    mass = pad(weights.cumsum(dim=1), (1, 0))
    moment = pad((weights * values).cumsum(dim=1), (1, 0))
    return _Ordered(values=values, weights=weights, mass=mass, moment=moment)


def _cluster(ordered: _Ordered, levels: int, iterations: int, *, greedy: bool) -> Tensor:
    """The best of Lloyd's algorithm from all starts: (rows, levels) float64."""
    if solver.usable(ordered.values, dtype=torch.float64):
        operands = (ordered.values, ordered.weights, ordered.mass, ordered.moment)
        return solver.cluster(*operands, levels, iterations, greedy=greedy)
    starts = [_companded_start(ordered, levels), _uniform_start(ordered, levels)]
    if greedy:
        starts.append(_greedy_start(ordered, levels))
    best = _lloyd(ordered, starts[0], iterations)
    least = _squared_error(ordered, best)
    for start in starts[1:]:
        centers = _lloyd(ordered, start, iterations)
        error = _squared_error(ordered, centers)
        best = torch.where((error < least)[:, None], centers, best)
        least = torch.minimum(error, least)
    return best


def _lloyd(ordered: _Ordered, centers: Tensor, iterations: int) -> Tensor:
    size = ordered.values.shape[1]
    for _ in range(iterations):
        inner_edges = torch.searchsorted(ordered.values, _midpoints(centers), right=True)
        edges = pad(pad(inner_edges, (1, 0)), (0, 1), value=size)
        mass = ordered.mass.gather(1, edges).diff(dim=1)
        means = ordered.moment.gather(1, edges).diff(dim=1) / mass
        # The difference of prefix sums is rounded relative to the whole sum, which a light cluster may not survive.
        smallest = ordered.values.gather(1, edges[:, :-1].clamp(max=size - 1))
        largest = ordered.values.gather(1, (edges[:, 1:] - 1).clamp(min=0))
        updated = torch.where(mass > 0, means.clamp(smallest, largest), centers)
        if torch.equal(updated, centers):
            break
        centers = updated
    return centers


def _squared_error(ordered: _Ordered, centers: Tensor) -> Tensor:
    nearest = centers.gather(1, torch.searchsorted(_midpoints(centers), ordered.values))
    return ((ordered.values - nearest).square() * ordered.weights).sum(dim=1)


def _midpoints(centers: Tensor) -> Tensor:
    return (centers[:, :-1] + centers[:, 1:]) / 2


def _uniform_start(ordered: _Ordered, levels: int) -> Tensor:
    lowest, highest = ordered.values[:, :1], ordered.values[:, -1:]
    return lowest + (highest - lowest) * torch.arange(levels, device=lowest.device) / (levels - 1)


def _companded_start(ordered: _Ordered, levels: int) -> Tensor:
    gaps = ordered.values.diff(dim=1)
    # The integral of density^(1/3) over each gap between neighbours, with their mean weight / gap for the density.
    share = gaps.pow(2 / 3) * ((ordered.weights[:, :-1] + ordered.weights[:, 1:]) / 2).pow(1 / 3)
    for _ in range(_CAP_ROUNDS):
        # No more than one boundary between clusters is of use inside a gap, however wide an outlier makes it.
        share = torch.minimum(share, share.sum(dim=1, keepdim=True) / levels)
    cumulative = pad(share.cumsum(dim=1), (1, 0))
    distinct = pad((gaps > 0).cumsum(dim=1), (1, 0))  # distinct values before this one
    index = torch.arange(levels, device=gaps.device)
    chosen = distinct.gather(1, torch.searchsorted(cumulative, (index + 0.5) / levels * cumulative[:, -1:]))
    # Push equal choices apart: each at least one behind its predecessor, but the last at most at the last value.
    chosen = (chosen - index).cummax(dim=1).values + index
    chosen = torch.minimum(chosen, distinct[:, -1:] + 1 - levels + index).clamp_(min=0)
    return ordered.values.gather(1, torch.searchsorted(distinct, chosen))


def _greedy_start(ordered: _Ordered, levels: int) -> Tensor:
    values, weights = ordered.values, ordered.weights
    centers = values.new_empty(len(values), levels)
    centers[:, 0] = values.gather(1, weights.argmax(dim=1, keepdim=True)).squeeze(1)
    distance = (values - centers[:, :1]).square()
    for level in range(1, levels):
        costliest = (weights * distance).argmax(dim=1, keepdim=True)
        centers[:, level : level + 1] = values.gather(1, costliest)
        torch.minimum(distance, (values - centers[:, level : level + 1]).square(), out=distance)
    return centers.sort(dim=1).values


def _check(weights: Tensor) -> None:
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            f"k-means weights range from {weights.min().item():g} to {weights.max().item():g}; they must be finite and "
            "not negative"
        )
