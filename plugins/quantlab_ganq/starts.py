"""Where the alternation starts: tables for the first assignment step.

The alternation is stiff. Codes make up for each other's errors under the table that they were chosen for, and hold the
next table near to it. So the first table decides a good part of the final loss, and none is best for every row.
"""

import torch
from torch import Tensor

from quantlab.api import Lut
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.sweep import SweepFactor, sweep_targets

_KMEANS_ITERATIONS = 50
_KMEANS_CELLS = 256
_TARGET_ROUNDS = 2

_QUANTILES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
_LEVELS_PER_QUARTER = (3, 5, 5, 3)
_LEVELS_PER_QUARTER_WITH_OUTLIERS = (2, 6, 6, 2)


def weight_table(weight: Tensor, levels: int, importance: Tensor) -> Tensor:
    """k-means of the weights of each row.

    Args:
        weight: (out_features, in_features).
        levels: entries of a table.
        importance: (in_features,), the factor of an input's squared errors; 0 for a dead input.

    Returns:
        (out_features, levels), ascending.
    """
    live = importance > 0
    if live.any() and not live.all():  # dead inputs would attract levels for nothing
        weight, importance = weight[:, live], importance[live]
    alike = bool((importance == importance[0]).all())
    return kmeans_levels(weight, levels, _KMEANS_ITERATIONS, None if alike else importance, cells=_KMEANS_CELLS)


def target_table(weight: Tensor, levels: int, factor: SweepFactor, importance: Tensor) -> Tensor:
    """k-means of what the assignment step rounds: the targets of the sweep, weights that make up for others' errors.

    Targets depend on the table, so sweep and k-means take turns.

    Args:
        weight: (out_features, in_features).
        levels: entries of a table.
        factor: of the Hessian.
        importance: (in_features,), as for `weight_table`.

    Returns:
        (out_features, levels), ascending.
    """
    table = weight_table(weight, levels, importance)
    for _ in range(_TARGET_ROUNDS):
        targets = sweep_targets(weight, factor, LutRounder(Lut(values=table[:, None]), weight.shape[1]))
        table = weight_table(targets, levels, importance)
    return table


def published_table(weight: Tensor, levels: int, *, with_outliers: bool) -> Tensor:
    """The first table of GANQ's published code.

    16 levels: the range is cut in quarters, with 3, 5, 5 and 3 equally spaced levels from end to end (2, 6, 6 and 2
    with outliers taken out), so that neighbouring quarters share the level between them. 8 levels: fixed quantiles.

    Args:
        weight: (out_features, in_features).
        levels: 8 or 16.
        with_outliers: whether the largest weights were taken out.

    Returns:
        (out_features, levels), ascending.
    """
    if levels == len(_QUANTILES):
        places = (torch.tensor(_QUANTILES) * (weight.shape[1] - 1)).round().long().to(weight.device)
        return weight.sort(dim=1).values[:, places]
    counts = _LEVELS_PER_QUARTER_WITH_OUTLIERS if with_outliers else _LEVELS_PER_QUARTER
    places = torch.cat([(quarter + torch.linspace(0, 1, count)) / 4 for quarter, count in enumerate(counts)])
    lowest, highest = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    return lowest + (highest - lowest) * places.to(weight)
