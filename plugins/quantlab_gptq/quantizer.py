"""GPTQ as one triangular sweep over a fixed uniform grid."""

import math
from dataclasses import dataclass
from typing import ClassVar

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, QuantizedLayer, QuantizerInfo, Statistic
from quantlab.solvers.grid import as_stored, minmax_grid
from quantlab.solvers.nearest import GridRounder
from quantlab.solvers.order import ColumnOrder, check_column_order, processing_order
from quantlab.solvers.request import check_request, with_loss, working_dtype
from quantlab.solvers.sweep import factor_for_sweep, sweep


@dataclass(frozen=True, kw_only=True)
class GptqQuantizer:
    """Round inputs one after the other, shifting the rest to compensate (arXiv:2210.17323, Algorithm 1).

    The grid is the min-max grid of the original weights, per row or per group ("static groups"). So groups stay
    contiguous whatever the order of the inputs, and inference needs no index of groups.

    Attributes:
        column_order: "hessian_diagonal" quantizes strong inputs first ("act-order"), "natural" from first to last.
        damping: fraction of the mean diagonal added to the Hessian.
        block_size: inputs per block of the sweep; changes speed, not results.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="gptq",
        summary="uniform grid with second-order error feedback",
        paper="arXiv:2210.17323",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        needs=frozenset({Statistic.HESSIAN}),
        supports_groups=True,
    )

    column_order: ColumnOrder = "hessian_diagonal"
    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        check_column_order(self.column_order)
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping={self.damping} must be finite and not negative")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer; diagnostics are its loss and the damping needed, a fallback if more than asked for."""
        check_request(problem, self.info)
        hessian = problem.require_hessian()
        weight = problem.weight.to(working_dtype(problem.weight, hessian))
        grid = minmax_grid(weight, problem.spec)
        order = processing_order(hessian, self.column_order, backwards=False)
        factor = factor_for_sweep(hessian, order, self.damping, weight.dtype)
        assignment = sweep(weight, factor, GridRounder(grid, problem.in_features), block_size=self.block_size)
        layer = QuantizedLayer(codes=assignment.codes, codebook=as_stored(grid))
        return with_loss(layer, problem, damping=factor.damping, fallbacks=float(factor.damping > self.damping))
