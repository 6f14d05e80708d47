"""Dynamic groups: each group's grid is fitted when the sweep arrives there, to the weights that it finds."""

from collections.abc import Callable

from torch import Tensor

from quantlab.api import UniformGrid
from quantlab.solvers.nearest import GridRounder

GridFit = Callable[[Tensor, Tensor], UniformGrid]
"""Fits one grid per row to values (out_features, columns) at column positions (columns,)."""


class DynamicGroups:
    """The grids of a layer in the course of a sweep whose blocks are the groups.

    Args:
        fit: makes the grids of a group.
        grid: one grid per row and group, overwritten by those that are fitted.
        group_size: inputs per group.

    Attributes:
        nearest: rounds by the grids as they are now.
    """

    def __init__(self, fit: GridFit, grid: UniformGrid, group_size: int) -> None:
        self._fit = fit
        self._grid = grid
        self._group_size = group_size
        self.nearest = GridRounder(grid, group_size * grid.scale.shape[1])

    def enter(self, columns: Tensor, targets: Tensor) -> None:
        """Fit the grid of the group that owns these columns to their targets, (out_features, columns)."""
        group = int(columns[0]) // self._group_size
        fitted = self._fit(targets, columns)
        self._grid.scale[:, group], self._grid.zero[:, group] = fitted.scale.squeeze(1), fitted.zero.squeeze(1)
        self.nearest.replace_group(group, fitted)
