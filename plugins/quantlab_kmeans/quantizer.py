"""What a free codebook is worth with little or no knowledge of the inputs."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, Lut, QuantizedLayer, QuantizerInfo, Statistic
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import nearest_codes
from quantlab.solvers.options import (
    check_at_least_one,
    check_choice,
    check_finite_and_not_negative,
    check_fraction,
)
from quantlab.solvers.outliers import as_outliers, largest
from quantlab.solvers.request import check_request, needing, working_dtype

Weighting = Literal["none", "hessian_diagonal", "fisher"]

_NEEDS = {"hessian_diagonal": Statistic.HESSIAN, "fisher": Statistic.FISHER}


@dataclass(frozen=True, kw_only=True)
class KmeansQuantizer:
    """One-dimensional k-means of each row or group; needs no calibration unless it is weighted.

    With weighting "fisher" and outliers it is SqueezeLLM (arXiv:2306.07629, dense-and-sparse decomposition). Outliers
    take no part in the clustering and are stored exactly; they are chosen among all rows together, which makes rows
    depend on each other.

    Attributes:
        iterations: upper limit of Lloyd iterations.
        weighting: the factor of each squared error. "none" counts all alike. "hessian_diagonal" takes the mean square
            H_jj of the input, to `hessian_power`: at power 1 that is the layer loss without the correlations between
            inputs, and where a few inputs dominate, their rows' levels are spent on them. "fisher" takes the diagonal
            of the Fisher information, what the error does to the model's loss.
        hessian_power: see `weighting`; not read otherwise.
        outlier_fraction: share of the weights, the largest in magnitude, that are stored as outliers.
        sensitive_fraction: share of the weights, the most sensitive ones, that are stored as outliers; only with
            weighting "fisher".
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="kmeans",
        summary="look-up table fitted to the weights by k-means",
        paper="Lloyd 1982; SqueezeLLM, arXiv:2306.07629",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        supports_groups=True,
        presets={
            "squeezellm": {
                "iterations": 50,
                "weighting": "fisher",
                "outlier_fraction": 0.004,
                "sensitive_fraction": 0.0005,
            }
        },
    )

    iterations: int = 50
    weighting: Weighting = "none"
    hessian_power: float = 1.0
    outlier_fraction: float = 0.0
    sensitive_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_at_least_one("iterations", self.iterations)
        check_choice("weighting", self.weighting, Weighting)
        check_finite_and_not_negative("hessian_power", self.hessian_power)
        check_fraction("outlier_fraction", self.outlier_fraction)
        check_fraction("sensitive_fraction", self.sensitive_fraction)
        if self.sensitive_fraction > 0 and self.weighting != "fisher":
            raise ValueError(
                f"sensitive_fraction={self.sensitive_fraction} does not go with weighting={self.weighting!r}, which "
                "does not know how sensitive single weights are; set weighting: fisher"
            )
        info = needing(self.info, _NEEDS[self.weighting]) if self.weighting in _NEEDS else self.info
        if self._has_outliers:
            info = replace(info, row_independent=False)
        object.__setattr__(self, "info", info)  # the way past a frozen dataclass

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Cluster the weights of one layer and round each to the level nearest to it."""
        check_request(problem, self.info)
        weight = problem.weight.to(working_dtype(problem.weight))
        importance = None if self.weighting == "none" else self._importance(problem)
        kept_exactly = self._outliers(weight, importance) if self._has_outliers else None
        if kept_exactly is not None:
            importance = torch.ones_like(weight) if importance is None else importance
            importance = importance.expand_as(weight).masked_fill(kept_exactly, 0.0)
        lut = self._table(weight, problem, importance)
        layer = QuantizedLayer(codes=nearest_codes(weight, lut), codebook=lut)
        if kept_exactly is None:
            return layer
        return replace(layer, outliers=as_outliers(torch.where(kept_exactly, weight - layer.dequantize(), 0.0)))

    @property
    def _has_outliers(self) -> bool:
        return self.outlier_fraction > 0 or self.sensitive_fraction > 0

    def _importance(self, problem: LayerProblem) -> Tensor:
        """The factors of the squared errors, of a shape that expands to (out_features, in_features)."""
        if self.weighting == "fisher":
            return problem.require_fisher()
        energy = problem.require_hessian().diagonal().double()
        # Relative to the strongest input, so that no power overflows; a layer without input has weights of 0.
        relative = energy / energy.amax().clamp(min=torch.finfo(energy.dtype).tiny)
        return relative.pow(self.hessian_power)

    def _outliers(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        far = largest(weight.abs().flatten(), self.outlier_fraction).view(weight.shape)
        if self.sensitive_fraction == 0 or importance is None:
            return far
        return far | largest(importance.flatten(), self.sensitive_fraction).view(weight.shape)

    def _table(self, weight: Tensor, problem: LayerProblem, importance: Tensor | None) -> Lut:
        size = problem.spec.group_size or problem.in_features
        grouped = None if importance is None else importance.expand_as(weight).reshape(-1, size)
        levels = kmeans_levels(weight.reshape(-1, size), problem.spec.levels, self.iterations, grouped)
        return Lut(values=levels.view(problem.out_features, -1, problem.spec.levels).float())
