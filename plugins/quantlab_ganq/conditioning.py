"""What is done to the Hessian before it guides the choice of codes."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from quantlab.solvers.sweep import SweepFactor, factor_for_sweep

Preconditioner = Literal["damping", "diagonal_dominance"]

_SHRINKAGE_AT_ONE_TOKEN_PER_INPUT = 2.0  # fitted, like the power, to held-out losses of small models' layers
_SHRINKAGE_POWER = 1.5
_MOST_SHRINKAGE = 0.6
_SMALLEST_OFFSET = 1e-8  # of the mean diagonal; the published code has it absolute


def shrinkage_for(hessian: Tensor, num_tokens: int) -> float:
    """The share by which off-diagonal entries of a Hessian are reduced; it grows as tokens per input become few.

    An off-diagonal entry is then mostly chance, and feedback fits the calibration text. With 2 (inputs / tokens)^1.5,
    16 tokens per input reduce them by 3%, 4 by 25%, and fewer than 2.2 by 60%.

    Args:
        hessian: (in_features, in_features).
        num_tokens: tokens that it is the mean of.
    """
    live = int((hessian.diagonal() > 0).sum())
    rarity = live / max(1, num_tokens)
    return float(min(_SHRINKAGE_AT_ONE_TOKEN_PER_INPUT * rarity**_SHRINKAGE_POWER, _MOST_SHRINKAGE))


def shrunk(hessian: Tensor, share: float) -> Tensor:
    """The Hessian with its off-diagonal entries reduced by a share; itself if that is 0."""
    if share == 0:
        return hessian
    reduced: Tensor = hessian * (1 - share)
    reduced.diagonal().copy_(hessian.diagonal())
    return reduced


def diagonally_dominant_factor(hessian: Tensor, order: Tensor, dtype: torch.dtype) -> SweepFactor:
    """The factor of the Hessian with a diagonal not below the sum of the other magnitudes of its row.

    That makes it positive definite without damping: the adaptive preconditioner of GANQ's published code. Dead inputs
    stay dead.

    Args:
        hessian: (in_features, in_features).
        order: as for `factor_for_sweep`.
        dtype: as for `factor_for_sweep`.
    """
    diagonal = hessian.diagonal().double()
    missing = hessian.abs().sum(dim=1, dtype=torch.float64) - 2 * diagonal
    offset = torch.where(diagonal > 0, missing.clamp(min=_SMALLEST_OFFSET * diagonal.mean().item()), 0.0)
    dominant = hessian.to(torch.float64, copy=True)
    dominant.diagonal().add_(offset)
    factor = factor_for_sweep(dominant, order, 0.0, dtype)
    return replace(factor, added=factor.added + offset[factor.columns])
