"""Choosing codes with error feedback: one triangular sweep, shared by GPTQ and by GANQ's assignment step.

With the damped Hessian H = L Lᵀ and the error e = w - ŵ of one row, the loss splits into one term per input,

    e H eᵀ = ||e L||² = sum_j L_jj² (v_j - ŵ_j)²,        v_j = w_j + sum_{u > j} e_u L_uj / L_jj.

The target v_j depends only on the errors of inputs behind j. So the sweep runs from the last input to the first and
rounds each target to its nearest level: the weight, shifted to make up for the errors already made.

This is back substitution (GANQ, arXiv:2501.12956, Eq. 20), it is Babai's nearest-plane algorithm, and on reversed
inputs it is GPTQ (arXiv:2210.17323), whose inverse factor plays the part of L (arXiv:2507.18553). Compared with
GPTQ's own form there is no matrix inverse, and targets refer to the original weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.solvers.cholesky import damped_cholesky
from quantlab.solvers.nearest import ColumnRounder, GridRounder, LutRounder, is_native
from quantlab.solvers.order import inverse_order
from quantlab_kernels import solver


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepFactor:
    """A Hessian, factored for sweeps; it serves every weight with the same inputs.

    Attributes:
        columns: (in_features,) int64, the inputs in the order of the factor: the *last* is quantized first.
        feedback: (in_features, in_features), L with its columns divided by its diagonal. Entry (u, j), u > j, is
            how much of the error of input `columns[u]` moves the target of input `columns[j]`.
        pivots: (in_features,) float64, the diagonal of L in the order of the factor.
        added: (in_features,) float64, what damping added to the diagonal of H, in the order of the factor.
        live: (in_features,) bool, in the order of the factor: whether the diagonal of H is not zero.
        requested_damping: the fraction of the mean diagonal that was to be added to the Hessian.
        damping: the fraction that was actually added.
    """

    columns: Tensor
    feedback: Tensor
    pivots: Tensor
    added: Tensor
    live: Tensor
    requested_damping: float
    damping: float

    def diagnostics(self) -> dict[str, float]:
        """What a method reports about its factor: the damping it took, a fallback if more than asked for."""
        return {"damping": self.damping, "fallbacks": float(self.damping > self.requested_damping)}

    def loss_terms(self) -> tuple[Tensor, Tensor]:
        """What the squares of (v_j - ŵ_j) and of e_j count in the loss by the undamped H: (in_features,) float64 each.

        The first are the squares of the pivots, the others take the damping off again. A dead input counts nothing.
        """
        return torch.where(self.live, self.pivots.square(), 0.0), torch.where(self.live, -self.added, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Codes chosen by a sweep, in the natural order of columns.

    Attributes:
        codes: (out_features, in_features) uint8.
        error: (out_features, in_features), the weight minus the levels that the codes select.
        loss: (out_features,) float64, e H eᵀ with the undamped Hessian; None if nobody computed it.
    """

    codes: Tensor
    error: Tensor
    loss: Tensor | None = None


def factor_for_sweep(
    hessian: Tensor, order: Tensor, damping: float, dtype: torch.dtype, *, shrinkage: float = 0.0
) -> SweepFactor:
    """Factor a Hessian for quantizing inputs in a given order.

    Args:
        hessian: (in_features, in_features), undamped.
        order: (in_features,) int64, the input quantized first, second, and so on.
        damping: fraction of the mean diagonal to add; see `damped_cholesky`.
        dtype: precision of the feedback; the factorisation itself is in float64.
        shrinkage: the off-diagonal entries are reduced by this share beforehand.

    Raises:
        NumericalError: the Hessian is not positive semi-definite.
    """
    columns = order.flip(0)
    live = hessian.diagonal()[columns] != 0
    in_place = torch.equal(columns, torch.arange(len(columns), device=columns.device))
    factor = damped_cholesky(hessian, damping, None if in_place else columns, shrinkage)
    pivots = factor.lower.diagonal().clone()  # a view would keep all of L in memory
    return SweepFactor(
        columns=columns,
        feedback=factor.lower.div_(pivots).to(dtype),
        pivots=pivots,
        added=factor.added,
        live=live,
        requested_damping=damping,
        damping=factor.damping,
    )


def sweep(
    weight: Tensor,
    factor: SweepFactor,
    nearest: ColumnRounder,
    *,
    block_size: int = 128,
    enter_block: Callable[[Tensor, Tensor], None] | None = None,
) -> Assignment:
    """Round every weight to the level nearest to its target, feeding errors back into later targets.

    Errors of finished blocks reach a block's targets through one matrix product; only within a block they travel
    column by column. The block size changes speed and rounding, not the mathematics.

    Args:
        weight: (out_features, in_features) in the dtype of the factor.
        factor: of the Hessian of the layer's inputs.
        nearest: rounds one column of targets.
        block_size: columns per block.
        enter_block: called before the columns of each block are rounded, with their positions, (columns,) int64, and
            with their weights as they best make up for all errors so far, (out_features, columns). Those are GPTQ's
            updated weights. A target is more: it also knows the errors of the columns between.
    """
    if not is_native(nearest, weight, factor.feedback):
        return _sweep_by_columns(weight, factor, nearest, block_size, enter_block)
    operands, unit = _native_operands(weight, factor)
    if enter_block is None:
        state = solver.SweepProblem(*operands)
        error = state.sweep(nearest.tiled())
    else:
        state = solver.BlockwiseSweep(*operands)
        error = _sweep_by_blocks(state, weight, factor, nearest, block_size, enter_block)
    return Assignment(codes=state.codes, error=error, loss=unit * state.loss)


def sweep_targets(weight: Tensor, factor: SweepFactor, nearest: ColumnRounder) -> Tensor:
    """What a sweep rounds: the targets v, (out_features, in_features) in the natural order of columns.

    Args:
        weight: (out_features, in_features) in the dtype of the factor.
        factor: of the Hessian of the layer's inputs.
        nearest: rounds one column of targets.
    """
    if is_native(nearest, weight, factor.feedback):
        operands, _ = _native_operands(weight, factor)
        return solver.SweepProblem(*operands).targets(nearest.tiled())
    error = sweep(weight, factor, nearest).error
    # v = w + e (L - 1) = ŵ + e L, with L scaled to a unit diagonal.
    targets = torch.addmm((weight - error)[:, factor.columns], error[:, factor.columns], factor.feedback)
    return targets[:, inverse_order(factor.columns)]


def _native_operands(
    weight: Tensor, factor: SweepFactor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], float]:
    """What a native sweep takes, and the unit of its losses."""
    energy, shift = factor.loss_terms()
    unit = energy.max().item() or 1.0  # the square of a small pivot need not be a float32
    return (weight, factor.columns, factor.feedback, (energy / unit).float(), (shift / unit).float()), unit


def _sweep_by_columns(
    weight: Tensor,
    factor: SweepFactor,
    nearest: ColumnRounder,
    block_size: int,
    enter_block: Callable[[Tensor, Tensor], None] | None,
) -> Assignment:
    # One row per input, so that a step of the sweep works on contiguous memory for all output rows at once.
    values = weight.T[factor.columns]
    error = torch.empty_like(values)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    loss = torch.zeros(len(weight), dtype=torch.float64, device=values.device)
    feedback, columns = factor.feedback, factor.columns.tolist()
    energy, shift = factor.loss_terms()
    for end in range(len(columns), 0, -block_size):
        start = max(0, end - block_size)
        targets = torch.addmm(values[start:end], feedback[end:, start:end].T, error[end:])
        if enter_block is not None:
            enter_block(factor.columns[start:end], _updated(values[start:end], targets, feedback[start:end, start:end]))
        for row in range(end - 1, start - 1, -1):
            within = row - start
            codes[row], levels = nearest(columns[row], targets[within])
            torch.sub(values[row], levels, out=error[row])
            targets[:within].addr_(feedback[row, start:row], error[row])
            targets[within] -= levels
        distance = targets.double().square()
        loss += energy[start:end] @ distance + shift[start:end] @ error[start:end].double().square()
    natural = inverse_order(factor.columns)
    return Assignment(codes=codes[natural].T.contiguous(), error=error[natural].T.contiguous(), loss=loss)


def _sweep_by_blocks(
    state: solver.BlockwiseSweep,
    weight: Tensor,
    factor: SweepFactor,
    nearest: LutRounder | GridRounder,
    block_size: int,
    enter_block: Callable[[Tensor, Tensor], None],
) -> Tensor:
    for end in range(weight.shape[1], 0, -block_size):
        start = max(0, end - block_size)
        columns = factor.columns[start:end]
        targets = state.block_targets(start, end)
        by_column = targets.transpose(0, 1).flatten(1)[:, : len(weight)]
        enter_block(columns, _updated(weight.T[columns], by_column, factor.feedback[start:end, start:end]))
        state.round(start, end, targets, nearest.tiled())
    return state.error()


def _updated(values: Tensor, targets: Tensor, feedback: Tensor) -> Tensor:
    """The weights of a block that minimise the loss, all errors behind the block being fixed.

    With c = e L over the inputs behind, y the change of the remaining weights, the least ||c - y L||² is 0. As L is
    triangular, the block's own part of y L = c is a system by itself; dividing by pivots turns c into the shift of
    the targets and L into the feedback.

    Args:
        values: (columns, out_features), the block's weights.
        targets: (columns, out_features), those weights shifted by the errors behind the block.
        feedback: (columns, columns) within the block.

    Returns:
        (out_features, columns).
    """
    change: Tensor = torch.linalg.solve_triangular(feedback.T, targets - values, upper=True, unitriangular=True)
    return (values + change).T
