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
from quantlab.solvers.nearest import ColumnRounder
from quantlab.solvers.order import inverse_order


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepFactor:
    """A Hessian, factored for sweeps; it serves every weight with the same inputs.

    Attributes:
        columns: (in_features,) int64, the inputs in the order of the factor: the *last* is quantized first.
        feedback: (in_features, in_features), L with its columns divided by its diagonal. Entry (u, j), u > j, is
            how much of the error of input `columns[u]` moves the target of input `columns[j]`.
        pivots: (in_features,) float64, the diagonal of L in the order of the factor.
        requested_damping: the fraction of the mean diagonal that was to be added to the Hessian.
        damping: the fraction that was actually added.
    """

    columns: Tensor
    feedback: Tensor
    pivots: Tensor
    requested_damping: float
    damping: float

    def diagnostics(self) -> dict[str, float]:
        """What a method reports about its factor: the damping it took, a fallback if more than asked for."""
        return {"damping": self.damping, "fallbacks": float(self.damping > self.requested_damping)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Codes chosen by a sweep, in the natural order of columns.

    Attributes:
        codes: (out_features, in_features) uint8.
        error: (out_features, in_features), the weight minus the levels that the codes select.
    """

    codes: Tensor
    error: Tensor


def factor_for_sweep(hessian: Tensor, order: Tensor, damping: float, dtype: torch.dtype) -> SweepFactor:
    """Factor a Hessian for quantizing inputs in a given order.

    Args:
        hessian: (in_features, in_features), undamped.
        order: (in_features,) int64, the input quantized first, second, and so on.
        damping: fraction of the mean diagonal to add; see `damped_cholesky`.
        dtype: precision of the feedback; the factorisation itself is in float64.

    Raises:
        NumericalError: the Hessian is not positive semi-definite.
    """
    columns = order.flip(0)
    factor = damped_cholesky(hessian[columns][:, columns], damping)
    pivots = factor.lower.diagonal().clone()  # a view would keep all of L in memory
    feedback = (factor.lower / pivots).to(dtype).contiguous()
    return SweepFactor(
        columns=columns, feedback=feedback, pivots=pivots, requested_damping=damping, damping=factor.damping
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
    # One row per input, so that a step of the sweep works on contiguous memory for all output rows at once.
    values = weight.T[factor.columns]
    error = torch.empty_like(values)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    feedback, columns = factor.feedback, factor.columns.tolist()
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
    natural = inverse_order(factor.columns)
    return Assignment(codes=codes[natural].T.contiguous(), error=error[natural].T.contiguous())


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
