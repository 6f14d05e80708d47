"""Defects of methods that read the diagonal of the Fisher information."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.api import LayerProblem, QuantizedLayer
from quantlab.testing.mutants.honest import HonestFisher, HonestSweep
from quantlab.testing.mutants.planting import killed_by


@killed_by("fisher_is_put_to_use")
@dataclass(frozen=True, kw_only=True)
class UnusedFisher(HonestFisher):
    """The Fisher diagonal is collected, checked, and then not used."""

    def importance(self, problem: LayerProblem) -> Tensor:
        """See HonestFisher."""
        return torch.ones_like(super().importance(problem))


@killed_by("fisher_scale_does_not_matter")
@dataclass(frozen=True, kw_only=True)
class AbsoluteFloor(HonestFisher):
    """An absolute constant keeps the importance away from zero."""

    def importance(self, problem: LayerProblem) -> Tensor:
        """See HonestFisher."""
        return super().importance(problem) + 1e-3


@killed_by("inputs_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class WritesFloor(HonestFisher):
    """Zeros of the Fisher diagonal are replaced in place."""

    def importance(self, problem: LayerProblem) -> Tensor:
        """See HonestFisher."""
        fisher = problem.require_fisher()
        fisher[fisher == 0] = fisher.mean()
        return super().importance(problem)


@killed_by("missing_statistics_are_refused")
@dataclass(frozen=True, kw_only=True)
class UniformFisher(HonestFisher):
    """Without a Fisher diagonal all weights are taken to be equally important, and nobody is told."""

    def importance(self, problem: LayerProblem) -> Tensor:
        """See HonestFisher."""
        if problem.statistics is None or problem.statistics.fisher is None:
            return torch.ones_like(problem.weight, dtype=torch.float64)
        return super().importance(problem)


@killed_by("undeclared_statistics_are_ignored")
@dataclass(frozen=True, kw_only=True)
class SecretFisher(HonestSweep):
    """The Fisher diagonal is not asked for, but used where another method had it collected."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        if problem.statistics is None or problem.statistics.fisher is None:
            return super().quantize(problem)
        return HonestFisher().quantize(replace(problem))
