"""What a free codebook is worth without any knowledge of the inputs."""

from dataclasses import dataclass
from typing import ClassVar

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, Lut, QuantizedLayer, QuantizerInfo
from quantlab.solvers.kmeans import kmeans_levels
from quantlab.solvers.nearest import nearest_codes
from quantlab.solvers.request import check_request, working_dtype


@dataclass(frozen=True, kw_only=True)
class KmeansQuantizer:
    """Unweighted one-dimensional k-means of each row or group; needs no calibration.

    Attributes:
        iterations: upper limit of Lloyd iterations.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="kmeans",
        summary="look-up table fitted to the weights by k-means",
        paper="Lloyd 1982; the unweighted baseline of arXiv:2306.07629",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        supports_groups=True,
    )

    iterations: int = 50

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1")

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Cluster the weights of one layer and round each to its cluster's mean."""
        check_request(problem, self.info)
        weight = problem.weight.to(working_dtype(problem.weight))
        groups = weight.reshape(-1, problem.spec.group_size or problem.in_features)
        levels = kmeans_levels(groups, problem.spec.levels, self.iterations)
        lut = Lut(values=levels.view(problem.out_features, -1, problem.spec.levels).float())
        return QuantizedLayer(codes=nearest_codes(weight, lut), codebook=lut)
