"""Dynamic groups: each group's grid is fitted when the sweep arrives there, to the targets that it finds."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.api import UniformGrid
from quantlab.solvers.nearest import GridRounder

GridFit = Callable[[Tensor, Tensor], UniformGrid]
"""Fits one grid per row to values (out_features, columns) at column positions (columns,)."""


class DynamicGroups:
    """Rounds columns of a sweep whose blocks are the groups, each on a grid of its own.

    Args:
        fit: makes the grids of a group.
        group_size: inputs per group.
    """

    def __init__(self, fit: GridFit, group_size: int) -> None:
        self._fit = fit
        self._group_size = group_size
        self._grids: dict[int, UniformGrid] = {}
        self._rounders: dict[int, GridRounder] = {}

    def enter(self, columns: Tensor, targets: Tensor) -> None:
        """Fit the grid of the group that owns these columns to their targets, (out_features, columns)."""
        group = int(columns[0]) // self._group_size
        self._grids[group] = self._fit(targets, columns)
        self._rounders[group] = GridRounder(self._grids[group], self._group_size)

    def __call__(self, column: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Round the (out_features,) targets of a column: their codes and the levels that the codes select."""
        return self._rounders[column // self._group_size](column % self._group_size, targets)

    def grid(self) -> UniformGrid:
        """The grids of all groups, in their natural order."""
        grids = [self._grids[group] for group in sorted(self._grids)]
        return UniformGrid(
            scale=torch.cat([grid.scale for grid in grids], dim=1),
            zero=torch.cat([grid.zero for grid in grids], dim=1),
            bits=grids[0].bits,
        )
