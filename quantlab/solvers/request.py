"""What every method does first and last: refuse what it cannot do, pick a precision, report its loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlab.api import (
    LayerProblem,
    Lut,
    Outliers,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
    StatisticsPreparer,
    layer_loss,
)
from quantlab_kernels import solver
from quantlab_kernels.solver_tiles import LANES

_CHUNKS = 8
_FEWEST_ROWS_PER_THREAD = LANES


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


def prepared_for(method: StatisticsPreparer, problem: LayerProblem) -> Any:
    """What `method.prepare_statistics` makes of a problem's statistics: as it comes with the problem, or made here."""
    if problem.prepared is not None:
        return problem.prepared
    dtype = working_dtype(problem.weight, problem.require_hessian())
    return method.prepare_statistics(problem.require_statistics(), dtype)


def row_chunks(weight: Tensor) -> list[slice]:
    """The rows to solve at a time, for methods that treat rows by themselves: it bounds their working memory.

    The native solvers give the same answer whatever the chunks are. PyTorch and CUDA take all rows at once, because
    there a step takes about as long for few rows as for many.

    Args:
        weight: (out_features, in_features).
    """
    rows = len(weight)
    if weight.is_cuda or not solver.usable(weight):
        return [slice(0, rows)]
    size = max(-(-rows // _CHUNKS), _FEWEST_ROWS_PER_THREAD * torch.get_num_threads())
    return [slice(start, start + size) for start in range(0, rows, size)]


def stacked(parts: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """One layer from chunks of its rows, which have look-up tables and no diagnostics."""
    codes = torch.cat([part.codes for part in parts])
    values = torch.cat([part.codebook.levels() for part in parts])
    outliers, first = [], 0
    for part in parts:
        if part.outliers is not None:
            outliers.append(replace(part.outliers, rows=part.outliers.rows + first))
        first += len(part.codes)
    return QuantizedLayer(codes=codes, codebook=Lut(values=values), outliers=_joined(outliers) if outliers else None)


def with_loss(layer: QuantizedLayer, problem: LayerProblem, **diagnostics: float) -> QuantizedLayer:
    """The same layer, reporting its loss by the undamped Hessian beside other diagnostics."""
    weight, weight_hat, hessian = problem.weight, layer.dequantize(), problem.require_hessian()
    if solver.usable(weight, hessian):
        losses = solver.row_losses(weight_hat.sub_(weight), hessian)  # in place: the sign of an error does not count
    else:
        losses = layer_loss(weight, weight_hat, hessian)
    loss = losses.sum().item()
    return replace(layer, diagnostics={"loss": loss, **diagnostics})


def _joined(parts: list[Outliers]) -> Outliers:
    return Outliers(
        rows=torch.cat([part.rows for part in parts]),
        columns=torch.cat([part.columns for part in parts]),
        values=torch.cat([part.values for part in parts]),
    )
