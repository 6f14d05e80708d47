"""Cutting the answer to a stack of rows into its parts, and joining parts to a layer."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from quantlab.api import Codebook, Lut, Outliers, QuantizedLayer, UniformGrid


def split_rows(layer: QuantizedLayer, sizes: Sequence[int]) -> list[QuantizedLayer]:
    """Cut an answer into parts of `sizes` rows each, without their diagnostics."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(
            QuantizedLayer(
                codes=layer.codes[rows],
                codebook=_codebook_rows(layer.codebook, rows),
                outliers=None if layer.outliers is None else _outlier_rows(layer.outliers, rows),
            )
        )
        start += size
    return parts


def join_rows(parts: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """The layer that consists of the rows of all parts, in their order, without diagnostics."""
    if len(parts) == 1:
        return replace(parts[0], diagnostics={})
    outliers, start = [], 0
    for part in parts:
        if part.outliers is not None:
            outliers.append(replace(part.outliers, rows=part.outliers.rows + start))
        start += len(part.codes)
    return QuantizedLayer(
        codes=torch.cat([part.codes for part in parts]),
        codebook=_join_codebooks([part.codebook for part in parts]),
        outliers=_join_outliers(outliers) if outliers else None,
    )


def _codebook_rows(codebook: Codebook, rows: slice) -> Codebook:
    if isinstance(codebook, Lut):
        return Lut(values=codebook.values[rows])
    return replace(codebook, scale=codebook.scale[rows], zero=codebook.zero[rows])


def _join_codebooks(codebooks: Sequence[Codebook]) -> Codebook:
    grids = [codebook for codebook in codebooks if isinstance(codebook, UniformGrid)]
    if len(grids) < len(codebooks):  # levels may be free in one part and equally spaced in another
        return Lut(values=torch.cat([codebook.levels() for codebook in codebooks]))
    return replace(
        grids[0], scale=torch.cat([grid.scale for grid in grids]), zero=torch.cat([grid.zero for grid in grids])
    )


def _outlier_rows(outliers: Outliers, rows: slice) -> Outliers:
    inside = (outliers.rows >= rows.start) & (outliers.rows < rows.stop)
    return Outliers(
        rows=outliers.rows[inside] - rows.start, columns=outliers.columns[inside], values=outliers.values[inside]
    )


def _join_outliers(outliers: Sequence[Outliers]) -> Outliers:
    return Outliers(
        rows=torch.cat([part.rows for part in outliers]),
        columns=torch.cat([part.columns for part in outliers]),
        values=torch.cat([part.values for part in outliers]),
    )
