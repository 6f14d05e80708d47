"""Measure how well a quantized layer does what it was asked to."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, layer_loss
from quantlab.engine.statistics import GroupStatistics, row_groups
from quantlab.executors import Executor
from quantlab.runtime import LutLinear
from quantlab.solvers.grid import round_to_nearest

_ROWS_PER_PIECE = 1024
_SUMMED = re.compile(r"loss(_\d+)?|fallbacks")


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What is reported about one quantized layer.

    All losses compare with what the method was asked to approximate, the target T: the weight, or what
    `quantlab.engine.target` makes of it. Their H is the one that the method was given, after saliency.

    Attributes:
        name: the layer's name in the model.
        shape: (out_features, in_features).
        bits: code width.
        group_size: inputs per codebook, or None for one codebook per row.
        storage_bits: everything stored in place of the weight: codes, codebook or scales, outliers.
        num_tokens: calibration tokens behind the Hessian.
        relative_loss: tr(E H Eᵀ) / tr(T H Tᵀ) of the error E of the weight after rounding to storage precision.
        rtn_relative_loss: the same if T is rounded to nearest with the same budget.
        target_shift: tr(S H Sᵀ) / tr(T H Tᵀ) of the shift S of the target from the weight.
        diagnostics: what the method reported for the rows that were solved together. Of a layer solved in parts,
            losses and fallbacks are summed, and of everything else the largest value is given.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    storage_bits: int
    num_tokens: int
    relative_loss: float
    rtn_relative_loss: float
    target_shift: float
    diagnostics: Mapping[str, float]


def measure_layer(
    name: str,
    weight: Tensor,
    target: Tensor,
    module: LutLinear,
    spec: CodebookSpec,
    statistics: GroupStatistics,
    diagnostics: Sequence[Mapping[str, float]],
    *,
    executor: Executor,
    hessians: Mapping[int, Any],
) -> LayerResult:
    """What is reported about a layer.

    Args:
        name: the layer's name in the model.
        weight: (out_features, in_features) of the float layer.
        target: what the method approximated; the very weight if it was that.
        module: the layer as it is stored.
        spec: its storage budget.
        statistics: of its input.
        diagnostics: of each part that the layer was solved in.
        executor: where rows are measured.
        hessians: handles of the executor, by the identity of the moments.
    """
    stored = module.dequantize()
    moments = statistics.moments[name]

    def units() -> Iterator[tuple[Any, ...]]:
        for group, own in zip(row_groups(len(weight), len(moments)), moments, strict=True):
            for start in range(group.start, group.stop, _ROWS_PER_PIECE):
                rows = slice(start, min(group.stop, start + _ROWS_PER_PIECE))
                wanted = target[rows].float()
                yield wanted, stored[rows], None if target is weight else weight[rows], hessians[id(own)], spec

    scale = loss = baseline = shift = 0.0
    for piece in executor.map(measure_rows, units()):
        scale, loss, baseline, shift = (sum(pair) for pair in zip((scale, loss, baseline, shift), piece, strict=True))
    scale = scale or 1.0
    return LayerResult(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        bits=spec.bits,
        group_size=spec.group_size,
        storage_bits=module.storage_bits,
        num_tokens=statistics.num_tokens,
        relative_loss=loss / scale,
        rtn_relative_loss=baseline / scale,
        target_shift=shift / scale,
        diagnostics=_merged(diagnostics),
    )


def measure_rows(
    wanted: Tensor, stored: Tensor, weight: Tensor | None, hessian: Tensor, spec: CodebookSpec
) -> tuple[float, float, float, float]:
    """Sums over rows of tr(T H Tᵀ), tr(E H Eᵀ), the same of rounding to nearest, and tr(S H Sᵀ); a unit of an executor.

    Args:
        wanted: T, (rows, in_features) float32.
        stored: T - E, the rows as they are stored.
        weight: T - S, or None if S is 0.
        hessian: H, (in_features, in_features).
        spec: the storage budget.
    """

    def loss(of: Tensor, dtype: torch.dtype = torch.float64) -> float:
        return layer_loss(wanted, of, hessian, dtype=dtype).sum().item()

    scale = loss(torch.zeros_like(wanted), torch.float32)
    baseline = loss(round_to_nearest(wanted, spec).dequantize(), torch.float32)
    return scale, loss(stored), baseline, 0.0 if weight is None else loss(weight)


def _merged(diagnostics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for reported in diagnostics:
        for name, value in reported.items():
            values.setdefault(name, []).append(value)
    return {name: sum(own) if _SUMMED.fullmatch(name) else max(own) for name, own in values.items()}
