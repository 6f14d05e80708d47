"""What a free codebook is worth with little or no knowledge of the inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, Lut, QuantizedLayer, QuantizerInfo
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import nearest_codes
from quantlab.solvers.options import check_at_least_one, check_finite_and_not_negative
from quantlab.solvers.request import check_request, with_hessian, working_dtype


@dataclass(frozen=True, kw_only=True)
class KmeansQuantizer:
    """One-dimensional k-means of each row or group; needs no calibration unless it is weighted.

    Attributes:
        iterations: upper limit of Lloyd iterations.
        hessian_power: the weight of an input's values is H_jj to this power, H_jj being its mean square. 0 is
            unweighted. 1 is the layer loss without the correlations between inputs, as in SqueezeLLM
            (arXiv:2306.07629) but with the layer's output for the model's; where a few inputs dominate it spends
            their rows' levels on them. Anything but 0 makes the method need calibration.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="kmeans",
        summary="look-up table fitted to the weights by k-means",
        paper="Lloyd 1982; the unweighted baseline of arXiv:2306.07629",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        supports_groups=True,
    )

    iterations: int = 50
    hessian_power: float = 0.0

    def __post_init__(self) -> None:
        check_at_least_one("iterations", self.iterations)
        check_finite_and_not_negative("hessian_power", self.hessian_power)
        if self.hessian_power > 0:
            object.__setattr__(self, "info", with_hessian(self.info))  # the way past a frozen dataclass

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Cluster the weights of one layer and round each to the level nearest to it."""
        check_request(problem, self.info)
        weight = problem.weight.to(working_dtype(problem.weight))
        groups = weight.reshape(-1, problem.spec.group_size or problem.in_features)
        weights = self._weights(problem, groups) if self.hessian_power > 0 else None
        levels = kmeans_levels(groups, problem.spec.levels, self.iterations, weights)
        lut = Lut(values=levels.view(problem.out_features, -1, problem.spec.levels).float())
        return QuantizedLayer(codes=nearest_codes(weight, lut), codebook=lut)

    def _weights(self, problem: LayerProblem, groups: Tensor) -> Tensor:
        energy = problem.require_hessian().diagonal().double()
        # Relative to the strongest input, so that no power overflows; a layer without input has weights of 0.
        relative = energy / energy.amax().clamp(min=torch.finfo(energy.dtype).tiny)
        return relative.pow(self.hessian_power).view(-1, groups.shape[1]).repeat(problem.out_features, 1)
