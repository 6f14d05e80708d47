"""Registration of `torch.ops.quantlab`: x Wᵀ + bias for a weight stored as codes into a codebook.

`lut_matmul` takes the weight as checkpoints store it. `lut_matmul_prepared` takes it in the layout of the device
(`quantlab_kernels.prepare`), which is what a model should keep.

Operands:
    x: (..., in_features), floating point; any leading dimensions, also empty ones.
    packed_codes: (bits, out_features, ceil(in_features / 32)) int32 (`quantlab_kernels.packing`).
    codebook: (out_features, groups, 2**bits), floating point; column j belongs to group
        j // (in_features / groups). With a zero, it is the scale (out_features, groups) instead.
    bias: (out_features,) or None; taken in the type of x.
    outlier_offsets, outlier_columns, outlier_values: corrections added to the selected levels, in compressed
        rows: row r owns the entries from offsets[r] to offsets[r + 1]. All three or none. Columns must be
        valid; the operation does not read values to check them.
    zero: (out_features, groups) like the scale, or None: level k is (k - zero) * scale.
Result:
    (..., out_features) in the type of x, under autocast, too. For inference: no derivative is registered.

The primitive `torch.library.Library` is used rather than `custom_op` since its calls cost half as much.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab_kernels import cpu, cuda, reference
from quantlab_kernels.shapes import check_operands, check_prepared_operands

_LIBRARY = torch.library.Library("quantlab", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_ADDITIONS = (
    "Tensor? bias=None, Tensor? outlier_offsets=None, Tensor? outlier_columns=None, Tensor? outlier_values=None"
)
_LIBRARY.define(
    f"lut_matmul(Tensor x, Tensor packed_codes, Tensor codebook, {_ADDITIONS}, Tensor? zero=None) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    f"lut_matmul_prepared(Tensor x, Tensor codes, Tensor codebook, Tensor? zero, int[] layout, {_ADDITIONS}) -> Tensor",
    tags=_TAGS,
)


def _fake_lut_matmul(
    x: Tensor,
    packed_codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    outlier_offsets: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_values: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    check_operands(x, packed_codes, codebook, bias, outlier_offsets, outlier_columns, outlier_values, zero)
    return x.new_empty((*x.shape[:-1], packed_codes.shape[1]))


def _fake_lut_matmul_prepared(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    layout: Sequence[int],
    bias: Tensor | None = None,
    outlier_offsets: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_values: Tensor | None = None,
) -> Tensor:
    check_prepared_operands(x, codes, codebook, zero, layout, bias, outlier_offsets, outlier_columns, outlier_values)
    return x.new_empty((*x.shape[:-1], layout[0]))


_LIBRARY.impl("lut_matmul", reference.lut_matmul, "CompositeExplicitAutograd")
_LIBRARY.impl("lut_matmul", cpu.lut_matmul, "CPU")
_LIBRARY.impl("lut_matmul", cuda.lut_matmul, "CUDA")
_LIBRARY.impl("lut_matmul_prepared", cpu.lut_matmul_prepared, "CPU")
_LIBRARY.impl("lut_matmul_prepared", cuda.lut_matmul_prepared, "CUDA")
torch.library.register_fake("quantlab::lut_matmul", _fake_lut_matmul, lib=_LIBRARY)
torch.library.register_fake("quantlab::lut_matmul_prepared", _fake_lut_matmul_prepared, lib=_LIBRARY)
