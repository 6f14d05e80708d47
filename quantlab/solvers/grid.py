"""Uniform grids from the range of the weights, and round-to-nearest.

Asymmetric, for a group with smallest and largest weight lo <= 0 <= hi and K levels (the range is widened to
contain 0, so that 0 is exactly representable):

    scale = (hi - lo) / (K - 1),    zero = round(-lo / scale),    code = clamp(round(w / scale) + zero, 0, K - 1)

Symmetric: scale = 2 max|w| / (K - 1) and zero = K / 2.
"""

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, QuantizedLayer, UniformGrid
from quantlab.solvers.nearest import nearest_codes
from quantlab.solvers.request import working_dtype


def minmax_grid(weight: Tensor, spec: CodebookSpec, *, symmetric: bool = False) -> UniformGrid:
    """The grid that just covers each row, or each group of a row.

    Args:
        weight: (out_features, in_features).
        spec: code width and group size.
        symmetric: whether 0 lies at the middle code instead of where the range puts it.

    Returns:
        A grid with whole zeros, in float64 if the weight is float64, else in float32.
    """
    out_features, in_features = weight.shape
    groups = weight.to(working_dtype(weight)).reshape(out_features, -1, spec.group_size or in_features)
    steps = spec.levels - 1
    if symmetric:
        scale = _positive(2 * groups.abs().amax(dim=2) / steps)
        zero = torch.full_like(scale, spec.levels / 2)
    else:
        lowest = groups.amin(dim=2).clamp(max=0)
        scale = _positive((groups.amax(dim=2).clamp(min=0) - lowest) / steps)
        zero = (-lowest / scale).round()
    return UniformGrid(scale=scale, zero=zero, bits=spec.bits)


def round_to_nearest(weight: Tensor, spec: CodebookSpec, *, symmetric: bool = False) -> QuantizedLayer:
    """Round every weight to the nearest level of its min-max grid (RTN), ignoring the layer's inputs.

    Args:
        weight: (out_features, in_features).
        spec: code width and group size.
        symmetric: see `minmax_grid`.
    """
    grid = minmax_grid(weight, spec, symmetric=symmetric)
    return QuantizedLayer(codes=nearest_codes(weight, grid), codebook=as_stored(grid))


def as_stored(grid: UniformGrid) -> UniformGrid:
    """The grid in float32, the precision in which codebooks are handed over."""
    return UniformGrid(scale=grid.scale.float(), zero=grid.zero.float(), bits=grid.bits)


def _positive(scale: Tensor) -> Tensor:
    # A group of zeros has no range; any positive step represents it exactly.
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
