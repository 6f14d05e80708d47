"""Registration of `torch.ops.quantlab.lut_matmul`: x Wᵀ + bias for a weight stored as codes into a codebook.

Operands:
    x: (..., in_features), floating point; any leading dimensions, also empty ones.
    packed_codes: (bits, out_features, ceil(in_features / 32)) int32 (`quantlab_kernels.packing`).
    codebook: (out_features, groups, 2**bits), floating point; column j belongs to group
        j // (in_features / groups).
    bias: (out_features,) or None; taken in the type of x.
    outlier_offsets, outlier_columns, outlier_values: corrections added to the selected levels, in compressed
        rows: row r owns the entries from offsets[r] to offsets[r + 1]. All three or none. Columns must be
        valid; the operation does not read values to check them.
Result:
    (..., out_features) in the type of x. For inference: no derivative is registered.

The primitive `torch.library.Library` is used rather than `custom_op` since its calls cost half as much.
"""

import torch
from torch import Tensor

from quantlab_kernels import reference
from quantlab_kernels.shapes import check_operands

_LIBRARY = torch.library.Library("quantlab", "DEF")
_LIBRARY.define(
    "lut_matmul(Tensor x, Tensor packed_codes, Tensor codebook, Tensor? bias=None, Tensor? outlier_offsets=None, "
    "Tensor? outlier_columns=None, Tensor? outlier_values=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _fake(
    x: Tensor,
    packed_codes: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    outlier_offsets: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_values: Tensor | None = None,
) -> Tensor:
    check_operands(x, packed_codes, codebook, bias, outlier_offsets, outlier_columns, outlier_values)
    return x.new_empty((*x.shape[:-1], packed_codes.shape[1]))


_LIBRARY.impl("lut_matmul", reference.lut_matmul, "CompositeExplicitAutograd")
torch.library.register_fake("quantlab::lut_matmul", _fake, lib=_LIBRARY)
