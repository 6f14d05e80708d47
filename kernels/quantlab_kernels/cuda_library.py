"""The CUDA library: how it is compiled, and its functions as ctypes sees them (csrc/cuda/weight.h)."""

import ctypes
import enum
import functools
from pathlib import Path

import torch
from torch import Tensor

from quantlab_kernels.cuda_common import check_driver, recipe_for_this_machine
from quantlab_kernels.native import NativeLibrary

SOURCE_FOLDER = Path(__file__).parent / "csrc" / "cuda"

# Of a block of the kernel for few tokens (weight.h).
MAX_WARPS = 16


class Codebook(enum.IntEnum):
    """What the codes of a prepared weight select from (`Codebook` of weight.h)."""

    PER_ROW = 0
    PER_GROUP = 1
    UNIFORM = 2
    PLANES = 3


_ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class Weight(ctypes.Structure):
    """`Weight` of weight.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("outlier_offsets", ctypes.c_void_p),
        ("outlier_columns", ctypes.c_void_p),
        ("outlier_values", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("codebook", ctypes.c_int32),
        ("element", ctypes.c_int32),
        ("outlier_element", ctypes.c_int32),
    )


Outliers = tuple[Tensor, Tensor, Tensor] | None


def describe_weight(
    codes: Tensor,
    tables: Tensor,
    outliers: Outliers,
    *,
    out_features: int,
    in_features: int,
    bits: int,
    groups: int,
    codebook: Codebook,
    dtype: torch.dtype,
) -> Weight:
    """The addresses and sizes of a weight; its tensors must outlive the use of the result.

    Args:
        codes: int32, in the layout that `codebook` asks for.
        tables: likewise.
        outliers: offsets and columns int32, values float16 or float32; contiguous.
        out_features: rows.
        in_features: columns.
        bits: code width.
        groups: codebooks per row.
        codebook: kind and layout.
        dtype: of the input.
    """
    offsets, columns, values = outliers or (None, None, None)
    return Weight(
        codes.data_ptr(),
        tables.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        None if columns is None else columns.data_ptr(),
        None if values is None else values.data_ptr(),
        out_features,
        in_features,
        bits,
        groups,
        codebook,
        _ELEMENTS[dtype],
        0 if values is None else _ELEMENTS[values.dtype],
    )


def multiply(
    library: ctypes.CDLL, weight: Weight, x: Tensor, bias: Tensor | None, y: Tensor, *, warps: int, stream: int
) -> None:
    """Compute y = x Wᵀ + bias by one kernel.

    Args:
        library: the loaded library.
        weight: in tiles.
        x: (tokens, in_features padded to 8) with unit stride in the columns, 16-byte aligned rows.
        bias: (out_features,) in the type of x, or None.
        y: (tokens, out_features), contiguous, overwritten.
        warps: per block of the kernel for few tokens.
        stream: handle of the CUDA stream.

    Raises:
        RuntimeError: the launch failed.
    """
    status = library.quantlab_cuda_matmul(
        ctypes.byref(weight),
        x.data_ptr(),
        x.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        len(x),
        warps,
        x.device.index or 0,
        stream,
    )
    _check(library, status, weight, f"multiplying {len(x)} tokens")


def dequantize_rows(
    library: ctypes.CDLL, weight: Weight, dense: Tensor, *, first_row: int, rows: int, stream: int
) -> None:
    """Write rows of the dense weight.

    Args:
        library: the loaded library.
        weight: in tiles or planes.
        dense: (at least rows, in_features padded to 8) in the type of the tables, contiguous; the padding receives
            arbitrary values.
        first_row: a multiple of 16.
        rows: how many.
        stream: handle of the CUDA stream.

    Raises:
        RuntimeError: the launch failed.
    """
    status = library.quantlab_cuda_dequantize(
        ctypes.byref(weight), dense.data_ptr(), dense.stride(0), first_row, rows, dense.device.index or 0, stream
    )
    _check(library, status, weight, f"dequantizing rows {first_row} to {first_row + rows}")


def declare(library: ctypes.CDLL) -> None:
    """Set the signatures of the functions.

    Raises:
        BuildError: the library cannot work with the driver.
    """
    pointer, count = ctypes.c_void_p, ctypes.c_int32
    library.quantlab_cuda_matmul.argtypes = (
        ctypes.POINTER(Weight),
        pointer,
        ctypes.c_int64,
        pointer,
        pointer,
        count,
        count,
        count,
        pointer,
    )
    library.quantlab_cuda_dequantize.argtypes = (
        ctypes.POINTER(Weight),
        pointer,
        ctypes.c_int64,
        count,
        count,
        count,
        pointer,
    )
    check_driver(library, "quantlab_cuda")


def _check(library: ctypes.CDLL, status: int, weight: Weight, action: str) -> None:
    if status == 0:
        return
    reason = "not implemented" if status < 0 else library.quantlab_cuda_error(status).decode()
    raise RuntimeError(
        f"{action} with a weight of {weight.n} rows, {weight.k} columns, {weight.bits} bits and {weight.groups} groups "
        f"({Codebook(weight.codebook).name}) failed with status {status}: {reason}"
    )


LIBRARY = NativeLibrary("cuda", lambda: recipe_for_this_machine("cuda", SOURCE_FOLDER), declare)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
