"""The operations of `quantlab_kernels.ops` on CUDA, for float16 and bfloat16 (and float32, more slowly).

A weight of 2, 3 or 4 bits with one codebook per row, or per group of 32 times a power of two columns, is prepared:
its codes move to the tiles of `quantlab_kernels.cuda_layout`. The number of tokens m then chooses the way:

    m          kernel
    1 to 16    csrc/cuda/matmul_small.cu: reads the weight once; the time of decoding
    17 to 64   csrc/cuda/matmul_staged.cu: x in shared memory (uniform groups: to 32)
    above      csrc/cuda/dequantize.cu into a bounded workspace, rows by rows, and cuBLAS

Everything else (1 and 5 to 8 bits, other groups, float32, unprepared operands) is dequantized from the bit planes as
in the last line. Outliers and bias are added inside of the kernels, in float32.

Work goes to the current stream. There are no atomics, no synchronization and no allocation but by PyTorch, so that
calls repeat bit for bit and can be captured into CUDA graphs. The sums of different m differ in their order.

The kernels compile for compute capability 8.0, 8.6, 8.9 and 9.0 and are tested by emulation on the host. They have
not yet been run on a device.
"""

import ctypes

import torch
from torch import Tensor

from quantlab_kernels import cuda_common, cuda_library, reference
from quantlab_kernels.cuda_layout import (
    HALF_COLUMNS,
    TILE_BITS,
    TILE_COLUMNS,
    TILE_ROWS,
    byte_planes,
    pack_tiles,
    pad_rows,
    unpack_tiles,
)
from quantlab_kernels.cuda_library import MAX_WARPS, Codebook, Outliers, Weight
from quantlab_kernels.packing import pack_codes, unpack_codes
from quantlab_kernels.prepare import PreparedWeight
from quantlab_kernels.reference import uniform_levels
from quantlab_kernels.shapes import check_operands, check_prepared_operands

_PREPARED_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*_PREPARED_DTYPES, torch.float32)

# The most tokens of the multiplying kernels. Three sets of sums of a uniform codebook for 64 do not fit in registers.
_MAX_TOKENS = {Codebook.PER_ROW: 64, Codebook.PER_GROUP: 64, Codebook.UNIFORM: 32, Codebook.PLANES: 0}

# Elements of a vector access: rows of x and of the workspace are padded to multiples of it.
_VECTOR = 8
_VECTOR_BYTES = 16
# Large enough for cuBLAS to fill a device (4096 x 4096 in float16), small enough to stay in L2 between the two.
_WORKSPACE_BYTES = 32 << 20


def prepare(
    packed_codes: Tensor, codebook: Tensor, zero: Tensor | None, in_features: int, dtype: torch.dtype
) -> PreparedWeight | None:
    """Derive the layout of the kernels.

    Args:
        packed_codes: (bits, out_features, ceil(in_features / 32)) int32.
        codebook: (out_features, groups, 2**bits), or with `zero` the scale (out_features, groups).
        zero: (out_features, groups), or None. Level k is then (k - zero) * scale.
        in_features: columns of the weight.
        dtype: of the inputs to come.

    Returns:
        The weight in tiles, or None if the kernels do not know its width, its groups or the type of the input, or
        cannot be had at all.
    """
    bits, out_features, _ = packed_codes.shape
    groups = codebook.shape[1]
    known = bits in TILE_BITS and dtype in _PREPARED_DTYPES and _groups_fit_tiles(in_features, groups)
    if not known or cuda_library.LIBRARY.get() is None:
        return None
    if zero is not None and groups > 1 and codebook.dtype == zero.dtype == torch.float16:
        kind, tables = Codebook.UNIFORM, pad_rows(torch.stack([codebook, zero], dim=-1))
    else:
        levels = (codebook if zero is None else uniform_levels(codebook, zero, bits)).to(dtype)
        kind, tables = (Codebook.PER_ROW if groups == 1 else Codebook.PER_GROUP), byte_planes(levels)
    return PreparedWeight(
        codes=pack_tiles(unpack_codes(packed_codes, in_features), bits),
        codebook=tables,
        zero=None,
        layout=[out_features, in_features, bits, groups, int(kind)],
        tile_rows=TILE_ROWS,
        dtype=dtype,
        restore=_restore,
    )


def lut_matmul_prepared(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    layout: list[int],
    bias: Tensor | None = None,
    outlier_offsets: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_values: Tensor | None = None,
) -> Tensor:
    """`quantlab::lut_matmul_prepared` for a weight of `prepare`.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device.
        RuntimeError: the library is missing, or a launch failed.
    """
    check_prepared_operands(x, codes, codebook, zero, layout, bias, outlier_offsets, outlier_columns, outlier_values)
    if x.dtype not in _PREPARED_DTYPES:
        raise ValueError(f"x is {x.dtype}; a weight can be prepared for float16 and bfloat16 only")
    out_features, in_features, bits, groups, kind = layout
    outliers = _contiguous_outliers(outlier_offsets, outlier_columns, outlier_values)
    weight = cuda_library.describe_weight(
        codes,
        codebook,
        outliers,
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        groups=groups,
        codebook=Codebook(kind),
        dtype=x.dtype,
    )
    return _multiply(_library(), weight, x, _bias_like(x, bias))


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
    """`quantlab::lut_matmul`: dequantize rows by rows, and multiply.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device.
        RuntimeError: a launch failed.
    """
    library = cuda_library.LIBRARY.get()
    if library is None or x.dtype not in _DTYPES:
        return reference.lut_matmul(
            x, packed_codes, codebook, bias, outlier_offsets, outlier_columns, outlier_values, zero
        )
    check_operands(x, packed_codes, codebook, bias, outlier_offsets, outlier_columns, outlier_values, zero)
    bits, out_features, _ = packed_codes.shape
    # Tensors that `weight` points into must stay alive until the kernels are queued, so they have names.
    codes = packed_codes.contiguous()
    levels = (codebook if zero is None else uniform_levels(codebook, zero, bits)).to(x.dtype).contiguous()
    outliers = _contiguous_outliers(outlier_offsets, outlier_columns, outlier_values)
    weight = cuda_library.describe_weight(
        codes,
        levels,
        outliers,
        out_features=out_features,
        in_features=x.shape[-1],
        bits=bits,
        groups=codebook.shape[1],
        codebook=Codebook.PLANES,
        dtype=x.dtype,
    )
    return _multiply(library, weight, x, _bias_like(x, bias))


def _multiply(library: ctypes.CDLL, weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty((*x.shape[:-1], weight.n))
    if y.numel() == 0:
        return y
    flat, result = x.reshape(-1, weight.k), y.view(-1, weight.n)
    stream = cuda_common.current_stream(x.device)
    if len(flat) <= _MAX_TOKENS[Codebook(weight.codebook)]:
        warps = warps_per_block(weight.n, weight.k, cuda_library.multiprocessors(x.device))
        cuda_library.multiply(library, weight, _vector_rows(flat), bias, result, warps=warps, stream=stream)
        return y
    _multiply_dense(library, weight, flat, bias, result, stream)
    return y


def _multiply_dense(
    library: ctypes.CDLL, weight: Weight, flat: Tensor, bias: Tensor | None, result: Tensor, stream: int
) -> None:
    stride = weight.k + -weight.k % _VECTOR
    rows_per_piece = max(TILE_ROWS, _WORKSPACE_BYTES // (stride * flat.element_size()) // TILE_ROWS * TILE_ROWS)
    workspace = flat.new_empty((min(rows_per_piece, weight.n), stride))
    for first_row in range(0, weight.n, rows_per_piece):
        rows = min(rows_per_piece, weight.n - first_row)
        cuda_library.dequantize_rows(library, weight, workspace, first_row=first_row, rows=rows, stream=stream)
        piece, dense = result[:, first_row : first_row + rows], workspace[:rows, : weight.k].T
        if bias is None:
            torch.mm(flat, dense, out=piece)
        else:
            torch.addmm(bias[first_row : first_row + rows], flat, dense, out=piece)


def warps_per_block(out_features: int, in_features: int, multiprocessors: int) -> int:
    """Warps that share 16 rows in the kernel for few tokens.

    Eight, or sixteen where blocks are too few to give every multiprocessor two of them; but no more than tiles.
    """
    row_blocks, tiles = -(-out_features // TILE_ROWS), -(-in_features // TILE_COLUMNS)
    return min(MAX_WARPS if row_blocks < 2 * multiprocessors else MAX_WARPS // 2, tiles)


def _library() -> ctypes.CDLL:
    library = cuda_library.LIBRARY.get()
    if library is None:
        raise RuntimeError(
            "a weight prepared for the CUDA kernels is in use, but they are not available "
            f"({cuda_library.LIBRARY.state}); set QUANTLAB_KERNELS before the model is loaded"
        )
    return library


def _restore(prepared: PreparedWeight) -> Tensor:
    """The canonical bit planes."""
    out_features, in_features, bits, *_ = prepared.layout
    return pack_codes(unpack_tiles(prepared.codes, bits, out_features, in_features).contiguous(), bits)


def _groups_fit_tiles(in_features: int, groups: int) -> bool:
    halves, rest = divmod(in_features // groups, HALF_COLUMNS)
    return groups == 1 or (rest == 0 and halves.bit_count() == 1)


def _vector_rows(flat: Tensor) -> Tensor:
    """The rows of x where the kernels can read them with vector accesses, copied if need be."""
    if flat.shape[1] % _VECTOR:
        return torch.nn.functional.pad(flat, (0, -flat.shape[1] % _VECTOR))
    aligned = flat.stride(1) == 1 and flat.stride(0) % _VECTOR == 0 and flat.data_ptr() % _VECTOR_BYTES == 0
    return flat if aligned else flat.clone(memory_format=torch.contiguous_format)


def _bias_like(x: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype).contiguous()


def _contiguous_outliers(offsets: Tensor | None, columns: Tensor | None, values: Tensor | None) -> Outliers:
    if offsets is None or columns is None or values is None:
        return None
    if values.dtype != torch.float16:
        values = values.float()
    return offsets.contiguous(), columns.contiguous(), values.contiguous()
