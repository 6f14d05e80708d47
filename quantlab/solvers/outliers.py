"""Sparse corrections beside a dense quantized weight: which entries get one, and how they are handed over."""

import torch
from torch import Tensor

from quantlab.api import Outliers


def largest(strength: Tensor, fraction: float) -> Tensor:
    """Which entries are the largest: a mask of the shape of `strength` with this share of True along its last axis.

    Args:
        strength: (..., entries); each vector along the last axis is by itself.
        fraction: share of the entries, 0 to 1, rounded to whole entries.
    """
    count = round(fraction * strength.shape[-1])
    return torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, strength.topk(count).indices, True)


def as_outliers(sparse: Tensor) -> Outliers | None:
    """The entries of a matrix that are not zero, as they are stored; None if there is none.

    Args:
        sparse: (out_features, in_features), to be added to the dense quantized weight.
    """
    rows, columns = sparse.nonzero(as_tuple=True)
    if not len(rows):
        return None
    return Outliers(rows=rows, columns=columns, values=sparse[rows, columns].float())
