"""`quantlab::lut_matmul` on the CPU: the native library, its layout of codes, and calls to it.

Codes of 2, 3 and 4 bits whose codebooks cover a whole row or a multiple of 32 columns are brought into tiles
(`csrc/cpu/lut_layout.h`) and decoded in vector registers. Everything else, and machines without AVX2, use a kernel
that reads bit planes. x in float64, and everything where there is no native library, goes to the reference.

With bfloat16 and float16 the levels are rounded to the type of x as in the reference, outliers are not; sums are
float32. A sample has the same result bit for bit whatever else is in the batch and whatever the number of threads is.

One case is different, since there PyTorch multiplies dense matrices faster than any kernel can decode and multiply:
x in bfloat16, `DENSE_SAMPLES` samples or more, weights in tiles, and a processor with instructions for bfloat16. Rows
of the weight, with their outliers, are then dequantized to bfloat16 in a workspace of bounded size and multiplied by
PyTorch. Equal calls with the same number of threads have equal results, bit for bit; the last bits of a sample depend
on the size of the batch.
"""

import ctypes
import functools
import weakref

import torch
from torch import Tensor

from quantlab_kernels import reference
from quantlab_kernels.build import Recipe
from quantlab_kernels.isa import Isa, chosen_isa, cpu_recipe
from quantlab_kernels.native import NativeLibrary, usable_threads
from quantlab_kernels.shapes import check_codebook, check_operands, check_prepared_operands

SOURCES = ("lut_tiled.cpp", "lut_dequantize.cpp", "lut_generic.cpp", "lut_tiles.cpp")
HEADERS = (
    "lut_interface.h",
    "lut_numbers.h",
    "lut_finish.h",
    "lut_levels.h",
    "lut_layout.h",
    "lut_decode.h",
    "lut_memory.h",
    "lut_avx2.h",
    "lut_avx512.h",
)
TILED_BITS = (2, 3, 4)
SLICE_COLUMNS = 32
TILE_ROWS = 8
LARGE_PAGE_BYTES = 2 << 20
DENSE_SAMPLES = 64
WORKSPACE_BYTES = 2 << 20  # for every thread; what is larger leaves the cache before it is multiplied with

_SCALAR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STORED_TYPES = (torch.float32, torch.float16)
_OUT_OF_MEMORY = 1
_LIBC = ctypes.CDLL(None)


class _LutMatmul(ctypes.Structure):
    """The arguments of one call; see `csrc/cpu/lut_interface.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "codebook", "zero", "bias")),
        *((f"outlier_{name}", ctypes.c_void_p) for name in ("offsets", "columns", "values")),
        *((name, ctypes.c_int64) for name in ("batch", "in_features", "out_features", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "x_type", "codebook_type", "outlier_type", "threads")),
    )


def recipe_for(isa: Isa) -> Recipe:
    """How to compile the library for one instruction set."""
    # The hot loops are unrolled by hand; -O3 makes them no faster and takes three times as long.
    return cpu_recipe("lut", SOURCES, HEADERS, isa, ("-O2",))


def _declare(library: ctypes.CDLL) -> None:
    matrix = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    library.quantlab_lut_tile_words.argtypes = matrix
    library.quantlab_lut_tile_words.restype = ctypes.c_int64
    for function in (library.quantlab_lut_tile, library.quantlab_lut_untile):
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *matrix, ctypes.c_int32)
    for function in (library.quantlab_lut_matmul, library.quantlab_lut_tiled_matmul):
        function.argtypes = (ctypes.POINTER(_LutMatmul),)
    library.quantlab_lut_dequantize.argtypes = (
        ctypes.POINTER(_LutMatmul),
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )


LIBRARY = NativeLibrary("lut_matmul", lambda: recipe_for(chosen_isa()), _declare)


def reads_tiles(bits: int, in_features: int, groups: int) -> bool:
    """Whether weights of this kind are multiplied from tiles on this machine."""
    fits = bits in TILED_BITS and (groups == 1 or in_features // groups % SLICE_COLUMNS == 0)
    library = LIBRARY.get() if fits else None
    return library is not None and bool(library.quantlab_lut_reads_tiles())


def tile(packed_codes: Tensor, in_features: int) -> Tensor:
    """Bit planes (bits, out_features, words) to tiles: a flat int32 tensor.

    Requires:
        `reads_tiles` for this width.
    """
    library = _library()
    bits, out_features = packed_codes.shape[:2]
    matrix = (out_features, in_features, bits)
    tiles = _empty_words(_tile_words(*matrix))
    packed_codes = packed_codes.contiguous()
    library.quantlab_lut_tile(packed_codes.data_ptr(), tiles.data_ptr(), *matrix, usable_threads())
    return tiles


def untile(tiles: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """Undo `tile`: bit planes (bits, out_features, words)."""
    planes = torch.empty(bits, out_features, -(-in_features // SLICE_COLUMNS), dtype=torch.int32)
    matrix = (out_features, in_features, bits)
    _library().quantlab_lut_untile(planes.data_ptr(), tiles.data_ptr(), *matrix, usable_threads())
    return planes


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
    """`quantlab::lut_matmul` for tensors on the CPU.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, or x requires a gradient.
        MemoryError: there is no memory for the working buffers.
    """
    outliers = (outlier_offsets, outlier_columns, outlier_values)
    library = LIBRARY.get()
    if x.dtype not in _SCALAR_TYPES or library is None:
        return reference.lut_matmul(x, packed_codes, codebook, bias, *outliers, zero)
    check_operands(x, packed_codes, codebook, bias, *outliers, zero)
    bits, out_features = packed_codes.shape[:2]
    tiled = reads_tiles(bits, x.shape[-1], codebook.shape[1])
    codes = tile(packed_codes, x.shape[-1]) if tiled else packed_codes.contiguous()
    return _multiply(library, tiled, x, codes, bits, out_features, codebook, zero, bias, *outliers)


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
    """`quantlab::lut_matmul_prepared` for tensors on the CPU: `codes` are tiles, `layout` is rows, columns, bits.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, or x requires a gradient.
        MemoryError: there is no memory for the working buffers.
    """
    outliers = (outlier_offsets, outlier_columns, outlier_values)
    check_prepared_operands(x, codes, codebook, zero, layout, bias, *outliers)
    out_features, in_features, bits = layout
    if x.dtype not in _SCALAR_TYPES:
        planes = untile(codes, bits, out_features, in_features)
        return reference.lut_matmul(x, planes, codebook, bias, *outliers, zero)
    check_codebook(codebook, zero, in_features, out_features, 2**bits)
    library = _library()
    words = _tile_words(out_features, in_features, bits)
    if codes.dtype != torch.int32 or codes.shape != (words,) or not codes.is_contiguous():
        raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; expected tiles: int32 ({words},)")
    return _multiply(library, True, x, codes, bits, out_features, codebook, zero, bias, *outliers)


def _multiply(
    library: ctypes.CDLL,
    tiled: bool,
    x: Tensor,
    codes: Tensor,
    bits: int,
    out_features: int,
    codebook: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    outlier_offsets: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_values: Tensor | None,
) -> Tensor:
    in_features = x.shape[-1]
    result = x.new_empty((*x.shape[:-1], out_features))
    if not result.numel():
        return result
    # Every operand stays referenced until the call returns.
    samples, stored = x.contiguous(), _as_stored(codebook)
    zero = None if zero is None else _as_stored(zero)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    offsets = None if outlier_offsets is None else outlier_offsets.contiguous()
    columns = None if outlier_columns is None else outlier_columns.contiguous()
    values = None if outlier_values is None else _as_stored(outlier_values)
    arguments = _LutMatmul(
        *map(_address, (samples, result, codes, stored, zero, bias, offsets, columns, values)),
        result.numel() // out_features,
        in_features,
        out_features,
        codebook.shape[1],
        bits,
        _SCALAR_TYPES[x.dtype],
        _SCALAR_TYPES[stored.dtype],
        0 if values is None else _SCALAR_TYPES[values.dtype],
        usable_threads(),
    )
    dense = tiled and x.dtype == torch.bfloat16 and arguments.batch >= DENSE_SAMPLES
    if dense and library.quantlab_lut_dequantizes():
        status = _multiply_dense(library, arguments, x, bias, result)
    else:
        status = (library.quantlab_lut_tiled_matmul if tiled else library.quantlab_lut_matmul)(arguments)
    if status:
        reason = "no memory for its buffers" if status == _OUT_OF_MEMORY else f"status {status}"
        raise MemoryError(f"lut_matmul for {tuple(x.shape)} x {(out_features, in_features)}: {reason}")
    return result


def _multiply_dense(library: ctypes.CDLL, arguments: _LutMatmul, x: Tensor, bias: Tensor | None, result: Tensor) -> int:
    """Dequantize as many rows as fit into the workspace, multiply, go on with the next. The status of the library."""
    out_features, in_features = result.shape[-1], x.shape[-1]
    samples, outputs = x.reshape(-1, in_features), result.view(-1, out_features)
    fitting = max(WORKSPACE_BYTES * arguments.threads // (x.itemsize * in_features), 1)
    rows_at_once = min(_round_up(fitting), _round_up(out_features))
    weight = x.new_empty(rows_at_once, in_features)
    for first in range(0, out_features, rows_at_once):
        rows = slice(first, min(first + rows_at_once, out_features))
        count = rows.stop - first
        status: int = library.quantlab_lut_dequantize(arguments, first, count, weight.data_ptr())
        if status:
            return status
        if bias is None:
            torch.mm(samples, weight[:count].T, out=outputs[:, rows])
        else:
            torch.addmm(bias[rows], samples, weight[:count].T, out=outputs[:, rows])
    return 0


def _empty_words(count: int) -> Tensor:
    """Memory for int32 words; enough to fill a large page starts with one."""
    size = 4 * count
    if size < LARGE_PAGE_BYTES:
        return torch.empty(count, dtype=torch.int32)
    address = ctypes.c_void_p()
    if _LIBC.posix_memalign(ctypes.byref(address), ctypes.c_size_t(LARGE_PAGE_BYTES), ctypes.c_size_t(size)):
        raise MemoryError(f"no memory for {size:,} bytes of weights")
    memory = (ctypes.c_int32 * count).from_address(address.value or 0)
    # The tensor keeps `memory`. What is alive at exit stays, as it may still be in use.
    weakref.finalize(memory, _LIBC.free, address).atexit = False
    return torch.frombuffer(memory, dtype=torch.int32)


def _round_up(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def _address(operand: Tensor | None) -> int | None:
    return None if operand is None else operand.data_ptr()


def _as_stored(values: Tensor) -> Tensor:
    """In a type that the library reads."""
    return (values if values.dtype in _STORED_TYPES else values.float()).contiguous()


@functools.cache
def _tile_words(out_features: int, in_features: int, bits: int) -> int:
    words: int = _library().quantlab_lut_tile_words(out_features, in_features, bits)
    return words


def _library() -> ctypes.CDLL:
    library = LIBRARY.loaded or LIBRARY.get()
    if library is None:
        raise RuntimeError("tiles are multiplied by the native library, which QUANTLAB_KERNELS has turned off")
    return library
