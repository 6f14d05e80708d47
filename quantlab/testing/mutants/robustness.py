"""Defects that show on layers which are unusual, but real."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.api import CodebookSpec
from quantlab.testing.mutants.honest import HonestFisher, HonestRounding, HonestSweep, factorize
from quantlab.testing.mutants.planting import killed_by


@killed_by("dead_inputs_do_no_harm", "layers_without_input_are_solved", "inputs_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class DividesByDeadInputs(HonestSweep):
    """Columns are scaled by the root mean square of their input, which may be zero."""

    def factor(self, hessian: Tensor) -> Tensor:
        """See HonestSweep."""
        rms = hessian.diagonal().sqrt()
        return super().factor(hessian / rms / rms[:, None]) / rms


@killed_by("layers_without_input_are_solved")
@dataclass(frozen=True, kw_only=True)
class DampingOfNothing(HonestSweep):
    """Damping relative to a mean diagonal of zero leaves a zero matrix."""

    def factor(self, hessian: Tensor) -> Tensor:
        """See HonestSweep."""
        return factorize(hessian + torch.diag((self.damping * hessian.diagonal().mean()).expand(len(hessian))))


@killed_by("singular_hessians_are_solved", damping=0.0)
@dataclass(frozen=True, kw_only=True)
class NoDamping(HonestSweep):
    """Nothing is added to the diagonal, so a singular Hessian cannot be factorised."""


@killed_by("constant_rows_are_reproduced")
@dataclass(frozen=True, kw_only=True)
class UnguardedRange(HonestRounding):
    """The range of a constant row divides by zero."""

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        scale = self.range_fraction * (high - low) / self.top_code(spec)
        return scale, (-self.range_fraction * low / scale).round()


@killed_by("rows_of_few_values_are_solved", "constant_rows_are_reproduced", "small_layers_are_accepted")
@dataclass(frozen=True, kw_only=True)
class DividesByLevelDistance(HonestSweep):
    """The nearest level is found by dividing by the distance between levels, which may be equal."""

    def fit(self, weight: Tensor, count: int) -> Tensor:
        """See HonestSweep."""
        levels = super().fit(weight, count).sort(dim=1).values
        distance = levels.diff(dim=1)
        return levels + 0 * torch.cat([distance, distance[:, :1]], dim=1).reciprocal()


@killed_by("weights_without_fisher_information_are_solved")
@dataclass(frozen=True, kw_only=True)
class CentresOnNoInformation(HonestFisher):
    """Rows are centred on their weighted mean, whose weights may all be zero."""

    def fit(self, weight: Tensor, importance: Tensor, count: int) -> Tensor:
        """See HonestFisher."""
        centre = (importance * weight).sum(dim=1, keepdim=True) / importance.sum(dim=1, keepdim=True)
        return super().fit(weight - centre, importance, count) + centre
