"""GANQ: alternate between choosing codes for a codebook and refitting the codebook to the codes.

For every output row w, GANQ seeks codes and a codebook that minimise e H eᵀ, the expected squared error of the
layer's output, where e = w - ŵ (arXiv:2501.12956, Eq. 3). Two steps alternate:

    assignment step    codebook fixed: a triangular sweep with error feedback (`quantlab.solvers.sweep`)
    codebook step      codes fixed: the exact minimiser in closed form (`quantlab.solvers.codebook`)

The codebook step never raises the loss. The assignment step can, because it is greedy: so the best pair that a row
has met is kept, row by row, judged by the undamped Hessian.

By default we go beyond the published algorithm. Several first tables are tried. The assignment step ends with block
descent (`quantlab.solvers.blocks`): the sweep commits to each code while later ones are still open, block descent sees
them all. And once the alternation has found a good region, rounds of block descent and codebook step only descend;
where few inputs share a level, joint descent (`quantlab.solvers.joint`) moves codes and table together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
from quantlab.solvers.codebook import LevelGram
from quantlab.solvers.nearest import with_dead_rounded
from quantlab.solvers.options import (
    check_at_least_one,
    check_choice,
    check_finite_and_not_negative,
    check_fraction,
    check_not_negative,
)
from quantlab.solvers.order import ColumnOrder, inverse_order, processing_order
from quantlab.solvers.outliers import as_outliers, largest
from quantlab.solvers.request import check_request, prepared_for, row_chunks, stacked, with_loss, working_dtype
from quantlab.solvers.sweep import SweepFactor, factor_for_sweep
from quantlab.solvers.trace import trace
from quantlab_ganq.alternation import Alternation, Candidate, Keep, best_of
from quantlab_ganq.conditioning import Preconditioner, diagonally_dominant_factor, shrinkage_for, shrunk
from quantlab_ganq.outliers import Corrections, OutlierSelection, tails
from quantlab_ganq.starts import published_table, target_table, weight_table

Start = Literal["kmeans", "screened", "published"]

_PAPER: dict[str, object] = {
    "iterations": 10,
    "column_order": "natural",
    "damping": 0.01,
    "preconditioner": "damping",
    "shrinkage": False,
    "start": "kmeans",
    "block_passes": 0,
    "polish_rounds": 0,
    "keep": "row",
}


@dataclass(frozen=True, kw_only=True)
class GanqQuantizer:
    """Per-row look-up tables by alternating minimisation of the layer loss.

    Preset "best" is the default. "paper" is the published algorithm, with 1% damping and k-means for the first table.
    "published_code" has the first tables and the preconditioner of the authors' code, too; it takes 3 and 4 bits.

    Attributes:
        iterations: pairs of assignment and codebook step.
        column_order: "hessian_diagonal" quantizes strong inputs first, "natural" from last to first as published.
        damping: fraction of the mean diagonal added to the Hessian in the triangular sweep, and only there.
        preconditioner: "damping" as above. "diagonal_dominance" adds to each diagonal entry what makes it as large as
            the magnitudes of the rest of its row together, and reads no damping; it takes most of the feedback away.
        shrinkage: pull the off-diagonal entries of the Hessian towards zero where there are few tokens per input:
            what they say about correlations is then mostly chance.
        start: the first table. "kmeans" of the weights. "screened" tries three, one iteration each, and goes on with
            the best for each row: k-means of the weights, weighted by their inputs' mean squares, and two of the
            sweep's targets, weighted by its pivots and by their squares. "published" has fixed places in the range
            (4 bits) or among the quantiles (3 bits).
        block_passes: passes of block descent that end each assignment step; 0 as published.
        polish_rounds: block descent, codebook step and joint descent after the alternation, from the best answers; then
            the codes descend once more on the table as float16 stores it. 0 leaves out all.
        keep: "row" keeps the best iterate of every row, "layer" that of the whole layer, as published.
        outlier_fraction: share of each row's weights that get a sparse correction (GANQ*).
        outlier_selection: "tails" takes both ends of each row. "cost" takes the weights that cost most when the row
            is quantized without outliers.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="ganq",
        summary="look-up table and codes fitted jointly to the layer's output",
        paper="arXiv:2501.12956",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        needs=frozenset({Statistic.HESSIAN}),
        presets={
            "best": {},
            "paper": _PAPER,
            "published_code": {
                **_PAPER,
                "preconditioner": "diagonal_dominance",
                "start": "published",
                "keep": "layer",
            },
        },
    )

    iterations: int = 8
    column_order: ColumnOrder = "hessian_diagonal"
    damping: float = 0.01
    preconditioner: Preconditioner = "damping"
    shrinkage: bool = True
    start: Start = "screened"
    block_passes: int = 2
    polish_rounds: int = 6
    keep: Keep = "row"
    outlier_fraction: float = 0.0
    outlier_selection: OutlierSelection = "tails"

    def __post_init__(self) -> None:
        check_at_least_one("iterations", self.iterations)
        check_choice("column_order", self.column_order, ColumnOrder)
        check_finite_and_not_negative("damping", self.damping)
        check_choice("preconditioner", self.preconditioner, Preconditioner)
        check_choice("start", self.start, Start)
        check_not_negative("block_passes", self.block_passes)
        check_not_negative("polish_rounds", self.polish_rounds)
        check_choice("keep", self.keep, Keep)
        check_fraction("outlier_fraction", self.outlier_fraction)
        check_choice("outlier_selection", self.outlier_selection, OutlierSelection)
        info = self.info
        if self.start == "published":
            info = replace(info, bits=frozenset({3, 4}))
        if self.keep == "layer":
            info = replace(info, row_independent=False)
        object.__setattr__(self, "info", info)  # the way past a frozen dataclass

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Quantize one layer.

        Diagnostics are its loss, the damping needed, a fallback if that is more than asked for, and the loss of the
        best answer so far after every iteration and round of polish.
        """
        check_request(problem, self.info)
        answer, diagnostics = self._solve(problem)
        return with_loss(answer, problem, **diagnostics)

    def prepare_statistics(self, statistics: InputStatistics, dtype: torch.dtype) -> SweepFactor:
        """The factor of the preconditioned Hessian."""
        hessian, share = statistics.hessian, self._shrinkage(statistics)
        if self.preconditioner == "diagonal_dominance":
            return diagonally_dominant_factor(shrunk(hessian, share), self._order(hessian), dtype)
        return factor_for_sweep(hessian, self._order(hessian), self.damping, dtype, shrinkage=share)

    def _solve(self, problem: LayerProblem) -> tuple[QuantizedLayer, dict[str, float]]:
        layer = self._pose(problem)
        chunks = [slice(None)] if self.keep == "layer" else row_chunks(layer.weight)
        losses: list[list[Tensor]] = [[] for _ in chunks]
        parts = [
            self._solve_rows(layer.of_rows(rows), problem.spec.levels, own)
            for rows, own in zip(chunks, losses, strict=True)
        ]
        of_layer = [torch.cat(of_chunks).sum().item() for of_chunks in zip(*losses, strict=True)]
        return stacked(parts), {**layer.factor.diagnostics(), **trace(of_layer)}

    def _solve_rows(self, layer: Alternation, levels: int, losses: list[Tensor]) -> QuantizedLayer:
        corrections = self._first_corrections(layer, levels)
        if corrections is not None:
            layer = replace(layer, weight=layer.weight - corrections.sparse)
        best = best_of(self._candidates(layer, levels), self.keep, losses)
        for _ in range(self.polish_rounds):
            if corrections is not None:
                layer, best = corrections.refit(layer, best)
            best = layer.polish(best)
            losses.append(best.loss)
        codes = layer.settled_codes(best.fitted) if self.polish_rounds else best.fitted.codes
        lut = Lut(values=best.fitted.levels[:, None].float())
        codes = with_dead_rounded(codes, layer.weight, lut, layer.hessian)
        if corrections is None:
            return QuantizedLayer(codes=codes, codebook=lut)
        corrections.refit(layer, replace(best, fitted=replace(best.fitted, codes=codes)))
        return QuantizedLayer(codes=codes, codebook=lut, outliers=as_outliers(corrections.sparse))

    def _pose(self, problem: LayerProblem) -> Alternation:
        statistics = problem.require_statistics()
        weight = problem.weight.to(working_dtype(problem.weight, statistics.hessian))
        factor: SweepFactor = prepared_for(self, problem)
        hessian = shrunk(statistics.hessian, self._shrinkage(statistics)).to(weight.dtype)
        return Alternation(
            weight=weight,
            hessian=hessian,
            order=self._order(statistics.hessian),
            factor=factor,
            gram=LevelGram(hessian),
            generator=torch.Generator().manual_seed(problem.seed),
        )

    def _order(self, hessian: Tensor) -> Tensor:
        return processing_order(hessian, self.column_order, backwards=True)

    def _shrinkage(self, statistics: InputStatistics) -> float:
        return shrinkage_for(statistics.hessian, statistics.num_tokens) if self.shrinkage else 0.0

    def _first_corrections(self, layer: Alternation, levels: int) -> Corrections | None:
        if self.outlier_fraction == 0:
            return None
        if self.outlier_selection == "tails":
            support = tails(layer.weight, self.outlier_fraction)
            return Corrections(support, torch.where(support, layer.weight, 0.0))
        pilot = best_of(self._candidates(layer, levels), self.keep).fitted
        support = largest(layer.loss_terms(pilot.levels), self.outlier_fraction)
        return Corrections(support, torch.where(support, layer.weight - pilot.dequantize(), 0.0))

    def _candidates(self, layer: Alternation, levels: int) -> Iterator[Candidate]:
        if self.start != "screened":
            yield from layer.iterate(self._table(layer, levels), self.iterations, self.block_passes)
            return
        screened = [
            candidate
            for table in _screened_tables(layer, levels)
            for candidate in layer.iterate(table, 1, self.block_passes)
        ]
        yield from screened
        table = best_of(screened, self.keep).fitted.levels
        screened.clear()  # for their memory
        yield from layer.iterate(table, self.iterations - 1, self.block_passes)

    def _table(self, layer: Alternation, levels: int) -> Tensor:
        if self.start == "published":
            return published_table(layer.weight, levels, with_outliers=self.outlier_fraction > 0)
        return weight_table(layer.weight, levels, (layer.hessian.diagonal() > 0).to(layer.weight.dtype))


def _screened_tables(layer: Alternation, levels: int) -> Iterator[Tensor]:
    strength = layer.hessian.diagonal()
    yield weight_table(layer.weight, levels, strength)
    pivots = torch.where(strength > 0, layer.factor.pivots[inverse_order(layer.factor.columns)].to(strength), 0.0)
    for importance in (pivots, pivots.square()):
        yield target_table(layer.weight, levels, layer.factor, importance)
