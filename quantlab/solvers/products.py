"""Sums of outer products over many tokens: what Hessians and drifts are means of."""

from torch import Tensor

from quantlab_kernels import solver

_COLUMNS_PER_SLAB = 128


def add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to sums, in place.

    The product of a matrix with itself is symmetric, and what is below its diagonal is computed in part or not at all.

    Args:
        sums: (left features, right features) float32.
        left: (tokens, left features) float32.
        right: (tokens, right features) float32; the same object as `left` for a symmetric product.
    """
    if solver.usable(sums, left, right):
        solver.add_products(sums, left, right)
    elif left is right:
        for start in range(0, len(sums), _COLUMNS_PER_SLAB):
            slab = slice(start, start + _COLUMNS_PER_SLAB)
            sums[slab, start:].addmm_(left[:, slab].T, left[:, start:])
    else:
        sums.addmm_(left.T, right)
