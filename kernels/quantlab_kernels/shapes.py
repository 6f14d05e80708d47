"""What the operands of `quantlab::lut_matmul` must look like; values are never read, so no device waits."""

from collections.abc import Sequence

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
    zero: Tensor | None = None,
) -> None:
    """Check dtypes, shapes and devices.

    Raises:
        ValueError: naming the operand, what it is and what it must be; or x requires a gradient.
    """
    _check_x(x)
    check_packed_codes(packed_codes, x.shape[-1])
    bits, out_features = packed_codes.shape[:2]
    check_codebook(codebook, zero, x.shape[-1], out_features, 2**bits)
    _check_additions(x, out_features, bias, outlier_offsets, outlier_columns, outlier_values)
    _check_devices(x, packed_codes, codebook, zero)


def check_prepared_operands(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    layout: Sequence[int],
    bias: Tensor | None,
    outlier_offsets: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_values: Tensor | None,
) -> None:
    """Check what does not depend on how a backend prepared the weight.

    Raises:
        ValueError: naming the operand, what it is and what it must be; or x requires a gradient.
    """
    _check_x(x)
    out_features, in_features = layout[:2]
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features; the weight was prepared for {in_features}")
    _check_additions(x, out_features, bias, outlier_offsets, outlier_columns, outlier_values)
    _check_devices(x, codes, codebook, zero)


def _check_x(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floating point (..., in_features)")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient, which this operation does not have; call it under torch.no_grad(), or multiply "
            "with the dequantized weight"
        )


def _check_additions(
    x: Tensor,
    out_features: int,
    bias: Tensor | None,
    outlier_offsets: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_values: Tensor | None,
) -> None:
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (out_features,)):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; expected floating point ({out_features},)"
        )
    outliers = (outlier_offsets, outlier_columns, outlier_values)
    _check_outliers(*outliers, out_features=out_features)
    _check_devices(x, bias, *outliers)


def _check_devices(x: Tensor, *operands: Tensor | None) -> None:
    for operand in operands:
        if operand is not None and operand.device != x.device:
            raise ValueError(
                f"x is on {x.device}, but an operand of the weight is on {operand.device}; move one of them"
            )


def check_codebook(codebook: Tensor, zero: Tensor | None, in_features: int, out_features: int, levels: int) -> None:
    """Check a codebook, or the scale and zero of a uniform grid.

    Raises:
        ValueError: naming the operand, what it is and what it must be.
    """
    shape = tuple(codebook.shape)
    expected = (out_features, "groups", levels) if zero is None else (out_features, "groups")
    sizes = [size for size in expected if size != "groups"]
    if not codebook.is_floating_point() or len(shape) != len(expected) or [*shape[:1], *shape[2:]] != sizes:
        raise ValueError(
            f"codebook is {codebook.dtype} of shape {shape}; expected floating point ({', '.join(map(str, expected))})"
        )
    if shape[1] == 0 or in_features % shape[1]:
        raise ValueError(f"codebook has {shape[1]} groups; in_features={in_features} must be a multiple of that")
    if zero is not None and (zero.dtype != codebook.dtype or zero.shape != codebook.shape):
        raise ValueError(
            f"zero is {zero.dtype} of shape {tuple(zero.shape)}; expected {codebook.dtype} {shape} like the scale"
        )


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
