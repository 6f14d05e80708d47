"""One-dimensional k-means of every row at once.

On a sorted row the clusters are intervals, and prefix sums give their means; one Lloyd iteration costs a
binary search per boundary, O(levels log in_features) per row, whatever the number of weights in a cluster.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHUNK_ELEMENTS = 1 << 24  # sorted values and prefix sums are float64: about 400 MB of working memory
_CAP_ROUNDS = 8


def kmeans_levels(rows: Tensor, levels: int, iterations: int) -> Tensor:
    """Cluster the values of each row by Lloyd's algorithm.

    Lloyd's algorithm stops at the nearest local optimum, so the start decides. Two are tried, and every row keeps the
    better: equally spaced levels, which bound the squared error by that of the uniform grid; and, because with many
    levels their best density is the cube root of the density of values (Panter & Dite 1951), its quantiles, moved apart
    to distinct values of the row. A row with no more distinct values than levels is represented exactly.

    Args:
        rows: (rows, values) floating point.
        levels: clusters per row.
        iterations: upper limit; stops earlier when nothing changes.

    Returns:
        (rows, levels) ascending cluster means in the dtype of `rows`. A cluster that runs empty keeps its last value.
    """
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    chunks = (chunk.double().contiguous().sort(dim=1).values for chunk in torch.split(rows, rows_per_chunk))
    # Rounding in the prefix sums can put two nearly equal means in the wrong order.
    return torch.cat([_cluster(chunk, levels, iterations).to(rows.dtype).sort(dim=1).values for chunk in chunks])


def _cluster(ordered: Tensor, levels: int, iterations: int) -> Tensor:
    prefix_sums = pad(ordered.cumsum(dim=1), (1, 0))
    companded = _lloyd(ordered, prefix_sums, _companded_start(ordered, levels), iterations)
    uniform = _lloyd(ordered, prefix_sums, _uniform_start(ordered, levels), iterations)
    uniform_is_better = _squared_error(ordered, uniform) < _squared_error(ordered, companded)
    return torch.where(uniform_is_better[:, None], uniform, companded)


def _lloyd(ordered: Tensor, prefix_sums: Tensor, centers: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        inner_edges = torch.searchsorted(ordered, _midpoints(centers), right=True)
        edges = pad(pad(inner_edges, (1, 0)), (0, 1), value=ordered.shape[1])
        sizes = edges.diff(dim=1)
        means = prefix_sums.gather(1, edges).diff(dim=1) / sizes
        updated = torch.where(sizes > 0, means, centers)
        if torch.equal(updated, centers):
            break
        centers = updated
    return centers


def _squared_error(ordered: Tensor, centers: Tensor) -> Tensor:
    nearest = centers.gather(1, torch.searchsorted(_midpoints(centers), ordered))
    return (ordered - nearest).square().sum(dim=1)


def _midpoints(centers: Tensor) -> Tensor:
    return (centers[:, :-1] + centers[:, 1:]) / 2


def _uniform_start(ordered: Tensor, levels: int) -> Tensor:
    lowest, highest = ordered[:, :1], ordered[:, -1:]
    return lowest + (highest - lowest) * torch.arange(levels, device=ordered.device) / (levels - 1)


def _companded_start(ordered: Tensor, levels: int) -> Tensor:
    gaps = ordered.diff(dim=1)
    # The integral of density^(1/3) over each gap between neighbours, with 1 / gap for the density.
    share = gaps.pow(2 / 3)
    for _ in range(_CAP_ROUNDS):
        # No more than one boundary between clusters is of use inside a gap, however wide an outlier makes it.
        share = torch.minimum(share, share.sum(dim=1, keepdim=True) / levels)
    mass = pad(share.cumsum(dim=1), (1, 0))
    distinct = pad((gaps > 0).cumsum(dim=1), (1, 0))  # distinct values before this one
    index = torch.arange(levels, device=ordered.device)
    chosen = distinct.gather(1, torch.searchsorted(mass, (index + 0.5) / levels * mass[:, -1:]))
    # Push equal choices apart: each at least one behind its predecessor, but the last at most at the last value.
    chosen = (chosen - index).cummax(dim=1).values + index
    chosen = torch.minimum(chosen, distinct[:, -1:] + 1 - levels + index).clamp_(min=0)
    return ordered.gather(1, torch.searchsorted(distinct, chosen))
