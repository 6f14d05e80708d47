"""The definition of the operation in plain PyTorch, on any device.

Every faster backend is tested against this one. The dequantized weight is computed once in float32 and
rounded once to the type of the input; the product is `torch.nn.functional.linear`, so the result is bit for
bit that of the dequantized model.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from quantlab_kernels.packing import unpack_codes
from quantlab_kernels.shapes import check_operands

# Rows are unpacked in pieces whose 64-bit indices stay in the cache of a core.
_WEIGHTS_PER_PIECE = 1 << 18


def lut_matmul(
    x: Tensor,
    packed_codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    outlier_offsets: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_values: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """`quantlab::lut_matmul` (see `quantlab_kernels.ops`) by dequantizing the weight first.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device.
    """
    check_operands(x, packed_codes, codebook, bias, outlier_offsets, outlier_columns, outlier_values, zero)
    if zero is not None:
        codebook = uniform_levels(codebook, zero, packed_codes.shape[0])
    weight = dequantize(packed_codes, codebook, x.shape[-1], outlier_offsets, outlier_columns, outlier_values)
    with _no_autocast(x.device.type):
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def dequantize(
    packed_codes: Tensor,
    codebook: Tensor,
    in_features: int,
    outlier_offsets: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_values: Tensor | None = None,
) -> Tensor:
    """The dense weight.

    Args:
        packed_codes: (bits, out_features, ceil(in_features / 32)) int32.
        codebook: (out_features, groups, 2**bits), any floating dtype.
        in_features: columns of the weight, a multiple of groups.
        outlier_offsets: (out_features + 1,) int32, start of every row in the next two.
        outlier_columns: (count,) int32.
        outlier_values: (count,) floating, added to the selected levels.

    Returns:
        (out_features, in_features) float32, or float64 for a float64 codebook.
    """
    out_features, groups, _ = codebook.shape
    levels = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    weight = torch.empty(out_features, in_features, dtype=levels.dtype, device=levels.device)
    rows_per_piece = max(1, _WEIGHTS_PER_PIECE // in_features)
    for start in range(0, out_features, rows_per_piece):
        rows = slice(start, start + rows_per_piece)
        codes = unpack_codes(packed_codes[:, rows], in_features)
        weight[rows] = levels[rows].gather(2, codes.reshape(len(codes), groups, -1).long()).flatten(1)
    if outlier_offsets is not None and outlier_columns is not None and outlier_values is not None:
        row = torch.repeat_interleave(outlier_offsets.diff(), output_size=outlier_columns.numel())
        weight.index_put_((row, outlier_columns), outlier_values.to(weight.dtype), accumulate=True)
    return weight


def uniform_levels(scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codebook of equally spaced levels: level k is (k - zero) * scale.

    Args:
        scale: (out_features, groups), floating point.
        zero: (out_features, groups), floating point.
        bits: code width.

    Returns:
        (out_features, groups, 2**bits) float32, or float64 for a float64 scale.
    """
    scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
    codes = torch.arange(1 << bits, dtype=scale.dtype, device=scale.device)
    return (codes - zero.to(scale.dtype)[..., None]) * scale[..., None]


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
