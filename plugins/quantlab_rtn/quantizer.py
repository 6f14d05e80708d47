"""The baseline that every other method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, QuantizedLayer, QuantizerInfo
from quantlab.solvers.grid import round_to_nearest
from quantlab.solvers.request import check_request


@dataclass(frozen=True, kw_only=True)
class RtnQuantizer:
    """Round-to-nearest on the uniform grid that just covers each row or group; needs no calibration.

    Attributes:
        symmetric: whether the grid is centred on zero, which makes the zero point constant.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="rtn",
        summary="round to the nearest level of a min-max grid",
        paper="folklore; the baseline of arXiv:2210.17323",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        supports_groups=True,
    )

    symmetric: bool = False

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Round the weights of one layer."""
        check_request(problem, self.info)
        return round_to_nearest(problem.weight, problem.spec, symmetric=self.symmetric)
