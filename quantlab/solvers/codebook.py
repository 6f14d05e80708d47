"""The codebook step: the best levels for given codes, in closed form.

For one row let S be the one-hot matrix (levels, in_features) of its codes, so that ŵ = t S for levels t. The loss is
quadratic in t and its minimiser solves a system with one unknown per level (GANQ, arXiv:2501.12956, Eq. 7):

    t M = w H Sᵀ,    M = S H Sᵀ.

We solve for the correction instead, Δt M = e H Sᵀ with the present error e = w - t S. It is the same equation, but
rounding errors scale with the error and not with the weight; and it is a descent step even for a regularised M.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from quantlab.errors import NumericalError

_CHUNK_ELEMENTS = 1 << 22  # entries of S held at a time: 16 MB in float32
_PANEL_COLUMNS = 128  # a panel of H with 4096 rows takes 2 MB in float32, about a core's share of cache
_RIDGE_ATTEMPTS = 5


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
        return self.levels.gather(1, self.codes.long())


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
    count = levels.shape[1]
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // (count * max(count, len(hessian))))
    chunks = zip(*(torch.split(operand, rows_per_chunk) for operand in (codes, error @ hessian)), strict=True)
    correction = torch.cat([_correction(chunk, gradient, hessian, count) for chunk, gradient in chunks])
    return _sorted(levels + correction.to(levels.dtype), codes)


def level_gram(codes: Tensor, hessian: Tensor, levels: int) -> Tensor:
    """M = S H Sᵀ of every row: entry (a, b) is the sum of H over inputs with code a and inputs with code b.

    Args:
        codes: (rows, in_features) uint8.
        hessian: (in_features, in_features).
        levels: number of codes.

    Returns:
        (rows, levels, levels) in the dtype of the Hessian.
    """
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


def _correction(codes: Tensor, gradient: Tensor, hessian: Tensor, levels: int) -> Tensor:
    gram = level_gram(codes, hessian, levels).double()
    right = gram.new_zeros(len(codes), levels).scatter_add_(1, codes.long(), gradient.double())
    return _solve_scaled(gram, right, precision=torch.finfo(hessian.dtype).eps)


def _solve_scaled(gram: Tensor, right: Tensor, precision: float) -> Tensor:
    """Solve M Δt = right for every row: (rows, levels) float64; Δt is 0 where M has a zero on its diagonal.

    M is scaled to a unit diagonal, which makes it well conditioned on real layers (tens to hundreds). A ridge as
    large as the rounding of M makes the others solvable: with any ridge r >= 0 the step changes the loss by
    -right·Δt - r |Δt|², in scaled units, so it never raises it.
    """
    energy = gram.diagonal(dim1=1, dim2=2)
    live = energy > 0
    scale = torch.where(live, energy, 1.0).rsqrt() * live
    scaled = scale[:, :, None] * gram * scale[:, None, :]
    ridge = torch.full_like(energy[:, :1], max(1e-9, precision * gram.shape[1]))
    for _ in range(_RIDGE_ATTEMPTS):
        scaled.diagonal(dim1=1, dim2=2).copy_(torch.where(live, 1.0 + ridge, 1.0))
        lower, failed_minor = torch.linalg.cholesky_ex(scaled)
        failed = failed_minor > 0
        if not failed.any():
            return torch.cholesky_solve((scale * right)[..., None], lower).squeeze(2) * scale
        # Only for the rows that need it: no row may depend on its neighbours.
        ridge[failed] *= 100
    raise NumericalError(
        f"the codebook equations of {int(failed.sum())} of {len(gram)} rows are indefinite, which the Hessian cannot "
        "cause if it is a mean of x xᵀ: check the calibration statistics"
    )


def _sorted(levels: Tensor, codes: Tensor) -> Codebooks:
    ascending, order = levels.sort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    return Codebooks(levels=ascending, codes=rank.gather(1, codes.long()).to(torch.uint8))
