"""GANQ: alternate between choosing codes for a codebook and refitting the codebook to the codes.

For every output row w, GANQ seeks codes and a codebook that minimise e H eᵀ, the expected squared error of the
layer's output, where e = w - ŵ (arXiv:2501.12956, Eq. 3). Two steps alternate:

    assignment step    codebook fixed: a triangular sweep with error feedback (`quantlab.solvers.sweep`)
    codebook step      codes fixed: the exact minimiser in closed form (`quantlab.solvers.codebook`)

The codebook step never raises the loss. The assignment step can, because it is greedy: so the best pair that a row
has met is kept, row by row, judged by the undamped Hessian.

Unlike the published algorithm, the assignment step ends by default with passes of coordinate descent over its codes
(`quantlab.solvers.descent`): the sweep commits to each code while later ones are still open, descent sees them all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.api import (
    MAX_BITS,
    MIN_BITS,
    LayerProblem,
    Lut,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
    layer_loss,
)
from quantlab.solvers.codebook import Codebooks, refit_codebook
from quantlab.solvers.descent import descend
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import LutRounder, with_dead_rounded
from quantlab.solvers.options import check_at_least_one, check_choice, check_finite_and_not_negative
from quantlab.solvers.order import ColumnOrder, processing_order
from quantlab.solvers.request import check_request, with_loss, working_dtype
from quantlab.solvers.sweep import SweepFactor, factor_for_sweep, sweep

_KMEANS_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True)
class GanqQuantizer:
    """Per-row look-up tables by alternating minimisation of the layer loss.

    Attributes:
        iterations: pairs of assignment and codebook step.
        column_order: "hessian_diagonal" quantizes strong inputs first, "natural" from last to first as published.
        damping: fraction of the mean diagonal added to the Hessian in the triangular sweep, and only there.
        cd_sweeps: passes of coordinate descent that end each assignment step; 0 as published.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="ganq",
        summary="look-up table and codes fitted jointly to the layer's output",
        paper="arXiv:2501.12956",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        needs=frozenset({Statistic.HESSIAN}),
        presets={"paper": {"iterations": 10, "column_order": "natural", "damping": 0.01, "cd_sweeps": 0}},
    )

    iterations: int = 10
    column_order: ColumnOrder = "hessian_diagonal"
    damping: float = 0.01
    cd_sweeps: int = 2

    def __post_init__(self) -> None:
        check_choice("column_order", self.column_order, ColumnOrder)
        check_at_least_one("iterations", self.iterations)
        check_finite_and_not_negative("damping", self.damping)
        if self.cd_sweeps < 0:
            raise ValueError(f"cd_sweeps={self.cd_sweeps} must not be negative")

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer; diagnostics are its loss and the damping needed, a fallback if more than asked for."""
        check_request(problem, self.info)
        hessian = problem.require_hessian()
        weight = problem.weight.to(working_dtype(problem.weight, hessian))
        order = processing_order(hessian, self.column_order, backwards=True)
        factor = factor_for_sweep(hessian, order, self.damping, weight.dtype)
        start = _initial_levels(weight, hessian, problem.spec.levels)
        best = _best_per_row(self._iterates(weight, hessian, order, factor, start), weight, hessian)
        lut = Lut(values=best.levels[:, None].float())
        layer = QuantizedLayer(codes=with_dead_rounded(best.codes, weight, lut, hessian), codebook=lut)
        return with_loss(layer, problem, **factor.diagnostics())

    def _iterates(
        self, weight: Tensor, hessian: Tensor, order: Tensor, factor: SweepFactor, levels: Tensor
    ) -> Iterator[Codebooks]:
        hessian = hessian.to(weight.dtype)
        for _ in range(self.iterations):
            nearest = LutRounder(Lut(values=levels[:, None]), weight.shape[1])
            assignment = sweep(weight, factor, nearest)
            assignment = descend(weight, assignment, hessian, order, nearest, sweeps=self.cd_sweeps)
            refitted = refit_codebook(levels, assignment.codes, assignment.error, hessian)
            levels = refitted.levels
            yield refitted


def _initial_levels(weight: Tensor, hessian: Tensor, levels: int) -> Tensor:
    """k-means of each row's weights, without those whose input is dead: they would attract levels for nothing."""
    live = hessian.diagonal() > 0
    return kmeans_levels(weight[:, live] if live.any() else weight, levels, _KMEANS_ITERATIONS)


def _best_per_row(iterates: Iterator[Codebooks], weight: Tensor, hessian: Tensor) -> Codebooks:
    """The iterate with the smallest undamped loss, for every row by itself; the first one on a tie."""
    hessian = hessian.double()
    best = next(iterates)
    best_loss = layer_loss(weight, best.dequantize(), hessian)
    for candidate in iterates:
        loss = layer_loss(weight, candidate.dequantize(), hessian)
        better = (loss < best_loss)[:, None]
        best = Codebooks(
            levels=torch.where(better, candidate.levels, best.levels),
            codes=torch.where(better, candidate.codes, best.codes),
        )
        best_loss = torch.minimum(loss, best_loss)
    return best
