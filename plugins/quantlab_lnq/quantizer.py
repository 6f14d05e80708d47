"""LNQ: alternate between the best codebook for the codes and better codes for the codebook.

Both steps descend on the same loss, e H eᵀ with the undamped Hessian (arXiv:2505.07004):

    codebook step      codes fixed: the exact minimiser in closed form (`quantlab.solvers.codebook`)
    coordinate descent codebook fixed: passes of exact minimisation over single codes (`quantlab.solvers.descent`)

So the loss of no row ever rises, and the last pair is the best.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, Lut, QuantizedLayer, QuantizerInfo, Statistic
from quantlab.solvers.codebook import Codebooks, refit_codebook
from quantlab.solvers.descent import descend
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder, nearest_codes, with_dead_rounded
from quantlab.solvers.options import check_at_least_one, check_choice
from quantlab.solvers.order import ColumnOrder, processing_order
from quantlab.solvers.request import check_request, with_loss, working_dtype
from quantlab.solvers.sweep import Assignment
from quantlab.solvers.trace import loss_of_some_rows, trace

_KMEANS_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True)
class LnqQuantizer:
    """Per-row look-up tables by alternating descent, from k-means of the weights.

    The published start is k-means weighted by the sensitivity of the model's output; here each input counts by its
    mean square, H_jj, which is what the layer's own loss knows about it.

    Attributes:
        iterations: pairs of codebook step and coordinate descent; one more codebook step follows.
        cd_sweeps: passes over all codes in each coordinate descent, fewer if one changes nothing.
        column_order: "hessian_diagonal" visits strong inputs first, "natural" from first to last.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="lnq",
        summary="look-up table and codes by alternating descent",
        paper="arXiv:2505.07004",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        needs=frozenset({Statistic.HESSIAN}),
        presets={"paper": {"iterations": 2, "cd_sweeps": 4, "column_order": "natural"}},
    )

    iterations: int = 3
    cd_sweeps: int = 4
    column_order: ColumnOrder = "hessian_diagonal"

    def __post_init__(self) -> None:
        check_choice("column_order", self.column_order, ColumnOrder)
        check_at_least_one("iterations", self.iterations)
        check_at_least_one("cd_sweeps", self.cd_sweeps)

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer; diagnostics are its loss, and that of some rows after each codebook step."""
        check_request(problem, self.info)
        dtype = working_dtype(problem.weight, problem.require_hessian())
        weight, hessian = problem.weight.to(dtype), problem.require_hessian().to(dtype)
        losses: list[float] = []
        fitted = self._alternate(weight, hessian, _start(weight, hessian, problem.spec.levels), losses)
        lut = Lut(values=fitted.levels[:, None].float())
        codes = with_dead_rounded(fitted.codes, weight, lut, hessian)
        return with_loss(QuantizedLayer(codes=codes, codebook=lut), problem, **trace(losses))

    def _alternate(self, weight: Tensor, hessian: Tensor, fitted: Codebooks, losses: list[float]) -> Codebooks:
        order = processing_order(hessian, self.column_order, backwards=False)
        fitted = _refit(weight, hessian, fitted)
        for _ in range(self.iterations):
            nearest = LutRounder(Lut(values=fitted.levels[:, None]), weight.shape[1])
            start = Assignment(codes=fitted.codes, error=weight - fitted.dequantize())
            losses.append(loss_of_some_rows(start.error, hessian))
            codes = descend(weight, start, hessian, order, nearest, sweeps=self.cd_sweeps).codes
            fitted = _refit(weight, hessian, Codebooks(levels=fitted.levels, codes=codes))
        losses.append(loss_of_some_rows(weight - fitted.dequantize(), hessian))
        return fitted


def _start(weight: Tensor, hessian: Tensor, levels: int) -> Codebooks:
    centers = kmeans_levels(weight, levels, _KMEANS_ITERATIONS, hessian.diagonal())
    return Codebooks(levels=centers, codes=nearest_codes(weight, Lut(values=centers[:, None])))


def _refit(weight: Tensor, hessian: Tensor, fitted: Codebooks) -> Codebooks:
    return refit_codebook(fitted.levels, fitted.codes, weight - fitted.dequantize(), hessian)
