"""Five small methods that keep the contract; the mutants override one step of one of them.

They cover the capabilities between them: with and without statistics, groups, a uniform grid, a free codebook,
outliers, a reported loss, prepared statistics.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.api import (
    CodebookSpec,
    InputStatistics,
    LayerProblem,
    Lut,
    Outliers,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
    UniformGrid,
    layer_loss,
)
from quantlab.solvers.request import prepared_for

LLOYD_ITERATIONS = 10


def factorize(damped: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian: (in_features, in_features)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _admit(problem: LayerProblem, info: QuantizerInfo) -> CodebookSpec:
    spec = problem.spec
    if spec.bits not in info.bits:
        raise ValueError(f"{problem.name}: bits={spec.bits} is not supported; use one of {sorted(info.bits)}")
    if spec.group_size is not None:
        raise ValueError(f"{problem.name}: group_size={spec.group_size} is not supported; use group_size: null")
    return spec


def lloyd(weight: Tensor, importance: Tensor, count: int) -> Tensor:
    """Levels of each row by Lloyd's algorithm, started at quantiles: (out_features, count).

    Args:
        weight: (out_features, in_features).
        importance: of every weight, not negative.
        count: levels.
    """
    middle = ((torch.arange(count, device=weight.device) + 0.5) / count * weight.shape[1]).long()
    levels = weight.sort(dim=1).values[:, middle]
    for _ in range(LLOYD_ITERATIONS):
        nearest = (weight[:, :, None] - levels[:, None]).abs().argmin(dim=2)
        members = torch.zeros_like(levels).scatter_add_(1, nearest, importance)
        sums = torch.zeros_like(levels).scatter_add_(1, nearest, importance * weight)
        levels = torch.where(members > 0, sums / torch.where(members > 0, members, 1), levels)
    return levels


@dataclass(frozen=True, kw_only=True)
class HonestRounding:
    """Round to nearest on a uniform grid from minimum to maximum."""

    range_fraction: float = 1.0

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="honest_rounding",
        summary="round to nearest",
        paper="none: a test double",
        bits=frozenset(range(2, 9)),
        supports_groups=True,
        presets={"clipped": {"range_fraction": 0.9}},
    )

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        weight = self.prepare(problem)
        grouped = weight.reshape(problem.out_features, -1, problem.spec.group_size or problem.in_features)
        scale, zero = self.grid(grouped, problem.spec)
        codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, self.top_code(problem.spec))
        codebook = UniformGrid(scale=scale, zero=zero, bits=problem.spec.bits)
        return QuantizedLayer(codes=codes.to(torch.uint8).reshape(weight.shape), codebook=codebook)

    def prepare(self, problem: LayerProblem) -> Tensor:
        """The weight to round: (out_features, in_features)."""
        return problem.weight.float()

    def top_code(self, spec: CodebookSpec) -> int:
        """The highest code in use."""
        return spec.levels - 1

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group: (out_features, groups) from (out_features, groups, group_size)."""
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        scale = self.range_fraction * (high - low) / self.top_code(spec)
        scale = torch.where(scale > 0, scale, 1)  # a group of zeros has no range
        return scale, (-self.range_fraction * low / scale).round()


@dataclass(frozen=True, kw_only=True)
class HonestOutliers(HonestRounding):
    """Rounding, with the worst entry of each row corrected by an outlier."""

    info: ClassVar[QuantizerInfo] = replace(HonestRounding.info, name="honest_outliers")

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        layer = super().quantize(problem)
        error = problem.weight.float() - layer.dequantize()
        return replace(layer, outliers=self.correct(error, problem))

    def correct(self, error: Tensor, problem: LayerProblem) -> Outliers:
        """Corrections for an error of shape (out_features, in_features)."""
        rows = torch.arange(len(error), device=error.device)
        columns = error.abs().argmax(dim=1)
        return Outliers(rows=rows, columns=columns, values=error[rows, columns])


@dataclass(frozen=True, kw_only=True)
class HonestSweep:
    """Column by column on a k-means codebook, each error passed on to the columns that follow (arXiv:2210.17323)."""

    damping: float = 0.01

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="honest_sweep",
        summary="error feedback on a k-means codebook",
        paper="none: a test double",
        bits=frozenset({2, 3, 4}),
        needs=frozenset({Statistic.HESSIAN}),
    )

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        spec = self.admit(problem)
        weight = problem.weight.double()
        levels = self.fit(weight, spec.levels)
        codes = self.sweep(weight, levels, self.factor(self.hessian(problem)))
        layer = QuantizedLayer(codes=codes, codebook=Lut(values=levels.float()[:, None]))
        return replace(layer, diagnostics=self.report(problem, layer))

    def admit(self, problem: LayerProblem) -> CodebookSpec:
        """The budget, if it is supported."""
        return _admit(problem, self.info)

    def hessian(self, problem: LayerProblem) -> Tensor:
        """The Hessian: (in_features, in_features) float64."""
        return problem.require_hessian().double()

    def factor(self, hessian: Tensor) -> Tensor:
        """The upper Cholesky factor of the inverse damped Hessian: (in_features, in_features)."""
        diagonal = hessian.diagonal()
        mean = diagonal.mean() if diagonal.any() else 1.0
        pivots = torch.where(diagonal == 0, mean, 0.0)
        return factorize(hessian + torch.diag(pivots + self.damping * mean))

    def fit(self, weight: Tensor, count: int) -> Tensor:
        """Levels of each row: (out_features, count)."""
        return lloyd(weight, torch.ones_like(weight), count)

    def sweep(self, weight: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
        """Codes, chosen from the first column to the last: (out_features, in_features) uint8."""
        residual = weight.clone()
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for column in range(weight.shape[1]):
            code = (residual[:, column, None] - levels).abs().argmin(dim=1, keepdim=True)
            error = residual[:, column] - levels.gather(1, code)[:, 0]
            self.pass_on(error / factor[column, column], factor[column], residual, column)
            codes[:, column] = code[:, 0].to(torch.uint8)
        return codes

    def pass_on(self, error: Tensor, factor_row: Tensor, residual: Tensor, column: int) -> None:
        """Compensate an error of shape (out_features,) in the columns that follow."""
        residual[:, column + 1 :] -= error[:, None] * factor_row[column + 1 :]

    def report(self, problem: LayerProblem, layer: QuantizedLayer) -> dict[str, float]:
        """Diagnostics of the answer."""
        return {"loss": float(layer_loss(problem.weight, layer.dequantize(), problem.require_hessian()).sum())}


@dataclass(frozen=True, kw_only=True)
class HonestPreparation(HonestSweep):
    """The same, with the factor computed once for all problems that share their statistics."""

    info: ClassVar[QuantizerInfo] = replace(HonestSweep.info, name="honest_preparation")

    def prepare_statistics(self, statistics: InputStatistics, dtype: torch.dtype) -> Tensor:
        """See StatisticsPreparer."""
        return self.factor(statistics.hessian.double())

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        spec = self.admit(problem)
        weight = problem.weight.double()
        levels = self.fit(weight, spec.levels)
        codes = self.sweep(weight, levels, prepared_for(self, problem))
        layer = QuantizedLayer(codes=codes, codebook=Lut(values=levels.float()[:, None]))
        return replace(layer, diagnostics=self.report(problem, layer))


@dataclass(frozen=True, kw_only=True)
class HonestFisher:
    """k-means weighted by the Fisher diagonal, and rounding to it (arXiv:2306.07629)."""

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="honest_fisher",
        summary="k-means weighted by the Fisher diagonal",
        paper="none: a test double",
        bits=frozenset({2, 3, 4}),
        needs=frozenset({Statistic.FISHER}),
    )

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        spec = _admit(problem, self.info)
        weight = problem.weight.double()
        levels = self.fit(weight, self.importance(problem), spec.levels)
        codes = (weight[:, :, None] - levels[:, None]).abs().argmin(dim=2)
        return QuantizedLayer(codes=codes.to(torch.uint8), codebook=Lut(values=levels.float()[:, None]))

    def importance(self, problem: LayerProblem) -> Tensor:
        """Of every weight: (out_features, in_features) float64."""
        return problem.require_fisher().double()

    def fit(self, weight: Tensor, importance: Tensor, count: int) -> Tensor:
        """Levels of each row: (out_features, count)."""
        return lloyd(weight, importance, count)
