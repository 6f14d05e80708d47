"""Cholesky factors of Hessians that may be singular."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import NumericalError

_SMALLEST_STEP = 1e-8
_LARGEST_DAMPING = 1.0
_ROWS = 256  # copied at a time: a permuted copy of the whole would stand beside the matrix in float64


@dataclass(frozen=True, kw_only=True, eq=False)
class DampedFactor:
    """The factorisation H + damping mean(diag H) I = L Lᵀ.

    Attributes:
        lower: L, (in_features, in_features) float64, lower triangular with positive diagonal.
        damping: the fraction of the mean diagonal that was actually added.
        added: (in_features,) float64, what was added to each entry of the diagonal.
    """

    lower: Tensor
    damping: float
    added: Tensor


def damped_cholesky(
    hessian: Tensor, damping: float, columns: Tensor | None = None, shrinkage: float = 0.0
) -> DampedFactor:
    """Factor a Hessian after adding a fraction of its mean diagonal to the diagonal.

    If that does not make it positive definite in floating point, the damping is multiplied by ten until it does.
    Damping is relative, so that the factor of c H is the factor of H times sqrt(c).

    A dead input (zero on the diagonal: it was zero for every token) is not coupled to others and says nothing about
    the mean diagonal, so it is left out of the mean; it gets the mean as its pivot.

    Args:
        hessian: (in_features, in_features), positive semi-definite up to rounding.
        damping: smallest fraction to try; may be 0.
        columns: (in_features,) int64, the order of the inputs in the factor and in `added`; None as they are.
        shrinkage: the off-diagonal entries are reduced by this share beforehand.

    Raises:
        NumericalError: damping with the whole mean diagonal, or with `damping` if that is more, is not enough.
    """
    diagonal = (hessian.diagonal() if columns is None else hessian.diagonal()[columns]).double()
    dead = diagonal == 0
    mean = 1.0 if dead.all() else diagonal[~dead].mean().item()
    for fraction in _ladder(damping):
        # The factor takes the place of the matrix: in float64, every copy is twice as large as the Hessian.
        lower = _in_double(hessian, columns).mT
        if shrinkage:
            lower *= 1 - shrinkage
        added = mean * (dead.double() + fraction)
        torch.add(diagonal, added, out=lower.diagonal())
        failed_minor = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed_minor))
        if failed_minor == 0:
            return DampedFactor(lower=lower, damping=fraction, added=added)
    raise NumericalError(
        f"the {len(hessian)} x {len(hessian)} Hessian is not positive definite, not even with {fraction:g} times its "
        f"mean diagonal {mean:.3g} added; a mean of x xᵀ cannot be like that: check the calibration statistics"
    )


def _in_double(hessian: Tensor, columns: Tensor | None) -> Tensor:
    if columns is None:
        return hessian.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    permuted = hessian.new_empty(hessian.shape, dtype=torch.float64)
    for part, rows in zip(permuted.split(_ROWS), columns.split(_ROWS), strict=True):
        part.copy_(hessian[rows][:, columns])
    return permuted


def _ladder(damping: float) -> list[float]:
    fractions = [damping]
    while fractions[-1] < _LARGEST_DAMPING:
        fractions.append(min(max(10 * fractions[-1], _SMALLEST_STEP), _LARGEST_DAMPING))
    return fractions
