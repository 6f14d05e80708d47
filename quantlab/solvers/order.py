"""The order in which inputs are quantized.

Whatever is quantized early is compensated by the inputs that follow, so the inputs that matter most should come
first. Published as "act-order" for GPTQ; for a layer of Llama type it is worth a quarter of the loss and it costs
nothing at inference, because codes return to their own columns.
"""

from typing import Literal

import torch
from torch import Tensor

ColumnOrder = Literal["natural", "hessian_diagonal"]


def processing_order(hessian: Tensor, column_order: ColumnOrder, *, backwards: bool) -> Tensor:
    """Which input is quantized first, second, and so on.

    Args:
        hessian: (in_features, in_features); only its diagonal, the inputs' mean square, is read.
        column_order: "hessian_diagonal" takes the strongest inputs first, "natural" follows their position.
        backwards: whether the natural order starts at the last input (GANQ) or at the first (GPTQ).

    Returns:
        (in_features,) int64, a permutation.
    """
    if column_order == "hessian_diagonal":
        return hessian.diagonal().argsort(descending=True, stable=True)
    ascending = torch.arange(len(hessian), device=hessian.device)
    return ascending.flip(0) if backwards else ascending


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes another: `x[order][inverse_order(order)]` is `x`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
