"""GANQ*: a few weights per row get a sparse correction beside the table (arXiv:2501.12956, Section 4).

With corrections S the dequantized weight is What + S, everywhere: codes and table approximate W - S. At first S takes
the whole outlier, so that the table has to represent 0 in its place. Whenever codes or table have changed, S is
refitted to them, exactly, as is a table: the corrections of a row solve

    s H_OO = e H[:, O],        O the row's outliers, e = w - ŵ its error without them,

so that each makes its weight right, and a little more to make up for the errors of the others.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from quantlab.api import layer_loss
from quantlab_ganq.alternation import Alternation, Candidate

OutlierSelection = Literal["tails", "cost"]

_CHUNK_ELEMENTS = 1 << 22
_RIDGE = 1e-9


class Corrections:
    """The sparse part S of one layer.

    Args:
        support: (out_features, in_features) mask with the same number of outliers in every row.
        first: what S starts with, (out_features, in_features), zero outside the support.

    Attributes:
        sparse: S as it is now.
    """

    def __init__(self, support: Tensor, first: Tensor) -> None:
        self._support = support
        self.sparse = first

    def refit(self, layer: Alternation, best: Candidate) -> tuple[Alternation, Candidate]:
        """Fit S to codes and table; the layer and the answer afterwards, with its loss."""
        change = refit_corrections(layer.weight - best.fitted.dequantize(), layer.hessian, self._support)
        self.sparse = self.sparse + change
        layer = replace(layer, weight=layer.weight - change)
        return layer, replace(best, loss=layer_loss(layer.weight, best.fitted.dequantize(), layer.hessian))


def tails(weight: Tensor, fraction: float) -> Tensor:
    """The ends of each row, half of the share at either end: a mask (out_features, in_features)."""
    count = round(fraction * weight.shape[1])
    ordered = weight.argsort(dim=1, stable=True)
    ends = torch.cat([ordered[:, : count // 2], ordered[:, weight.shape[1] - (count - count // 2) :]], dim=1)
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, ends, True)


def refit_corrections(error: Tensor, hessian: Tensor, support: Tensor) -> Tensor:
    """What to add to the corrections to minimise the loss of every row, codes and table being fixed.

    Args:
        error: (out_features, in_features), W - What - S.
        hessian: (in_features, in_features), undamped.
        support: (out_features, in_features) mask with the same number of outliers in every row.

    Returns:
        (out_features, in_features), zero outside the support.
    """
    count = int(support[0].sum())
    columns = support.nonzero()[:, 1].view(len(support), count)
    gradient = (error @ hessian).gather(1, columns).double()
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // max(1, count * count))
    chunks = zip(columns.split(rows_per_chunk), gradient.split(rows_per_chunk), strict=True)
    step = torch.cat([_solve(hessian, part, right) for part, right in chunks])
    return torch.zeros_like(error).scatter_(1, columns, step.to(error.dtype))


def _solve(hessian: Tensor, columns: Tensor, right: Tensor) -> Tensor:
    gram = hessian[columns[:, :, None], columns[:, None, :]].double()
    energy = gram.diagonal(dim1=1, dim2=2)
    scale = torch.where(energy > 0, energy, 1.0).rsqrt()
    scaled = scale[:, :, None] * gram * scale[:, None, :]
    # As in the codebook step, a ridge makes the step shorter, but never one that raises the loss.
    scaled.diagonal(dim1=1, dim2=2).copy_(1 + torch.full_like(energy, _RIDGE))
    solution: Tensor = torch.linalg.solve(scaled, (scale * right)[..., None])
    return solution.squeeze(2) * scale
