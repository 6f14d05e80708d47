"""What every method does first and last: refuse what it cannot do, pick a precision, report its loss."""

from dataclasses import replace

import torch
from torch import Tensor

from quantlab.api import LayerProblem, QuantizedLayer, QuantizerInfo, Statistic, layer_loss


def check_request(problem: LayerProblem, info: QuantizerInfo) -> None:
    """Refuse a storage budget that the method does not support.

    Raises:
        ValueError: the code width or the group size is not among the method's capabilities.
    """
    if problem.spec.bits not in info.bits:
        supported = ", ".join(map(str, sorted(info.bits)))
        raise ValueError(
            f"{problem.name}: {info.name} does not support bits={problem.spec.bits}; choose from {supported}"
        )
    if problem.spec.group_size is not None and not info.supports_groups:
        raise ValueError(
            f"{problem.name}: {info.name} has one codebook per output row and does not support "
            f"group_size={problem.spec.group_size}; set group_size: null"
        )


def needing(info: QuantizerInfo, statistic: Statistic) -> QuantizerInfo:
    """The capabilities of a method whose options make it need one more statistic."""
    return replace(info, needs=info.needs | {statistic})


def working_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if every operand is float64, else float32: half precision is for storage, not for arithmetic."""
    return torch.float64 if all(operand.dtype == torch.float64 for operand in operands) else torch.float32


def with_loss(layer: QuantizedLayer, problem: LayerProblem, **diagnostics: float) -> QuantizedLayer:
    """The same layer, reporting its loss by the undamped Hessian beside other diagnostics."""
    loss = layer_loss(problem.weight, layer.dequantize(), problem.require_hessian()).sum().item()
    return replace(layer, diagnostics={"loss": loss, **diagnostics})
