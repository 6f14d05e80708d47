"""Defects of the arithmetic."""

import os
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, LayerProblem, Outliers, QuantizedLayer, QuantizerInfo
from quantlab.testing.mutants.honest import HonestOutliers, HonestRounding, HonestSweep, factorize
from quantlab.testing.mutants.planting import killed_by


@killed_by("weights_on_a_grid_are_reproduced", "loss_does_not_exceed_that_of_rounding")
@dataclass(frozen=True, kw_only=True)
class UnusedTopCode(HonestRounding):
    """The code 2**bits - 1 is never used."""

    def top_code(self, spec: CodebookSpec) -> int:
        """See HonestRounding."""
        return spec.levels - 2


@killed_by("hessian_is_put_to_use")
@dataclass(frozen=True, kw_only=True)
class UnusedHessian(HonestSweep):
    """The Hessian is collected, checked, and then not used."""

    def factor(self, hessian: Tensor) -> Tensor:
        """See HonestSweep."""
        return super().factor(torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device))


@killed_by("hessian_is_put_to_use", "dead_inputs_do_no_harm")
@dataclass(frozen=True, kw_only=True)
class ShiftedResidual(HonestSweep):
    """Each error is compensated one column too late: a misprinted index."""

    def pass_on(self, error: Tensor, factor_row: Tensor, residual: Tensor, column: int) -> None:
        """See HonestSweep."""
        residual[:, column + 2 :] -= error[:, None] * factor_row[column + 1 : -1]


@killed_by(
    "weights_on_a_grid_are_reproduced",
    "loss_does_not_exceed_that_of_rounding",
    "hessian_is_put_to_use",
    "wider_codes_lose_less",
    "dead_inputs_do_no_harm",
    "singular_hessians_are_solved",
    "rows_of_few_values_are_solved",
    "reported_loss_is_true",
)
@dataclass(frozen=True, kw_only=True)
class PermutedCodes(HonestSweep):
    """Columns are processed by importance, and their codes left in that order."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        layer = super().quantize(problem)
        order = problem.require_hessian().diagonal().argsort(descending=True)
        return replace(layer, codes=layer.codes[:, order])


@killed_by("wider_codes_lose_less")
@dataclass(frozen=True, kw_only=True)
class AtMostEightLevels(HonestRounding):
    """However wide the code, eight levels are used."""

    def top_code(self, spec: CodebookSpec) -> int:
        """See HonestRounding."""
        return min(spec.levels, 8) - 1


@killed_by("row_order_does_not_matter", "weights_on_a_grid_are_reproduced", "constant_rows_are_reproduced")
@dataclass(frozen=True, kw_only=True)
class FirstRowLeads(HonestRounding):
    """The first row decides how far the others are clipped."""

    info: ClassVar[QuantizerInfo] = replace(HonestRounding.info, row_independent=False)

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        scale, zero = super().grid(grouped, spec)
        leader = grouped[0].abs().amax()
        return scale * (1 + 0.01 * (grouped.abs().amax(dim=2) > leader)), zero


@killed_by("rows_are_solved_independently")
@dataclass(frozen=True, kw_only=True)
class SharedOutlierBudget(HonestOutliers):
    """Rows compete for outliers, though the method declares them independent."""

    def correct(self, error: Tensor, problem: LayerProblem) -> Outliers:
        """See HonestOutliers."""
        worst = error.abs().flatten().topk(len(error)).indices.sort().values
        rows, columns = worst // problem.in_features, worst % problem.in_features
        return Outliers(rows=rows, columns=columns, values=error[rows, columns])


@killed_by(
    "rows_are_solved_independently",
    "weights_on_a_grid_are_reproduced",
    "loss_does_not_exceed_that_of_rounding",
    "groups_have_their_own_codebooks",
    "constant_rows_are_reproduced",
)
@dataclass(frozen=True, kw_only=True)
class LayerWideRange(HonestRounding):
    """All rows share the range of the layer."""

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        scale, zero = super().grid(grouped.flatten()[None, None], spec)
        shape = grouped.shape[:2]
        return scale.expand(shape).contiguous(), zero.expand(shape).contiguous()


@killed_by("weight_scale_does_not_matter", "constant_rows_are_reproduced")
@dataclass(frozen=True, kw_only=True)
class AbsoluteEpsilon(HonestRounding):
    """Scales are kept above an absolute epsilon."""

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        scale, zero = super().grid(grouped, spec)
        return scale.clamp(min=1e-5), zero


@killed_by("hessian_scale_does_not_matter")
@dataclass(frozen=True, kw_only=True)
class AbsoluteDamping(HonestSweep):
    """Damping is an absolute constant rather than a fraction of the mean diagonal."""

    def factor(self, hessian: Tensor) -> Tensor:
        """See HonestSweep."""
        return factorize(hessian + self.damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device))


@killed_by("reported_loss_is_true")
@dataclass(frozen=True, kw_only=True)
class HalfTheLoss(HonestSweep):
    """The reported loss lacks the factor 2 that the published code divides away."""

    def report(self, problem: LayerProblem, layer: QuantizedLayer) -> dict[str, float]:
        """See HonestSweep."""
        return {name: value / 2 for name, value in super().report(problem, layer).items()}


@killed_by("reported_loss_is_true")
@dataclass(frozen=True, kw_only=True)
class DampedLoss(HonestSweep):
    """The reported loss is measured with the damped Hessian."""

    def report(self, problem: LayerProblem, layer: QuantizedLayer) -> dict[str, float]:
        """See HonestSweep."""
        extra = self.damping * problem.require_hessian().diagonal().mean()
        error = problem.weight - layer.dequantize()
        return {"loss": super().report(problem, layer)["loss"] + float(extra * error.square().sum())}


@killed_by("code_paths_agree")
@dataclass(frozen=True, kw_only=True)
class NeglectedReference(HonestRounding):
    """The reference was left behind when the native code learnt to use the highest code."""

    def top_code(self, spec: CodebookSpec) -> int:
        """See HonestRounding."""
        return spec.levels - 1 - (os.environ.get("QUANTLAB_KERNELS") == "reference")
