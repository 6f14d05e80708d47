"""Block descent: new codes for many inputs at once while all others are fixed, block after block.

For the inputs B of a block and the error e = w - ŵ of one row, the loss e H eᵀ depends on e_B as

    e_B H_BB e_Bᵀ + 2 e_B gᵀ = (e_B + c) H_BB (e_B + c)ᵀ + const,        g = e_R H_RB,  c = g H_BB⁻¹,

where R are the other inputs. That is the loss of a layer with the inputs B and the weight w_B + c, so a triangular
sweep (`quantlab.solvers.sweep`) chooses its codes with error feedback. Where coordinate descent
(`quantlab.solvers.descent`) stops because no single code can be improved, a block can still be: its codes change
together. The sweep is greedy and may find worse codes; every row keeps those that it had unless its loss falls.
"""

import torch
from torch import Tensor

from quantlab.api import Lut
from quantlab.errors import NumericalError
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.order import inverse_order
from quantlab.solvers.sweep import Assignment, SweepFactor, factor_for_sweep, sweep
from quantlab_kernels import solver

_DAMPING = 1e-4
"""Of the factors that choose codes; which codes are kept is decided by the undamped Hessian."""


def descend_in_blocks(
    weight: Tensor,
    start: Assignment,
    levels: Tensor,
    hessian: Tensor,
    order: Tensor,
    *,
    passes: int,
    generator: torch.Generator,
    block_size: int = 64,
) -> Assignment:
    """Improve codes block by block; the loss of no row rises.

    In every pass each input is in one block. Blocks are drawn at random, so that other inputs are together each time.
    A dead input (zero on the diagonal of the Hessian) keeps its code.

    Args:
        weight: (out_features, in_features).
        start: codes to improve, with their error.
        levels: (out_features, levels), what the codes select, ascending.
        hessian: (in_features, in_features), undamped, in the dtype of the weight.
        order: (in_features,) int64, the input quantized first, second, and so on, in every block as far as it goes.
        passes: how often each input is visited.
        generator: draws the blocks, on the CPU.
        block_size: inputs per block.
    """
    if passes == 0:
        return start
    if solver.usable(weight, start.error, levels, hessian) and block_size <= solver.MAX_BLOCK:
        return _descend_natively(weight, start, levels, hessian, order, passes, generator, block_size)
    # One row per input: to gather a block is to copy contiguous memory.
    values = weight.T.contiguous()
    codes, error = (matrix.T.clone(memory_format=torch.contiguous_format) for matrix in (start.codes, start.error))
    live = order[hessian.diagonal()[order] > 0]
    lut, gained = Lut(values=levels[:, None]), torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for _ in range(passes if len(live) else 0):
        for columns in _draw(live, block_size, generator).split(block_size):
            coupled = hessian[columns]
            within, old = coupled[:, columns], error[columns]
            coupling = coupled @ error - within @ old
            new = _redecode(values[columns].T, coupling.T, lut, within)
            # The difference of the two losses, from the difference of the errors: nothing cancels.
            change = new.error.T - old
            gain = (change * (within @ (new.error.T + old) + 2 * coupling)).sum(dim=0)
            better = gain < 0
            codes[columns] = torch.where(better, new.codes.T, codes[columns])
            error[columns] = torch.where(better, new.error.T, old)
            gained += gain.clamp(max=0)
    loss = None if start.loss is None else start.loss + gained
    return Assignment(codes=codes.T.contiguous(), error=error.T.contiguous(), loss=loss)


def _descend_natively(
    weight: Tensor,
    start: Assignment,
    levels: Tensor,
    hessian: Tensor,
    order: Tensor,
    passes: int,
    generator: torch.Generator,
    size: int,
) -> Assignment:
    codes, error = (matrix.clone(memory_format=torch.contiguous_format) for matrix in (start.codes, start.error))
    loss, tables = start.loss, LutRounder(Lut(values=levels[:, None]), weight.shape[1]).tiled()
    live = order[hessian.diagonal()[order] > 0]
    for _ in range(passes if len(live) else 0):
        factors, failures = solver.factor_blocks(hessian, _draw(live, size, generator, flipped=True), size, _DAMPING)
        if failures:
            raise NumericalError(
                f"{failures} blocks of {size} inputs of the Hessian are not positive definite, which they are if it is "
                "a mean of x xᵀ: check the calibration statistics"
            )
        gained = solver.descend_in_blocks(weight, codes, error, hessian, factors, tables)
        del factors  # before the next ones are made
        loss = None if loss is None else loss + gained
    return Assignment(codes=codes, error=error, loss=loss)


def _draw(columns: Tensor, size: int, generator: torch.Generator, *, flipped: bool = False) -> Tensor:
    """Random blocks one after the other, each in the order in which its inputs are quantized, or in the reverse."""
    drawn = torch.randperm(len(columns), generator=generator)
    whole = len(columns) // size * size
    blocks = drawn[:whole].view(-1, size).sort(dim=1, descending=flipped).values
    places = torch.cat([blocks.flatten(), drawn[whole:].sort(descending=flipped).values])
    return columns[places.to(columns.device)]


def _factor(hessian: Tensor, dtype: torch.dtype) -> SweepFactor:
    in_turn = torch.arange(len(hessian), device=hessian.device)
    return factor_for_sweep(hessian, in_turn, _DAMPING, dtype)


def _redecode(weight: Tensor, coupling: Tensor, lut: Lut, hessian: Tensor) -> Assignment:
    """Codes of one block by a sweep over w_B + c; its columns are in the order in which they are quantized."""
    factor = _factor(hessian, weight.dtype)
    shift = _solve(factor, coupling)
    found = sweep(weight + shift, factor, LutRounder(lut, len(hessian)), block_size=len(hessian))
    return Assignment(codes=found.codes, error=found.error - shift)


def _solve(factor: SweepFactor, right: Tensor) -> Tensor:
    """The c of c H = g, (out_features, columns) each, for the damped H of the factor."""
    halfway = torch.linalg.solve_triangular(factor.feedback, right.T[factor.columns], upper=False, unitriangular=True)
    halfway /= factor.pivots.square().to(right.dtype)[:, None]
    solution: Tensor = torch.linalg.solve_triangular(factor.feedback.T, halfway, upper=True, unitriangular=True)
    return solution[inverse_order(factor.columns)].T
