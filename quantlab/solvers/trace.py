"""How the loss falls from step to step of a solver, for the convergence curves of the report."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 64  # enough for a curve, and next to nothing beside the steps of a solver


def loss_of_some_rows(error: Tensor, hessian: Tensor) -> float:
    """The loss of the first rows of a layer.

    Args:
        error: (out_features, in_features), the weight minus its present approximation.
        hessian: (in_features, in_features) in the dtype of the error.
    """
    rows = error[:_ROWS]
    return ((rows @ hessian) * rows).sum(dtype=torch.float64).item()


def trace(losses: Sequence[float]) -> dict[str, float]:
    """The losses after each step as the diagnostics "loss_0", "loss_1" and so on."""
    return {f"loss_{step}": loss for step, loss in enumerate(losses)}
