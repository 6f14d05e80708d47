"""Uniform grids from the range of the weights, shrunk or not, and round-to-nearest.

Asymmetric, for a group with smallest and largest weight lo <= 0 <= hi and K levels (the range is widened to
contain 0, so that 0 is exactly representable):

    scale = (hi - lo) / (K - 1),    zero = round(-lo / scale),    code = clamp(round(w / scale) + zero, 0, K - 1)

Symmetric: scale = 2 max|w| / (K - 1) and zero = K / 2.

A clip search shrinks the range of each row or group by a factor of its own: with few levels, a finer step for the many
weights in the middle is worth more than the few at the ends, which are clipped.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, QuantizedLayer, UniformGrid
from quantlab.solvers.nearest import nearest_codes
from quantlab.solvers.request import working_dtype

ClipSearch = Literal["none", "weight", "hessian"]

_FRACTIONS = [percent / 100 for percent in range(100, 20, -1)]
_WEIGHT_ERROR_POWER = 2.4
_CHUNK_ELEMENTS = 1 << 17  # weights searched at a time: every pass over them stays in a core's cache


def fit_grid(
    weight: Tensor,
    spec: CodebookSpec,
    clip_search: ClipSearch,
    *,
    symmetric: bool = False,
    hessian_diagonal: Tensor | None = None,
) -> UniformGrid:
    """The min-max grid, or the best one whose range is a fraction 1, 0.99, ..., 0.21 of it.

    Every row or group takes the fraction with the smallest error of its rounded weights, the largest on a tie: its
    error is never above that of the min-max grid.

    Args:
        weight: (out_features, in_features).
        spec: code width and group size.
        clip_search: "none" is the min-max grid. "weight" minimises the sum of |w - ŵ|^2.4, the criterion of GPTQ's
            published code (arXiv:2210.17323). "hessian" minimises the sum of H_jj (w_j - ŵ_j)², the layer loss without
            the correlations between inputs.
        symmetric: see `minmax_grid`.
        hessian_diagonal: (in_features,), read by "hessian" only.

    Raises:
        ValueError: "hessian" without the diagonal.
    """
    if clip_search == "none":
        return minmax_grid(weight, spec, symmetric=symmetric)
    if clip_search == "weight":
        return _clipped_grid(weight, spec, symmetric, lambda error: error.abs().pow(_WEIGHT_ERROR_POWER))
    if hessian_diagonal is None:
        raise ValueError("clip_search='hessian' weighs errors by the diagonal of the Hessian; pass hessian_diagonal")
    importance = hessian_diagonal.to(working_dtype(weight)).reshape(-1, spec.group_size or weight.shape[1])
    return _clipped_grid(weight, spec, symmetric, lambda error: error.square() * importance)


def minmax_grid(weight: Tensor, spec: CodebookSpec, *, symmetric: bool = False) -> UniformGrid:
    """The grid that just covers each row, or each group of a row.

    Args:
        weight: (out_features, in_features).
        spec: code width and group size.
        symmetric: whether 0 lies at the middle code instead of where the range puts it.

    Returns:
        A grid with whole zeros, in float64 if the weight is float64, else in float32.
    """
    return _grid_over(*_ranges(weight, spec), spec, symmetric)


def round_to_nearest(weight: Tensor, spec: CodebookSpec, *, symmetric: bool = False) -> QuantizedLayer:
    """Round every weight to the nearest level of its min-max grid (RTN), ignoring the layer's inputs.

    Args:
        weight: (out_features, in_features).
        spec: code width and group size.
        symmetric: see `minmax_grid`.
    """
    return round_to_grid(weight, minmax_grid(weight, spec, symmetric=symmetric))


def round_to_grid(weight: Tensor, grid: UniformGrid) -> QuantizedLayer:
    """Round every weight to the nearest level of a given grid.

    Args:
        weight: (out_features, in_features).
        grid: one per row or group.
    """
    return QuantizedLayer(codes=nearest_codes(weight, grid), codebook=as_stored(grid))


def as_stored(grid: UniformGrid) -> UniformGrid:
    """The grid in float32, the precision in which codebooks are handed over."""
    return UniformGrid(scale=grid.scale.float(), zero=grid.zero.float(), bits=grid.bits)


def _clipped_grid(
    weight: Tensor, spec: CodebookSpec, symmetric: bool, penalty: Callable[[Tensor], Tensor]
) -> UniformGrid:
    chunks = weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1]))
    grids = [_search_fractions(chunk, spec, symmetric, penalty) for chunk in chunks]
    return UniformGrid(
        scale=torch.cat([grid.scale for grid in grids]), zero=torch.cat([grid.zero for grid in grids]), bits=spec.bits
    )


def _search_fractions(
    weight: Tensor, spec: CodebookSpec, symmetric: bool, penalty: Callable[[Tensor], Tensor]
) -> UniformGrid:
    lowest, highest = _ranges(weight, spec)
    full = _grid_over(lowest, highest, spec, symmetric)
    groups = weight.to(lowest.dtype).reshape(*lowest.shape, -1)
    scale, zero, least = full.scale, full.zero, torch.full_like(lowest, torch.inf)
    for fraction in _FRACTIONS:
        grid = _grid_over(fraction * lowest, fraction * highest, spec, symmetric)
        codes = nearest_codes(weight, grid).view(groups.shape)
        # In units of the full step, so that the scale of a row does not decide between fractions by rounding.
        error = (groups - (codes - grid.zero[..., None]) * grid.scale[..., None]) / full.scale[..., None]
        total = penalty(error).sum(dim=2)
        better = total < least
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
        least = torch.minimum(total, least)
    return UniformGrid(scale=scale, zero=zero, bits=spec.bits)


def _ranges(weight: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, or 0 if that is farther out: (out_features, groups) each."""
    out_features, in_features = weight.shape
    groups = weight.to(working_dtype(weight)).reshape(out_features, -1, spec.group_size or in_features)
    return groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)


def _grid_over(lowest: Tensor, highest: Tensor, spec: CodebookSpec, symmetric: bool) -> UniformGrid:
    steps = spec.levels - 1
    if symmetric:
        scale = _positive(2 * torch.maximum(-lowest, highest) / steps)
        zero = torch.full_like(scale, spec.levels / 2)
    else:
        scale = _positive((highest - lowest) / steps)
        zero = (-lowest / scale).round()
    return UniformGrid(scale=scale, zero=zero, bits=spec.bits)


def _positive(scale: Tensor) -> Tensor:
    # A group of zeros has no range; any positive step represents it exactly.
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
