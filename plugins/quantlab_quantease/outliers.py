"""A sparse correction S beside the quantized weight, by iterative hard thresholding.

The loss g(S) = e H eᵀ of the error e = w - ŵ - s has the gradient -2 e H, whose Lipschitz constant is 2 λ for the
largest eigenvalue λ of H. A gradient step of length 1 / (2 λ), cut down to the support that is allowed,

    S <- P(S + E H / λ),

never raises the loss (arXiv:2309.01885, Algorithm 2 and Lemma 2). P keeps either the entries with the largest
magnitudes in the whole matrix, or the columns with the largest norms.
"""

from typing import Literal

import torch
from torch import Tensor

from quantlab.solvers.outliers import largest

OutlierKind = Literal["none", "unstructured", "structured"]

_SQUARINGS = 5


class OutlierSupport:
    """Which corrections are allowed: the operator P.

    Args:
        kind: "unstructured" keeps entries, "structured" whole columns, "none" nothing.
        fraction: share of the entries, or of the columns, that is kept.
    """

    def __init__(self, kind: OutlierKind, fraction: float) -> None:
        self._structured = kind == "structured"
        self._fraction = 0.0 if kind == "none" else fraction

    def keep_largest(self, values: Tensor) -> Tensor:
        """P: the largest entries or columns of (out_features, in_features) values; the others become zero."""
        strength = values.square().sum(dim=0) if self._structured else values.abs().flatten()
        kept = largest(strength, self._fraction)
        return torch.where(kept if self._structured else kept.view(values.shape), values, 0.0)

    def without(self, weight: Tensor, group_size: int | None) -> Tensor:
        """The weight as the grid has to cover it (arXiv:2309.01885).

        Structured outliers leave it altogether. Of every row, or group of a row, half the share of unstructured
        outliers is taken off at either end: the values there are moved inwards to the first that stays.

        Args:
            weight: (out_features, in_features).
            group_size: inputs that share a grid; None if all do.
        """
        if self._structured:
            return weight - self.keep_largest(weight)  # zero is inside the range of every grid
        groups = weight.reshape(len(weight), -1, group_size or weight.shape[1])
        size = groups.shape[2]
        trimmed = min(round(self._fraction * size / 2), (size - 1) // 2)
        ordered = groups.sort(dim=2).values
        inside = groups.clamp(ordered[..., trimmed, None], ordered[..., size - 1 - trimmed, None])
        return inside.view(weight.shape)


def thresholding_step(
    sparse: Tensor, error: Tensor, hessian: Tensor, largest_eigenvalue: float, support: OutlierSupport
) -> Tensor:
    """One step S <- P(S + E H / λ).

    Args:
        sparse: S, (out_features, in_features).
        error: E = W - What - S, (out_features, in_features).
        hessian: (in_features, in_features), undamped.
        largest_eigenvalue: λ, or more; 0 only if the Hessian is 0.
        support: what S may be.
    """
    if largest_eigenvalue == 0:
        return sparse
    return support.keep_largest(torch.addmm(sparse, error, hessian, alpha=1 / largest_eigenvalue))


def largest_eigenvalue_bound(hessian: Tensor) -> float:
    """An upper bound of the largest eigenvalue λ of a positive semi-definite matrix, a few percent above it.

    λ is at most the Frobenius norm of H^p to the power 1 / p, and for p = 2^5 that is at most n^(1 / 64) λ. Unlike the
    power method, which estimates λ from below, this never makes a gradient step too long.
    """
    bound, root, power = 1.0, 1.0, hessian
    for _ in range(_SQUARINGS + 1):
        norm = power.norm().item()
        if norm == 0:
            return 0.0
        bound *= norm**root
        root /= 2
        power = power / norm
        power = power @ power
    return bound
