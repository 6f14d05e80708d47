"""One layer in the course of coordinate descent: W = What + S + E."""

import torch
from torch import Tensor

from quantlab.api import UniformGrid
from quantlab.solvers.descent import descend, relax, round_descending
from quantlab.solvers.nearest import GridRounder, nearest_codes
from quantlab.solvers.sweep import Assignment, SweepFactor, sweep
from quantlab_quantease.outliers import OutlierSupport, largest_eigenvalue_bound, thresholding_step


class DescentState:
    """Codes and sparse corrections of one layer, improved in place; it begins at the weight, on no grid.

    Args:
        weight: W, (out_features, in_features).
        hessian: (in_features, in_features), undamped, in the dtype of the weight.
        order: (in_features,) int64, the input visited first, second, and so on.
        grid: what the codes select from.
        support: what the corrections may be.

    Attributes:
        codes: (out_features, in_features) uint8; they mean nothing until the weights have been rounded.
        sparse: S, (out_features, in_features).
        error: E, (out_features, in_features).
        on_grid: whether every weight without its correction is on a level.
    """

    def __init__(
        self, weight: Tensor, hessian: Tensor, order: Tensor, grid: UniformGrid, support: OutlierSupport
    ) -> None:
        self._weight = weight
        self._hessian = hessian
        self._order = order
        self._grid = grid
        self._nearest = GridRounder(grid, weight.shape[1])
        self._support = support
        self._largest_eigenvalue: float | None = None
        self.error = torch.zeros_like(weight)
        self.on_grid = False
        self.codes = torch.zeros_like(weight, dtype=torch.uint8)
        self.sparse = support.keep_largest(weight)

    def start_from_gptq(self, factor: SweepFactor) -> dict[str, float]:
        """Round by one triangular sweep with error feedback; returns the diagnostics of the factor."""
        self._accept(sweep(self._weight - self.sparse, factor, self._nearest))
        return factor.diagnostics()

    def start_from_rtn(self) -> None:
        """Round every weight to its nearest level."""
        target = self._weight - self.sparse
        codes = nearest_codes(target, self._grid)
        grouped = codes.view(*self._grid.scale.shape, -1)
        levels = (grouped - self._grid.zero[..., None]) * self._grid.scale[..., None]
        self._accept(Assignment(codes=codes, error=target - levels.view(target.shape)))

    def round(self) -> None:
        """Visit every input once and put it on its best level; the loss does not rise if all were on levels."""
        target = self._weight - self.sparse
        if self.on_grid:
            start = Assignment(codes=self.codes, error=self.error)
            self._accept(descend(target, start, self._hessian, self._order, self._nearest, sweeps=1))
        else:
            self._accept(round_descending(target, self.error, self._hessian, self._order, self._nearest))

    def relax(self) -> None:
        """Visit every input once and put it where the loss is smallest, on a level or not."""
        self.error = relax(self.error, self._hessian, self._order)
        self.on_grid = False

    def update_outliers(self) -> None:
        """Take one thresholding step for the sparse corrections; the loss does not rise."""
        if self._largest_eigenvalue is None:
            self._largest_eigenvalue = largest_eigenvalue_bound(self._hessian)
        updated = thresholding_step(self.sparse, self.error, self._hessian, self._largest_eigenvalue, self._support)
        self.error = self.error - (updated - self.sparse)
        self.sparse = updated

    def _accept(self, assignment: Assignment) -> None:
        self.codes, self.error = assignment.codes, assignment.error
        self.on_grid = True
