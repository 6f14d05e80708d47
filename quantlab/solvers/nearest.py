"""Rounding to the nearest level of a codebook.

Two shapes of the same operation: a whole matrix at once, and one input column at a time, as error feedback
needs it. A value halfway between two levels of a look-up table goes to the lower one, on every device.

The native solvers round by themselves. They know the two codebooks of this module (`is_native`); whatever else
rounds columns is called for every column, and the solver around it stays in PyTorch.
"""

from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from quantlab.api import Codebook, Lut, UniformGrid
from quantlab_kernels import solver
from quantlab_kernels.solver_tiles import TiledCodebooks, tile_grid, tile_table


class ColumnRounder(Protocol):
    """A codebook, prepared to round one input column after the other."""

    def __call__(self, column: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Round the (out_features,) targets of a column: their codes and the levels that the codes select."""
        ...


class LutRounder:
    """Nearest entry of a look-up table with ascending entries.

    Args:
        lut: values of shape (out_features, groups, levels).
        in_features: columns that the groups share equally.

    Raises:
        ValueError: the entries of some table do not ascend.
    """

    def __init__(self, lut: Lut, in_features: int) -> None:
        self._values = lut.values.transpose(0, 1).contiguous()
        self._midpoints = _midpoints(self._values)
        self._in_features = in_features
        self._group_size = in_features // lut.values.shape[1]

    def __call__(self, column: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Round the (out_features,) targets of a column: their codes and the levels that the codes select."""
        group = column // self._group_size
        codes = torch.searchsorted(self._midpoints[group], targets[:, None])
        return codes.squeeze(1), self._values[group].gather(1, codes).squeeze(1)

    def tiled(self) -> TiledCodebooks:
        """The tables for the native solvers."""
        return tile_table(self._values.transpose(0, 1), self._midpoints.transpose(0, 1), self._in_features)


class GridRounder:
    """Nearest level of a uniform grid.

    Args:
        grid: scale and zero of shape (out_features, groups).
        in_features: columns that the groups share equally.
    """

    def __init__(self, grid: UniformGrid, in_features: int) -> None:
        self._scale = grid.scale.T.contiguous()
        self._zero = grid.zero.T.contiguous()
        self._bits = grid.bits
        self._in_features = in_features
        self._group_size = in_features // grid.scale.shape[1]

    def replace_group(self, group: int, grid: UniformGrid) -> None:
        """Round the inputs of one group by another grid from now on, given as (out_features, 1)."""
        self._scale[group] = grid.scale.squeeze(1)
        self._zero[group] = grid.zero.squeeze(1)

    def __call__(self, column: int, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Round the (out_features,) targets of a column: their codes and the levels that the codes select."""
        group = column // self._group_size
        scale, zero = self._scale[group], self._zero[group]
        codes = _round_to_grid(targets, scale, zero, self._bits)
        return codes, (codes - zero) * scale

    def tiled(self) -> TiledCodebooks:
        """The grids for the native solvers, as they are now."""
        return tile_grid(self._scale.T, self._zero.T, self._bits, self._in_features)


def is_native(nearest: ColumnRounder, *operands: Tensor) -> TypeGuard[LutRounder | GridRounder]:
    """Whether the native solvers can take a rounder and the tensors that it is used with.

    A subclass is none of theirs, since it may round in another way.
    """
    return type(nearest) in (LutRounder, GridRounder) and solver.usable(*operands)


def nearest_codes(weight: Tensor, codebook: Codebook) -> Tensor:
    """The code of the level nearest to each weight.

    Args:
        weight: (out_features, in_features).
        codebook: a uniform grid, or a look-up table with ascending entries.

    Returns:
        (out_features, in_features) uint8.

    Raises:
        ValueError: the entries of some table do not ascend.
    """
    if isinstance(codebook, UniformGrid):
        groups = weight.to(codebook.scale.dtype).contiguous().view(*codebook.scale.shape, -1)
        codes = _round_to_grid(groups, codebook.scale[..., None], codebook.zero[..., None], codebook.bits)
    else:
        groups = weight.to(codebook.values.dtype).contiguous().view(*codebook.values.shape[:2], -1)
        codes = torch.searchsorted(_midpoints(codebook.values), groups)
    return codes.view(weight.shape).to(torch.uint8)


def with_dead_rounded(codes: Tensor, weight: Tensor, codebook: Codebook, hessian: Tensor) -> Tensor:
    """Codes with dead inputs at their nearest level: no loss counts them, but other text may wake them up.

    Args:
        codes: (out_features, in_features) uint8.
        weight: (out_features, in_features).
        codebook: what the codes select from.
        hessian: (in_features, in_features); a dead input has a zero on its diagonal.

    Raises:
        ValueError: the entries of some table do not ascend.
    """
    dead = hessian.diagonal() == 0
    return torch.where(dead, nearest_codes(weight, codebook), codes) if dead.any() else codes


def _round_to_grid(targets: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (targets / scale + zero).round_().clamp_(0, (1 << bits) - 1)


def _midpoints(values: Tensor) -> Tensor:
    lower, upper = values[..., :-1], values[..., 1:]
    if (lower > upper).any():
        raise ValueError("the entries of a look-up table must ascend; sort the table and relabel its codes")
    return (lower + upper) / 2
