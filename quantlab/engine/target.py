"""The error-propagating target: what a layer should compute so that it makes up for the errors before it.

A layer with weight W should send x̂, its input behind quantized layers, to what it sends x to in the float model.
With H = mean x̂ x̂ᵀ and D = mean (x - x̂) x̂ᵀ (arXiv:2504.02692 and 2505.11695 work with the same statistics),

    mean |W x - Ŵ x̂|² = tr((W* - Ŵ) H (W* - Ŵ)ᵀ) + const,    W* = W + W D H⁻¹,

so that every method that minimises the layer loss profits when it is given W* in place of W. On a finite text the
full shift corrects too much: the target is W + α W D (H + λ I)⁻¹ with α between 0 and 1, λ a hundredth of the mean
diagonal. The damping keeps the target near W in directions that the text says nothing about.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlab.engine.moments import Moments
from quantlab.engine.statistics import GroupStatistics, row_groups
from quantlab.errors import NumericalError
from quantlab.finite import all_finite
from quantlab.solvers.cholesky import damped_cholesky

TARGET_DAMPING = 0.01
ROWS_PER_PIECE = 1024


def targets_of(weights: Mapping[str, Tensor], statistics: GroupStatistics) -> dict[str, Tensor]:
    """What the layers of a group are to approximate.

    Args:
        weights: (out_features, in_features) by layer.
        statistics: of the input that the layers share.

    Returns:
        The weights themselves, or, with `target_alpha`, their shifted float32 copies.

    Raises:
        NumericalError: the statistics are not finite, or the Hessian cannot be factorised.
    """
    if statistics.target_alpha == 0:
        return dict(weights)
    targets = {name: weight.float().clone() for name, weight in weights.items()}
    rows_by_moments: dict[int, tuple[Moments, list[Tensor]]] = {}  # moments that are shared are factorised once
    for name, target in targets.items():
        moments = statistics.moments[name]
        for rows, own in zip(row_groups(len(target), len(moments)), moments, strict=True):
            rows_by_moments.setdefault(id(own), (own, []))[1].append(target[rows])
    for own, views in rows_by_moments.values():
        try:
            _shift(views, own, statistics.target_alpha)
        except NumericalError as error:
            raise NumericalError(f"{' + '.join(weights)}: no error-propagating target: {error}") from error
    return targets


def _shift(views: list[Tensor], moments: Moments, alpha: float) -> None:
    """Add α W D (H + λ I)⁻¹ to weights, in place: (rows, in_features) each."""
    if moments.drift is None or not (all_finite(moments.hessian) and all_finite(moments.drift)):
        raise NumericalError("the statistics contain NaN or infinity (try model.dtype: float32)")
    factor = damped_cholesky(moments.hessian, TARGET_DAMPING)
    if factor.damping > TARGET_DAMPING:
        raise NumericalError(f"the Hessian needs a damping of {factor.damping:g}, more than {TARGET_DAMPING:g}")
    for view in views:
        for piece in view.split(ROWS_PER_PIECE):
            product = (piece @ moments.drift).double()
            piece.add_(torch.cholesky_solve(product.T, factor.lower).T, alpha=alpha)
