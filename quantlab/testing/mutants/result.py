"""Defects of the answer's form, and requests that are neither met nor refused."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, LayerProblem, Outliers, QuantizedLayer, QuantizerInfo, UniformGrid
from quantlab.testing.mutants.honest import HonestOutliers, HonestRounding, HonestSweep
from quantlab.testing.mutants.planting import killed_by


@killed_by("codes_are_valid")
@dataclass(frozen=True, kw_only=True)
class WideCodes(HonestRounding):
    """Codes of 3 bits are int32, as one kernel wants them."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        layer = super().quantize(problem)
        return replace(layer, codes=layer.codes.int()) if problem.spec.bits == 3 else layer


@killed_by("codebook_is_valid")
@dataclass(frozen=True, kw_only=True)
class DoubleCodebook(HonestRounding):
    """Below 4 bits, where the solver works in float64, the scales are returned in float64."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        layer = super().quantize(problem)
        grid = layer.codebook
        if problem.spec.bits != 3 or not isinstance(grid, UniformGrid):
            return layer
        return replace(layer, codebook=replace(grid, scale=grid.scale.double()))


@killed_by("diagnostics_are_finite_numbers")
@dataclass(frozen=True, kw_only=True)
class TensorDiagnostic(HonestRounding):
    """A diagnostic is still a tensor, which no manifest can hold."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        peak: float = problem.weight.abs().max()  # type: ignore[assignment]  # the defect
        return replace(super().quantize(problem), diagnostics={"peak": peak})


@killed_by("diagnostics_are_finite_numbers")
@dataclass(frozen=True, kw_only=True)
class NanDiagnostic(HonestRounding):
    """A diagnostic is the mean of nothing."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        return replace(super().quantize(problem), diagnostics={"clipped_fraction": math.nan})


@killed_by("outliers_are_unique_and_ascend")
@dataclass(frozen=True, kw_only=True)
class RepeatedOutliers(HonestOutliers):
    """A correction is split over two outliers at the same position."""

    def correct(self, error: Tensor, problem: LayerProblem) -> Outliers:
        """See HonestOutliers."""
        honest = super().correct(error, problem)
        rows, columns, values = (t.repeat_interleave(2) for t in (honest.rows, honest.columns, honest.values / 2))
        return Outliers(rows=rows, columns=columns, values=values)


@killed_by("outliers_are_additive", "loss_does_not_exceed_that_of_rounding")
@dataclass(frozen=True, kw_only=True)
class NegatedOutliers(HonestOutliers):
    """The error has the wrong sign, approximation minus weight."""

    def correct(self, error: Tensor, problem: LayerProblem) -> Outliers:
        """See HonestOutliers."""
        return super().correct(-error, problem)


@killed_by(
    "outliers_are_additive",
    "loss_does_not_exceed_that_of_rounding",
    "weights_on_a_grid_are_reproduced",
    "wider_codes_lose_less",
    "constant_rows_are_reproduced",
)
@dataclass(frozen=True, kw_only=True)
class ReplacingOutliers(HonestOutliers):
    """Outliers hold the weights themselves, as if they replaced the dense entries."""

    def correct(self, error: Tensor, problem: LayerProblem) -> Outliers:
        """See HonestOutliers."""
        honest = super().correct(error, problem)
        return replace(honest, values=problem.weight.float()[honest.rows, honest.columns])


@killed_by("half_precision_weights_are_exact")
@dataclass(frozen=True, kw_only=True)
class InputPrecision(HonestRounding):
    """Arithmetic is done in the precision of the checkpoint."""

    def prepare(self, problem: LayerProblem) -> Tensor:
        """See HonestRounding."""
        return problem.weight


@killed_by("strided_weights_are_accepted")
@dataclass(frozen=True, kw_only=True)
class ContiguousOnly(HonestRounding):
    """The weight is viewed as a vector, which a transposed weight cannot be."""

    def prepare(self, problem: LayerProblem) -> Tensor:
        """See HonestRounding."""
        return problem.weight.view(-1).float().view(problem.weight.shape)


@killed_by("small_layers_are_accepted")
@dataclass(frozen=True, kw_only=True)
class SqueezedCodes(HonestRounding):
    """A squeeze meant for the group axis removes single rows and columns, too."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        layer = super().quantize(problem)
        return replace(layer, codes=layer.codes.squeeze())


@killed_by("unsupported_bits_are_refused")
@dataclass(frozen=True, kw_only=True)
class SilentBits(HonestSweep):
    """An unsupported code width is replaced by the widest supported one."""

    def admit(self, problem: LayerProblem) -> CodebookSpec:
        """See HonestSweep."""
        return super().admit(replace(problem, spec=replace(problem.spec, bits=min(problem.spec.bits, 4))))


@killed_by("groups_are_refused")
@dataclass(frozen=True, kw_only=True)
class IgnoredGroups(HonestSweep):
    """An unsupported group size is ignored."""

    def admit(self, problem: LayerProblem) -> CodebookSpec:
        """See HonestSweep."""
        return super().admit(replace(problem, spec=replace(problem.spec, group_size=None)))


@killed_by("groups_have_their_own_codebooks")
@dataclass(frozen=True, kw_only=True)
class RepeatedGrid(HonestRounding):
    """All groups of a row are given the grid of the whole row."""

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        scale, zero = super().grid(grouped.flatten(1)[:, None], spec)
        groups = grouped.shape[1]
        return scale.repeat(1, groups), zero.repeat(1, groups)


@killed_by("missing_statistics_are_refused")
@dataclass(frozen=True, kw_only=True)
class IdentityHessian(HonestSweep):
    """Without statistics the Hessian is taken to be the identity, and nobody is told."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        if problem.statistics is not None:
            return super().quantize(problem)
        return HonestRounding().quantize(problem)


@killed_by("undeclared_statistics_are_ignored")
@dataclass(frozen=True, kw_only=True)
class SecretStatistics(HonestRounding):
    """Statistics are not asked for, but used where another method had them collected."""

    info: ClassVar[QuantizerInfo] = replace(HonestRounding.info, name="secret_statistics")

    def prepare(self, problem: LayerProblem) -> Tensor:
        """See HonestRounding."""
        weight = super().prepare(problem)
        if problem.statistics is None:
            return weight
        loudness = problem.statistics.hessian.diagonal()
        return torch.where(loudness > loudness.median(), weight, 0.9 * weight)
