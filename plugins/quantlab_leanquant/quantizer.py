"""LeanQuant's non-uniform variant: GPTQ's error feedback on a look-up table that knows what errors will cost."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.api import (
    MAX_BITS,
    MIN_BITS,
    InputStatistics,
    LayerProblem,
    Lut,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
)
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.options import check_choice, check_finite_and_not_negative
from quantlab.solvers.order import ColumnOrder, inverse_order, processing_order
from quantlab.solvers.request import check_request, prepared_for, with_loss, working_dtype
from quantlab.solvers.sweep import SweepFactor, factor_for_sweep, sweep

_KMEANS_ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class LeanquantQuantizer:
    """Loss-error-aware look-up tables (arXiv:2407.10032, non-uniform variant).

    With the damped Hessian H = L Lᵀ, its inputs in the order of the factor, rounding input j off its target by δ costs
    L_jj² δ² (`quantlab.solvers.sweep`); in GPTQ's notation, with the inverse H⁻¹ = Uᵀ U, that is (δ / U_jj)². LeanQuant
    fits the table of each row to the row's weights by k-means with weights U_jj⁻ᵖ = L_jjᵖ, as its published code does
    where the paper's text has the diagonal of H⁻¹, then sweeps once with the table fixed.

    Attributes:
        exponent: p. 2 is what a rounding error costs, 0 is unweighted; the paper recommends 4, which guards the
            inputs with the largest pivots.
        damping: fraction of the mean diagonal added to the Hessian.
        column_order: "hessian_diagonal" quantizes strong inputs first ("act-order"), "natural" from first to last.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="leanquant",
        summary="look-up table by loss-weighted k-means, with second-order error feedback",
        paper="arXiv:2407.10032",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        needs=frozenset({Statistic.HESSIAN}),
        presets={"paper": {"exponent": 4.0, "damping": 0.01, "column_order": "hessian_diagonal"}},
    )

    exponent: float = 4.0
    damping: float = 0.01
    column_order: ColumnOrder = "hessian_diagonal"

    def __post_init__(self) -> None:
        check_choice("column_order", self.column_order, ColumnOrder)
        check_finite_and_not_negative("exponent", self.exponent)
        check_finite_and_not_negative("damping", self.damping)

    def prepare_statistics(self, statistics: InputStatistics, dtype: torch.dtype) -> SweepFactor:
        """The factor of the damped Hessian."""
        order = processing_order(statistics.hessian, self.column_order, backwards=False)
        return factor_for_sweep(statistics.hessian, order, self.damping, dtype)

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer; diagnostics are its loss and the damping needed, a fallback if more than asked for."""
        check_request(problem, self.info)
        hessian = problem.require_hessian()
        weight = problem.weight.to(working_dtype(problem.weight, hessian))
        factor: SweepFactor = prepared_for(self, problem)
        importance = self._importance(factor, dead=hessian.diagonal() == 0)
        levels = kmeans_levels(weight, problem.spec.levels, _KMEANS_ITERATIONS, importance)
        lut = Lut(values=levels[:, None])
        assignment = sweep(weight, factor, LutRounder(lut, problem.in_features))
        layer = QuantizedLayer(codes=assignment.codes, codebook=Lut(values=lut.values.float()))
        return with_loss(layer, problem, **factor.diagnostics())

    def _importance(self, factor: SweepFactor, dead: Tensor) -> Tensor:
        """The weight of each input's values, (in_features,): none for a dead input, whose pivot is made up."""
        # Relative to the largest pivot, so that no exponent overflows.
        relative = (factor.pivots / factor.pivots.amax())[inverse_order(factor.columns)]
        return torch.where(dead, 0.0, relative.pow(self.exponent))
