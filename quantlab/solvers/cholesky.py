"""Cholesky factors of Hessians that may be singular."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import NumericalError

_SMALLEST_STEP = 1e-8
_LARGEST_DAMPING = 1.0


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


def damped_cholesky(hessian: Tensor, damping: float) -> DampedFactor:
    """Factor a Hessian after adding a fraction of its mean diagonal to the diagonal.

    If that does not make it positive definite in floating point, the damping is multiplied by ten until it does.
    Damping is relative, so that the factor of c H is the factor of H times sqrt(c).

    A dead input (zero on the diagonal: it was zero for every token) is not coupled to others and says nothing about
    the mean diagonal, so it is left out of the mean; it gets the mean as its pivot.

    Args:
        hessian: (in_features, in_features), positive semi-definite up to rounding.
        damping: smallest fraction to try; may be 0.

    Raises:
        NumericalError: damping with the whole mean diagonal, or with `damping` if that is more, is not enough.
    """
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    mean = 1.0 if dead.all() else diagonal[~dead].mean().item()
    for fraction in _ladder(damping):
        # The factor takes the place of the matrix: in float64, every copy is twice as large as the Hessian.
        lower = hessian.to(torch.float64, copy=True, memory_format=torch.contiguous_format).mT
        added = mean * (dead.double() + fraction)
        lower.diagonal().add_(added)
        failed_minor = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed_minor))
        if failed_minor == 0:
            return DampedFactor(lower=lower, damping=fraction, added=added)
    raise NumericalError(
        f"the {len(hessian)} x {len(hessian)} Hessian is not positive definite, not even with {fraction:g} times its "
        f"mean diagonal {mean:.3g} added; a mean of x xᵀ cannot be like that: check the calibration statistics"
    )


def _ladder(damping: float) -> list[float]:
    fractions = [damping]
    while fractions[-1] < _LARGEST_DAMPING:
        fractions.append(min(max(10 * fractions[-1], _SMALLEST_STEP), _LARGEST_DAMPING))
    return fractions
