"""The baseline that every other method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from quantlab.api import MAX_BITS, MIN_BITS, LayerProblem, QuantizedLayer, QuantizerInfo, Statistic
from quantlab.solvers.grid import ClipSearch, fit_grid, round_to_grid
from quantlab.solvers.options import check_choice
from quantlab.solvers.request import check_request, needing


@dataclass(frozen=True, kw_only=True)
class RtnQuantizer:
    """Round-to-nearest on the uniform grid that just covers each row or group; needs no calibration by itself.

    Attributes:
        symmetric: whether the grid is centred on zero, which makes the zero point constant.
        clip_search: "none" covers the range of the weights; "weight" and "hessian" shrink it to what serves best, see
            `quantlab.solvers.grid.fit_grid`. "hessian" makes the method need calibration.
    """

    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="rtn",
        summary="round to the nearest level of a min-max grid",
        paper="folklore; the baseline of arXiv:2210.17323",
        bits=frozenset(range(MIN_BITS, MAX_BITS + 1)),
        supports_groups=True,
    )

    symmetric: bool = False
    clip_search: ClipSearch = "none"

    def __post_init__(self) -> None:
        check_choice("clip_search", self.clip_search, ClipSearch)
        if self.clip_search == "hessian":
            object.__setattr__(self, "info", needing(self.info, Statistic.HESSIAN))  # the way past a frozen dataclass

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """Round the weights of one layer."""
        check_request(problem, self.info)
        diagonal = problem.require_hessian().diagonal() if self.clip_search == "hessian" else None
        grid = fit_grid(
            problem.weight, problem.spec, self.clip_search, symmetric=self.symmetric, hessian_diagonal=diagonal
        )
        return round_to_grid(problem.weight, grid)
