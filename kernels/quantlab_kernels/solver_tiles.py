"""Codebooks in the form that the native solvers work with: tiles of `LANES` output rows, the lanes side by side."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from quantlab_kernels.solver_library import CodebookOperands

LANES = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledCodebooks:
    """The codebooks of all output rows, in tiles: tables (levels and midpoints) or uniform grids (scale and zero).

    Attributes:
        levels: (tiles, groups, count, LANES), or None.
        midpoints: (tiles, groups, count - 1, LANES), or None.
        scale: (tiles, groups, LANES), or None.
        zero: (tiles, groups, LANES), or None.
        groups: codebooks of each row.
        group_size: inputs that share one.
        count: levels of each.
    """

    levels: Tensor | None = None
    midpoints: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    groups: int
    group_size: int
    count: int

    def operands(self) -> CodebookOperands:
        """What the library takes; it points into these tensors."""
        tensors = (self.levels, self.midpoints, self.scale, self.zero)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return CodebookOperands(*pointers, self.groups, self.group_size, self.count)


def tile_table(levels: Tensor, midpoints: Tensor, in_features: int) -> TiledCodebooks:
    """Bring look-up tables into tiles.

    Args:
        levels: (out_features, groups, count) float32, ascending.
        midpoints: (out_features, groups, count - 1) float32, where the nearest level changes.
        in_features: inputs that the groups share equally.
    """
    _, groups, count = levels.shape
    return TiledCodebooks(
        levels=in_tiles(levels),
        midpoints=in_tiles(midpoints),
        groups=groups,
        group_size=in_features // groups,
        count=count,
    )


def tile_grid(scale: Tensor, zero: Tensor, bits: int, in_features: int) -> TiledCodebooks:
    """Bring uniform grids into tiles.

    Args:
        scale: (out_features, groups) float32, positive.
        zero: (out_features, groups) float32.
        bits: code width.
        in_features: inputs that the groups share equally.
    """
    groups = scale.shape[1]
    return TiledCodebooks(
        scale=in_tiles(scale, fill=1.0),
        zero=in_tiles(zero),
        groups=groups,
        group_size=in_features // groups,
        count=1 << bits,
    )


def in_tiles(rows: Tensor, fill: float = 0.0) -> Tensor:
    """(out_features, ...) as (tiles, ..., LANES), with lanes that have no row filled up."""
    flat = rows.reshape(len(rows), -1)
    padded = pad(flat, (0, 0, 0, -len(rows) % LANES), value=fill)
    tiles = padded.view(-1, LANES, flat.shape[1]).transpose(1, 2)
    return tiles.reshape(len(tiles), *rows.shape[1:], LANES).contiguous()
