"""The codebook step: the best levels for given codes, in closed form.

For one row let S be the one-hot matrix (levels, in_features) of its codes, so that ŵ = t S for levels t. The loss is
quadratic in t and its minimiser solves a system with one unknown per level (GANQ, arXiv:2501.12956, Eq. 7):

    t M = w H Sᵀ,    M = S H Sᵀ.

We solve for the correction instead, Δt M = e H Sᵀ with the present error e = w - t S. It is the same equation, but
rounding errors scale with the error and not with the weight; and it is a descent step even for a regularised M.

Methods that refit again and again for the same weight use `CodebookFit`: with w H formed once, e H Sᵀ = w H Sᵀ - t M
takes no product with H. It is less exact, but the loss feels an error of the levels only in second order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from quantlab.errors import NumericalError
from quantlab.solvers.sweep import Assignment
from quantlab_kernels import solver

_CHUNK_ELEMENTS = 1 << 22  # entries of S, or of all M, held at a time: 16 MB in float32
_PANEL_COLUMNS = 128  # a panel of H with 4096 rows takes 2 MB in float32, about a core's share of cache
_RIDGE_ATTEMPTS = 5
_RIDGE_GROWTH = 100.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebooks:
    """Refitted codebooks with ascending levels, and the codes relabelled to match.

    Attributes:
        levels: (out_features, levels).
        codes: (out_features, in_features) uint8.
    """

    levels: Tensor
    codes: Tensor

    def dequantize(self) -> Tensor:
        """The weight they stand for: (out_features, in_features)."""
        if solver.usable(self.levels):
            return solver.select_levels(self.codes, self.levels)
        return self.levels.gather(1, self.codes.long())


class LevelGram:
    """M = S H Sᵀ of any codes: entry (a, b) is the sum of H over inputs with code a and inputs with code b.

    The Hessian is prepared once, for all rows.

    Args:
        hessian: (in_features, in_features).
    """

    def __init__(self, hessian: Tensor) -> None:
        self._hessian = hessian
        self._triangle = solver.HessianTriangle(hessian) if solver.usable(hessian) else None

    def __call__(self, codes: Tensor, levels: int) -> Tensor:
        """The matrices of some rows: (rows, levels, levels) for codes (rows, in_features) uint8."""
        if self._triangle is not None:
            return self._triangle.level_gram(codes, levels)
        rows = max(1, _CHUNK_ELEMENTS // (levels * codes.shape[1]))
        return torch.cat([_gram_by_bags(chunk, self._hessian, levels) for chunk in torch.split(codes, rows)])


class CodebookFit:
    """Codebook steps for one weight.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features), undamped, in the dtype of the weight.
        gram: of this Hessian; whoever fits several weights makes it once.

    Attributes:
        product: the weight times the Hessian, (out_features, in_features).
    """

    def __init__(self, weight: Tensor, hessian: Tensor, gram: LevelGram | None = None) -> None:
        self._hessian = hessian
        self._gram = gram or LevelGram(hessian)
        self.product = _times(weight, hessian)

    def refit(self, levels: Tensor, assignment: Assignment) -> tuple[Codebooks, Tensor]:
        """Refit levels as `refit_codebook` does.

        Args:
            levels: (out_features, levels).
            assignment: codes that select from the levels, their error, and their loss if it is known.

        Returns:
            The new codebooks and their losses, (out_features,) float64.

        Raises:
            NumericalError: the Hessian is not positive semi-definite.
        """
        loss = assignment.loss
        if loss is None:
            loss = (_times(assignment.error, self._hessian) * assignment.error).sum(dim=1, dtype=torch.float64)
        count, precision = levels.shape[1], torch.finfo(levels.dtype).eps
        corrections, losses = [], []
        for rows in _chunks(assignment.codes, count):
            codes = assignment.codes[rows]
            gram = self._gram(codes, count)
            right = _sums_by_code(codes, self.product[rows], count) - _times_rows(gram, levels[rows])
            correction = _solve_scaled(gram, right, precision)
            change = ((_times_rows(gram, correction) - 2 * right) * correction).sum(dim=1)
            corrections.append(correction)
            losses.append(loss[rows] + change)
        return _sorted(levels + torch.cat(corrections).to(levels.dtype), assignment.codes), torch.cat(losses)


def refit_codebook(levels: Tensor, codes: Tensor, error: Tensor, hessian: Tensor) -> Codebooks:
    """Move the levels of every row to where they minimise the row's loss, the codes being fixed.

    A level that no live input uses keeps its value. Levels may cross, because the off-diagonal part of H couples
    them; they are sorted again, which changes codes but not the dequantized weight.

    Args:
        levels: (out_features, levels).
        codes: (out_features, in_features) uint8.
        error: (out_features, in_features), the weight minus the levels that the codes select.
        hessian: (in_features, in_features), undamped, in the dtype of the other operands.

    Raises:
        NumericalError: the Hessian is not positive semi-definite.
    """
    count, precision = levels.shape[1], torch.finfo(levels.dtype).eps
    gradient, gram_of = _times(error, hessian), LevelGram(hessian)
    corrections = []
    for rows in _chunks(codes, count):
        gram = gram_of(codes[rows], count)
        corrections.append(_solve_scaled(gram, _sums_by_code(codes[rows], gradient[rows], count), precision))
    return _sorted(levels + torch.cat(corrections).to(levels.dtype), codes)


def _gram_by_bags(codes: Tensor, hessian: Tensor, levels: int) -> Tensor:
    rows, in_features = codes.shape
    labels = codes.long()
    one_hot = hessian.new_zeros(rows, in_features, levels).scatter_(2, labels[..., None], 1.0)
    # S H is a sum of rows of H per code: with the inputs sorted by code, a sum of consecutive bags. That takes
    # one addition per entry where the product with the one-hot matrix takes `levels` of them.
    by_code = labels.argsort(dim=1, stable=True).flatten()
    sizes = one_hot.sum(dim=1).long().flatten()
    starts = sizes.cumsum(0) - sizes
    gram = hessian.new_zeros(rows, levels, levels)
    panels = torch.split(hessian, _PANEL_COLUMNS, dim=1)
    for panel, members in zip(panels, torch.split(one_hot, _PANEL_COLUMNS, dim=1), strict=True):
        sums = embedding_bag(by_code, panel.contiguous(), starts, mode="sum")
        gram.baddbmm_(sums.view(rows, levels, -1), members)
    return gram


def _times(matrix: Tensor, hessian: Tensor) -> Tensor:
    return solver.multiply_symmetric(matrix, hessian) if solver.usable(matrix, hessian) else matrix @ hessian


def _times_rows(gram: Tensor, levels: Tensor) -> Tensor:
    """M tᵀ of every row: (rows, levels) float64."""
    return (gram.double() @ levels.double()[..., None]).squeeze(2)


def _sums_by_code(codes: Tensor, values: Tensor, levels: int) -> Tensor:
    """Sums of values (rows, in_features) over inputs with the same code: (rows, levels) float64."""
    if solver.usable(values):
        return solver.sums_by_code(codes, values, levels)
    sums = torch.zeros(len(codes), levels, dtype=torch.float64, device=codes.device)
    return sums.scatter_add_(1, codes.long(), values.double())


def _solve_scaled(gram: Tensor, right: Tensor, precision: float) -> Tensor:
    """Solve M Δt = right for every row: (rows, levels) float64; Δt is 0 where M has a zero on its diagonal.

    M is scaled to a unit diagonal, which makes it well conditioned on real layers (tens to hundreds). A ridge as
    large as the rounding of M makes the others solvable: with any ridge r >= 0 the step changes the loss by
    -right·Δt - r |Δt|², in scaled units, so it never raises it.
    """
    weakest = max(1e-9, precision * gram.shape[1])
    if solver.usable(gram):
        solution, failures = solver.solve_levels(
            gram, right, ridge=weakest, growth=_RIDGE_GROWTH, attempts=_RIDGE_ATTEMPTS
        )
    else:
        solution, failures = _solve_in_batches(gram.double(), right, weakest)
    if not failures:
        return solution
    raise NumericalError(
        f"the codebook equations of {failures} of {len(gram)} rows are indefinite, which the Hessian cannot "
        "cause if it is a mean of x xᵀ: check the calibration statistics"
    )


def _solve_in_batches(gram: Tensor, right: Tensor, weakest: float) -> tuple[Tensor, int]:
    energy = gram.diagonal(dim1=1, dim2=2)
    live = energy > 0
    scale = torch.where(live, energy, 1.0).rsqrt() * live
    scaled = scale[:, :, None] * gram * scale[:, None, :]
    ridge = torch.full_like(energy[:, :1], weakest)
    for _ in range(_RIDGE_ATTEMPTS):
        scaled.diagonal(dim1=1, dim2=2).copy_(torch.where(live, 1.0 + ridge, 1.0))
        lower, failed_minor = torch.linalg.cholesky_ex(scaled)
        failed = failed_minor > 0
        if not failed.any():
            return torch.cholesky_solve((scale * right)[..., None], lower).squeeze(2) * scale, 0
        # Only for the rows that need it: no row may depend on its neighbours.
        ridge[failed] *= _RIDGE_GROWTH
    return right, int(failed.sum())


def _sorted(levels: Tensor, codes: Tensor) -> Codebooks:
    if (levels.diff(dim=1) >= 0).all():
        return Codebooks(levels=levels, codes=codes)
    ascending, order = levels.sort(dim=1, stable=True)
    rank = order.argsort(dim=1).to(torch.uint8)
    native = solver.usable(levels)
    return Codebooks(levels=ascending, codes=solver.relabel(codes, rank) if native else rank.gather(1, codes.long()))


def _chunks(codes: Tensor, levels: int) -> list[slice]:
    """Rows whose matrices M fit into `_CHUNK_ELEMENTS`."""
    size = max(1, _CHUNK_ELEMENTS // levels**2)
    return [slice(start, start + size) for start in range(0, len(codes), size)]
