"""What the operands of `quantlab::lut_matmul` must look like; values are never read, so no device waits."""

import torch
from torch import Tensor

from quantlab_kernels.packing import check_packed_codes


def check_operands(
    x: Tensor,
    packed_codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    outlier_offsets: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_values: Tensor | None,
) -> None:
    """Check dtypes, shapes and devices.

    Raises:
        ValueError: naming the operand, what it is and what it must be.
    """
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point (..., in_features)")
    in_features = x.shape[-1]
    check_packed_codes(packed_codes, in_features)
    bits, out_features = packed_codes.shape[:2]
    _check_codebook(codebook, in_features, out_features, 2**bits)
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (out_features,)):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; expected floating point ({out_features},)"
        )
    outliers = (outlier_offsets, outlier_columns, outlier_values)
    _check_outliers(*outliers, out_features=out_features)
    for operand in (packed_codes, codebook, bias, *outliers):
        if operand is not None and operand.device != x.device:
            raise ValueError(
                f"x is on {x.device}, but an operand of the weight is on {operand.device}; move one of them"
            )


def _check_codebook(codebook: Tensor, in_features: int, out_features: int, levels: int) -> None:
    shape = tuple(codebook.shape)
    if not codebook.is_floating_point() or len(shape) != 3 or shape[0] != out_features or shape[2] != levels:
        raise ValueError(
            f"codebook is {codebook.dtype} of shape {shape}; expected floating point ({out_features}, groups, {levels})"
        )
    if shape[1] == 0 or in_features % shape[1]:
        raise ValueError(f"codebook has {shape[1]} groups; in_features={in_features} must be a multiple of that")


def _check_outliers(
    offsets: Tensor | None, columns: Tensor | None, values: Tensor | None, *, out_features: int
) -> None:
    if offsets is None and columns is None and values is None:
        return
    if offsets is None or columns is None or values is None:
        raise ValueError("outlier_offsets, outlier_columns and outlier_values must be given together")
    if offsets.dtype != torch.int32 or tuple(offsets.shape) != (out_features + 1,):
        raise ValueError(
            f"outlier_offsets are {offsets.dtype} of shape {tuple(offsets.shape)}; expected int32 ({out_features + 1},)"
        )
    if columns.dtype != torch.int32 or columns.ndim != 1:
        raise ValueError(
            f"outlier_columns are {columns.dtype} of shape {tuple(columns.shape)}; expected int32 (count,)"
        )
    if not values.is_floating_point() or values.shape != columns.shape:
        raise ValueError(
            f"outlier_values are {values.dtype} of shape {tuple(values.shape)}; expected floating point "
            f"{tuple(columns.shape)} like outlier_columns"
        )
