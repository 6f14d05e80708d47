"""The alternation between assignment step and codebook step, and what is kept of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from quantlab.api import Lut
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.codebook import CodebookFit, Codebooks, LevelGram
from quantlab.solvers.descent import descend
from quantlab.solvers.joint import descend_jointly
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.sweep import Assignment, SweepFactor, sweep

Keep = Literal["row", "layer"]
_BLOCK_SIZE = 64
_FEWEST_BLOCKS = 3  # a single block would be the sweep over again
_MOST_INPUTS_PER_LEVEL = 32  # beyond, a table hardly feels the change of a single code
_MOST_LEVELS = 16  # the work grows with their square
_LAST_SWEEPS = 2
_STORED_PRECISION = 1 << 11  # a float16 has eleven significant bits


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A possible answer.

    Attributes:
        fitted: tables and codes.
        loss: (out_features,) float64, of every row by the undamped Hessian.
    """

    fitted: Codebooks
    loss: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Alternation:
    """One layer, prepared for both steps.

    Attributes:
        weight: (out_features, in_features), without the corrections of outliers if there are any.
        hessian: (in_features, in_features), undamped, in the dtype of the weight.
        order: (in_features,) int64, the input quantized first, second, and so on.
        factor: of the preconditioned Hessian in this order.
        gram: of the Hessian.
        generator: draws the blocks of block descent.
    """

    weight: Tensor
    hessian: Tensor
    order: Tensor
    factor: SweepFactor
    gram: LevelGram
    generator: torch.Generator

    def of_rows(self, rows: slice) -> "Alternation":
        """The same for some rows only; random blocks are drawn anew, so that no row depends on the rows around it."""
        generator = torch.Generator().set_state(self.generator.get_state())
        return replace(self, weight=self.weight[rows], generator=generator)

    def iterate(self, table: Tensor, iterations: int, block_passes: int) -> Iterator[Candidate]:
        """Alternate from a table, (out_features, levels) ascending; each iterate may be better or worse.

        Args:
            table: for the first assignment step.
            iterations: how many.
            block_passes: passes of block descent that end each assignment step.
        """
        for _ in range(iterations):
            candidate = self._refit(table, sweep(self.weight, self.factor, self._rounder(table)), block_passes)
            table = candidate.fitted.levels
            yield candidate

    def polish(self, start: Candidate) -> Candidate:
        """Block descent and a codebook step; where few inputs share a level, joint descent, too. No loss rises."""
        found = self._refit(start.fitted.levels, self._assignment(start.fitted, start.loss), block_passes=1)
        levels = found.fitted.levels.shape[1]
        if levels > _MOST_LEVELS or self.weight.shape[1] > _MOST_INPUTS_PER_LEVEL * levels:
            return found
        operands = (self.weight, found.fitted, found.loss, self.hessian, self.order, self._fit)
        fitted, loss = descend_jointly(*operands, passes=1)
        return best_of([found, Candidate(fitted=fitted, loss=loss)], "row")

    def settled_codes(self, fitted: Codebooks) -> Tensor:
        """The codes, (out_features, in_features), after a descent on the table's entries as float16 will store them."""
        table = _as_stored(fitted.levels)
        start = self._assignment(Codebooks(levels=table, codes=fitted.codes))
        return descend(self.weight, start, self.hessian, self.order, self._rounder(table), sweeps=_LAST_SWEEPS).codes

    def loss_terms(self, table: Tensor) -> Tensor:
        """What rounding each target of a sweep costs, L_jj² (v_j - ŵ_j)²: (out_features, in_features)."""
        error = sweep(self.weight, self.factor, self._rounder(table)).error
        columns = self.factor.columns
        missed = (error[:, columns] @ self.factor.feedback) * self.factor.pivots.to(error.dtype)  # v - ŵ = e L
        return torch.empty_like(missed).index_copy_(1, columns, missed.square())

    def _refit(self, table: Tensor, assignment: Assignment, block_passes: int) -> Candidate:
        live = int((self.hessian.diagonal() > 0).sum())
        assignment = descend_in_blocks(
            self.weight, assignment, table, self.hessian, self.order,
            passes=block_passes, generator=self.generator, block_size=max(1, min(_BLOCK_SIZE, live // _FEWEST_BLOCKS)),
        )  # fmt: skip
        fitted, loss = self._fit.refit(table, assignment)
        return Candidate(fitted=fitted, loss=loss)

    def _assignment(self, fitted: Codebooks, loss: Tensor | None = None) -> Assignment:
        return Assignment(codes=fitted.codes, error=self.weight - fitted.dequantize(), loss=loss)

    @cached_property
    def _fit(self) -> CodebookFit:
        return CodebookFit(self.weight, self.hessian, self.gram)

    def _rounder(self, table: Tensor) -> LutRounder:
        return LutRounder(Lut(values=table[:, None]), self.weight.shape[1])


def best_of(candidates: Iterable[Candidate], keep: Keep, losses: list[Tensor] | None = None) -> Candidate:
    """The candidate with the smallest loss, of every row by itself or of the layer; the first one on a tie.

    Args:
        candidates: at least one.
        keep: "row" or "layer".
        losses: is given the losses of all rows, (out_features,), of the best so far after each candidate.
    """
    iterator = iter(candidates)
    best = next(iterator)
    losses = [] if losses is None else losses
    losses.append(best.loss)
    for candidate in iterator:
        better = candidate.loss < best.loss
        if keep == "layer":
            better = (candidate.loss.sum() < best.loss.sum()).expand_as(better)
        best = _with_rows_of(best, candidate, better.nonzero().squeeze(1))
        losses.append(best.loss)
    return best


def _with_rows_of(best: Candidate, other: Candidate, rows: Tensor) -> Candidate:
    def mixed(kept: Tensor, taken: Tensor) -> Tensor:
        return kept.index_copy(0, rows, taken[rows])

    fitted = Codebooks(
        levels=mixed(best.fitted.levels, other.fitted.levels), codes=mixed(best.fitted.codes, other.fitted.codes)
    )
    return Candidate(fitted=fitted, loss=mixed(best.loss, other.loss))


def _as_stored(levels: Tensor) -> Tensor:
    # The significant bits of float16 without its range, which would make the answer depend on the weight's scale.
    mantissa, exponent = torch.frexp(levels)
    return torch.ldexp((mantissa * _STORED_PRECISION).round() / _STORED_PRECISION, exponent)
