"""GPTQ as one triangular sweep over a uniform grid."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantlab.api import (
    MAX_BITS,
    MIN_BITS,
    CodebookSpec,
    InputStatistics,
    LayerProblem,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
    UniformGrid,
)
from quantlab.solvers.grid import ClipSearch, as_stored, fit_grid
from quantlab.solvers.nearest import GridRounder
from quantlab.solvers.options import check_at_least_one, check_choice, check_finite_and_not_negative
from quantlab.solvers.order import ColumnOrder, processing_order
from quantlab.solvers.request import check_request, prepared_for, with_loss, working_dtype
from quantlab.solvers.sweep import Assignment, SweepFactor, factor_for_sweep, sweep
from quantlab_gptq.groups import DynamicGroups

Groups = Literal["static", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class GptqQuantizer:
    """Round inputs one after the other, shifting the rest to compensate (arXiv:2210.17323, Algorithm 1).

    The grid of a row, or of a static group, is fitted to the original weights. So groups stay contiguous whatever the
    order of the inputs, and inference needs no index of groups. Dynamic groups know the weights that they are going to
    round, compensation included, at the price of the natural order.

    Attributes:
        column_order: "hessian_diagonal" quantizes strong inputs first ("act-order"), "natural" from first to last.
        damping: fraction of the mean diagonal added to the Hessian.
        block_size: inputs per block of the sweep; changes speed, not results. Dynamic groups are blocks themselves.
        groups: "static" fits all grids beforehand; "dynamic" fits a group's grid when the sweep enters the group, and
            takes column_order "natural" only. Without a group size they are the same.
        clip_search: "none" covers the range of the weights; "weight" and "hessian" shrink it to what serves best, see
            `quantlab.solvers.grid.fit_grid`.
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
    groups: Groups = "static"
    clip_search: ClipSearch = "none"

    def __post_init__(self) -> None:
        check_choice("column_order", self.column_order, ColumnOrder)
        check_choice("clip_search", self.clip_search, ClipSearch)
        check_finite_and_not_negative("damping", self.damping)
        check_at_least_one("block_size", self.block_size)
        check_choice("groups", self.groups, Groups)
        if self.groups == "dynamic" and self.column_order != "natural":
            raise ValueError(
                f"groups='dynamic' does not go with column_order={self.column_order!r}, which enters every group many "
                "times and finishes it late; set column_order: natural, or groups: static"
            )

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
        if self.groups == "dynamic" and problem.spec.group_size is not None:
            grid, assignment = self._dynamic(weight, hessian, factor, problem.spec.bits, problem.spec.group_size)
        else:
            grid = self._fit(weight, problem.spec, hessian.diagonal())
            assignment = sweep(weight, factor, GridRounder(grid, problem.in_features), block_size=self.block_size)
        layer = QuantizedLayer(codes=assignment.codes, codebook=as_stored(grid))
        return with_loss(layer, problem, **factor.diagnostics())

    def _dynamic(
        self, weight: Tensor, hessian: Tensor, factor: SweepFactor, bits: int, group_size: int
    ) -> tuple[UniformGrid, Assignment]:
        diagonal, per_row = hessian.diagonal(), CodebookSpec(bits=bits)
        unknown = weight.new_ones(len(weight), weight.shape[1] // group_size)
        grid = UniformGrid(scale=unknown, zero=unknown.clone(), bits=bits)
        groups = DynamicGroups(
            lambda targets, columns: self._fit(targets, per_row, diagonal[columns]), grid, group_size
        )
        assignment = sweep(weight, factor, groups.nearest, block_size=group_size, enter_block=groups.enter)
        return grid, assignment

    def _fit(self, weight: Tensor, spec: CodebookSpec, hessian_diagonal: Tensor) -> UniformGrid:
        return fit_grid(weight, spec, self.clip_search, hessian_diagonal=hessian_diagonal)
