"""Cyclic coordinate descent: the best level of one input while all others are fixed, input after input.

For the error e = w - ŵ of one row, the loss e H eᵀ is a parabola in the quantized weight ŵ_j of input j, with its
minimum at

    v_j = ŵ_j + (e H)_j / H_jj.

So the level nearest to v_j is the exact minimiser over that input (QuantEase, arXiv:2309.01885, Lemma 1). Each step
sees the present errors of *all* other inputs, where the triangular sweep of `quantlab.solvers.sweep` leaves the inputs
that it has yet to visit free to make up for this one: the sweep constructs, descent refines.

One pass over the inputs takes in_features² multiplications per row, and all but a small triangle of them are matrix
products: e H is formed for a block of inputs when the pass arrives there, from the errors as they are at that moment,
and only within a block are changes propagated input by input. Nothing accumulates from pass to pass, so nothing drifts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.solvers.nearest import ColumnRounder, is_native
from quantlab.solvers.order import inverse_order
from quantlab.solvers.sweep import Assignment
from quantlab_kernels import solver

_MARGIN = 64
"""How much nearer than the present level a new one must be, in units of rounding: ties must not make codes cycle."""


def descend(
    weight: Tensor,
    start: Assignment,
    hessian: Tensor,
    order: Tensor,
    nearest: ColumnRounder,
    *,
    sweeps: int,
    block_size: int = 128,
) -> Assignment:
    """Improve codes one at a time; the loss of no row rises, and a code changes only where its row's loss falls.

    A dead input (zero on the diagonal of the Hessian) keeps its code. The result has a loss if `start` has one.

    Args:
        weight: (out_features, in_features).
        start: codes to improve, with their error.
        hessian: (in_features, in_features), undamped, in the dtype of the weight.
        order: (in_features,) int64, the input visited first, second, and so on.
        nearest: rounds one column of targets to the codebook that the codes of `start` select from.
        sweeps: upper limit of passes over all inputs; ends earlier when a pass changes nothing.
        block_size: inputs per block; changes speed and rounding, not the mathematics.
    """
    closer = 1 - _MARGIN * torch.finfo(weight.dtype).eps
    if is_native(nearest, weight, start.error, hessian):
        codes, error = (matrix.clone(memory_format=torch.contiguous_format) for matrix in (start.codes, start.error))
        operands = (weight, codes, error, hessian, order, nearest.tiled())
        gain = solver.descend(*operands, sweeps=sweeps, closer=closer)
        return Assignment(codes=codes, error=error, loss=None if start.loss is None else start.loss - gain)
    values, error, codes = (matrix.T[order] for matrix in (weight, start.error, start.codes))
    coupling, columns = _coupling(hessian, order), order.tolist()
    energy, gain = hessian.diagonal()[order].double().tolist(), torch.zeros_like(values[0], dtype=torch.float64)

    def settle(row: int, wanted: Tensor) -> Tensor:
        candidates, levels = nearest(columns[row], values[row] - wanted)
        candidate_error = values[row] - levels
        before, after = (error[row] - wanted).abs(), (candidate_error - wanted).abs()
        better = after < closer * before
        gain.add_(torch.where(better, before.double().square() - after.double().square(), 0.0), alpha=energy[row])
        codes[row] = torch.where(better, candidates.to(torch.uint8), codes[row])
        return torch.where(better, candidate_error, error[row])

    for _ in range(sweeps):
        before = codes.clone()
        _visit_all(error, coupling, settle, block_size)
        if torch.equal(codes, before):
            break
    return _in_natural_order(codes, error, order, None if start.loss is None else start.loss - gain)


def round_descending(
    weight: Tensor, error: Tensor, hessian: Tensor, order: Tensor, nearest: ColumnRounder, *, block_size: int = 128
) -> Assignment:
    """Bring a weight that is on no level onto the codebook: one pass in which every input is rounded at its minimum.

    A dead input goes to the level nearest to its present value.

    Args:
        weight: (out_features, in_features).
        error: (out_features, in_features), the weight minus its present approximation; zeros to start at the weight.
        hessian: as for `descend`.
        order: as for `descend`.
        nearest: as for `descend`.
        block_size: as for `descend`.
    """
    if is_native(nearest, weight, error, hessian):
        error = error.clone(memory_format=torch.contiguous_format)
        return Assignment(codes=solver.round_descending(weight, error, hessian, order, nearest.tiled()), error=error)
    values, error = weight.T[order], error.T[order]
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    columns = order.tolist()

    def settle(row: int, wanted: Tensor) -> Tensor:
        codes[row], levels = nearest(columns[row], values[row] - wanted)
        return values[row] - levels

    _visit_all(error, _coupling(hessian, order), settle, block_size)
    return _in_natural_order(codes, error, order)


def relax(error: Tensor, hessian: Tensor, order: Tensor, *, block_size: int = 128) -> Tensor:
    """One pass without rounding: a Gauss-Seidel iteration, in which every input moves to its minimum v_j.

    A dead input keeps its value.

    Args:
        error: (out_features, in_features), the weight minus its present approximation.
        hessian: as for `descend`.
        order: as for `descend`.
        block_size: as for `descend`.

    Returns:
        (out_features, in_features), the error afterwards.
    """
    if solver.usable(error, hessian):
        error = error.clone(memory_format=torch.contiguous_format)
        solver.relax(error, hessian, order)
        return error
    error = error.T[order]
    _visit_all(error, _coupling(hessian, order), lambda row, wanted: wanted, block_size)
    return error[inverse_order(order)].T.contiguous()


def _coupling(hessian: Tensor, order: Tensor) -> Tensor:
    """H in the order of visits, rows divided by the diagonal; the rows of dead inputs are zero."""
    diagonal = hessian.diagonal()[order]
    return hessian[order][:, order] / torch.where(diagonal > 0, diagonal, torch.inf)[:, None]


def _visit_all(error: Tensor, coupling: Tensor, settle: Callable[[int, Tensor], Tensor], block_size: int) -> None:
    """Visit every input once and change `error`, (in_features, out_features) in the order of visits, in place.

    `settle(row, wanted)` is given the errors (out_features,) that would minimise the loss of every output row over
    this input, and returns the errors that are possible.
    """
    # One row per input, so that a step works on contiguous memory for all output rows at once.
    for start in range(0, len(error), block_size):
        end = min(start + block_size, len(error))
        excess = coupling[start:end] @ error
        for row in range(start, end):
            within = row - start
            settled = settle(row, error[row] - excess[within])
            excess[within + 1 :].addr_(coupling[row + 1 : end, row], settled - error[row])
            error[row] = settled


def _in_natural_order(codes: Tensor, error: Tensor, order: Tensor, loss: Tensor | None = None) -> Assignment:
    natural = inverse_order(order)
    return Assignment(codes=codes[natural].T.contiguous(), error=error[natural].T.contiguous(), loss=loss)
