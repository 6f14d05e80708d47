"""Weights in the layout of the backend that multiplies with them.

A checkpoint stores bit planes, which belong to no device. Each backend brings them, once, into the order its kernel
reads, and can bring them back, so that only one of the two needs memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab_kernels import cpu
from quantlab_kernels.packing import check_packed_codes


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """Operands of `quantlab::lut_matmul_prepared`.

    Attributes:
        codes: in the layout of the backend.
        codebook: the codebook, or the scale of a uniform grid, as the backend wants it.
        zero: the zero of a uniform grid, or None.
        layout: out_features, in_features, bits, and what else the backend needs to know.
        tile_rows: rows that the layout holds together.
        dtype: the type of x that it serves, None for any.
        restore: gives back the bit planes exactly; None if the backend cannot.
    """

    codes: Tensor
    codebook: Tensor
    zero: Tensor | None
    layout: list[int]
    tile_rows: int
    dtype: torch.dtype | None
    restore: "Callable[[PreparedWeight], Tensor] | None"


def prepare(
    packed_codes: Tensor, codebook: Tensor, zero: Tensor | None, in_features: int, dtype: torch.dtype
) -> PreparedWeight | None:
    """Bring a weight into the layout of its device.

    Args:
        packed_codes: (bits, out_features, ceil(in_features / 32)) int32.
        codebook: (out_features, groups, 2**bits), or the scale (out_features, groups) if there is a zero.
        zero: (out_features, groups) or None.
        in_features: columns of the weight.
        dtype: the type of x that is to be multiplied.

    Returns:
        The prepared weight, or None if `quantlab::lut_matmul` should be called with the operands as they are.

    Raises:
        ValueError: packed_codes have the wrong dtype or shape.
    """
    check_packed_codes(packed_codes, in_features)
    if packed_codes.is_cuda:
        from quantlab_kernels import cuda

        return cuda.prepare(packed_codes, codebook, zero, in_features, dtype)
    bits, out_features = packed_codes.shape[:2]
    if packed_codes.device.type != "cpu" or not cpu.reads_tiles(bits, in_features, codebook.shape[1]):
        return None
    codes = cpu.tile(packed_codes, in_features)
    layout = [out_features, in_features, bits]
    return PreparedWeight(codes, codebook, zero, layout, cpu.TILE_ROWS, None, _restore_from_tiles)


def split(weight: PreparedWeight, rows: Sequence[int]) -> list[PreparedWeight] | None:
    """Cut a prepared weight into weights of their own, which share its memory.

    Args:
        weight: of a backend.
        rows: out_features of the parts, in order.

    Returns:
        The parts, or None if one of them does not end with a whole tile.
    """
    if any(count % weight.tile_rows for count in rows):
        return None
    operands = {"codes": weight.codes, "codebook": weight.codebook, "zero": weight.zero}
    cut = {
        name: tensor.split([len(tensor) * count // sum(rows) for count in rows])
        for name, tensor in operands.items()
        if tensor is not None
    }
    return [
        replace(weight, layout=[count, *weight.layout[1:]], **{name: parts[index] for name, parts in cut.items()})
        for index, count in enumerate(rows)
    ]


def _restore_from_tiles(weight: PreparedWeight) -> Tensor:
    out_features, in_features, bits = weight.layout
    return cpu.untile(weight.codes, bits, out_features, in_features)
