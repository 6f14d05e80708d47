"""QuantEase: pass after pass, every weight goes to the level that is best for all the others as they are.

The grid is fixed. Some passes leave rounding out: the weights leave the grid for where the loss is smaller, and the
next pass rounds them anew from there. That is how a poor local optimum is left behind.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from quantlab.api import MAX_BITS, MIN_BITS, InputStatistics, LayerProblem, QuantizedLayer, QuantizerInfo, Statistic
from quantlab.solvers.grid import as_stored, minmax_grid
from quantlab.solvers.options import check_at_least_one, check_choice, check_fraction
from quantlab.solvers.order import ColumnOrder, processing_order
from quantlab.solvers.outliers import as_outliers
from quantlab.solvers.request import check_request, prepared_for, with_loss, working_dtype
from quantlab.solvers.sweep import SweepFactor, factor_for_sweep
from quantlab.solvers.trace import loss_of_some_rows, trace
from quantlab_quantease.outliers import OutlierKind, OutlierSupport
from quantlab_quantease.state import DescentState

Start = Literal["float", "gptq", "rtn"]

_RELAXATION_PERIOD = 3
_LAST_RELAXATION = 25
_GPTQ_DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class QuanteaseQuantizer:
    """Cyclic coordinate descent over the codes of a min-max grid (arXiv:2309.01885, Algorithms 1 and 2).

    Outliers of either kind are stored one by one, with 16 bits for the value and 32 for its place, so 1% of them
    takes half a bit per weight. They are chosen among all rows together: with outliers, rows are not independent.

    Attributes:
        iterations: passes over all inputs; after a start from GPTQ, 2 are customary.
        column_order: "natural" visits inputs from first to last, "hessian_diagonal" strong ones first.
        start: "float" begins at the original weights and leaves out rounding in passes 1, 4, 7, ..., 25, counted from
            0, unless they are the last. "gptq" and "rtn" begin at the answers of these methods and only descend.
        outliers: "unstructured" corrects single weights, "structured" whole columns, "none" nothing.
        outlier_fraction: share of the weights, or of the columns, that are corrected; not read without outliers.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="quantease",
        summary="uniform grid with codes refined by coordinate descent",
        paper="arXiv:2309.01885",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        needs=frozenset({Statistic.HESSIAN}),
        supports_groups=True,
        presets={"paper": {"iterations": 30, "column_order": "natural", "start": "float", "outliers": "none"}},
    )

    iterations: int = 30
    column_order: ColumnOrder = "natural"
    start: Start = "float"
    outliers: OutlierKind = "none"
    outlier_fraction: float = 0.01

    def __post_init__(self) -> None:
        check_choice("column_order", self.column_order, ColumnOrder)
        check_at_least_one("iterations", self.iterations)
        check_choice("start", self.start, Start)
        check_choice("outliers", self.outliers, OutlierKind)
        check_fraction("outlier_fraction", self.outlier_fraction)
        if self.outliers != "none":
            # The way past a frozen dataclass.
            object.__setattr__(self, "info", replace(self.info, row_independent=False))

    def prepare_statistics(self, statistics: InputStatistics, dtype: torch.dtype) -> SweepFactor | None:
        """The factor of the damped Hessian for a start from GPTQ."""
        if self.start != "gptq":
            return None
        hessian = statistics.hessian.to(dtype)
        order = processing_order(hessian, self.column_order, backwards=False)
        return factor_for_sweep(hessian, order, _GPTQ_DAMPING, dtype)

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer.

        Diagnostics are its loss, that of some rows whenever the weights are on the grid, and, for a start from GPTQ,
        its damping and fallbacks.
        """
        check_request(problem, self.info)
        dtype = working_dtype(problem.weight, problem.require_hessian())
        weight, hessian = problem.weight.to(dtype), problem.require_hessian().to(dtype)
        support = OutlierSupport(self.outliers, self.outlier_fraction)
        grid = minmax_grid(support.without(weight, problem.spec.group_size), problem.spec)
        order = processing_order(hessian, self.column_order, backwards=False)
        state = DescentState(weight, hessian, order, grid, support)
        diagnostics, losses = self._start(state, problem), []
        for iteration in range(self.iterations):
            if self._leaves_out_rounding(iteration):
                state.relax()
            else:
                state.round()
            if self.outliers != "none":
                state.update_outliers()
            if state.on_grid:
                losses.append(loss_of_some_rows(state.error, hessian))
        layer = QuantizedLayer(codes=state.codes, codebook=as_stored(grid), outliers=as_outliers(state.sparse))
        return with_loss(layer, problem, **diagnostics, **trace(losses))

    def _start(self, state: DescentState, problem: LayerProblem) -> dict[str, float]:
        if self.start == "gptq":
            return state.start_from_gptq(prepared_for(self, problem))
        if self.start == "rtn":
            state.start_from_rtn()
        return {}

    def _leaves_out_rounding(self, iteration: int) -> bool:
        in_turn = iteration % _RELAXATION_PERIOD == 1 and iteration <= _LAST_RELAXATION
        return self.start == "float" and in_turn and iteration != self.iterations - 1
