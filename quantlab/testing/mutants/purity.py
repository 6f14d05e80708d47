"""Defects outside the answer: side effects, and dependence on anything but the problem."""

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, QuantizedLayer, UniformGrid
from quantlab.testing.mutants.honest import HonestPreparation, HonestRounding, HonestSweep
from quantlab.testing.mutants.planting import killed_by


@killed_by("inputs_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class WritesPivots(HonestSweep):
    """Dead inputs get their pivot in the Hessian that other layers share."""

    def hessian(self, problem: LayerProblem) -> Tensor:
        """See HonestSweep."""
        diagonal = problem.require_hessian().diagonal()
        diagonal[diagonal == 0] = diagonal.mean()
        return super().hessian(problem)


@killed_by("instances_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class RemembersScale(HonestRounding):
    """The last scale is kept on the instance."""

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        scale, zero = super().grid(grouped, spec)
        object.__setattr__(self, "last_scale", scale)
        return scale, zero


@killed_by("global_random_states_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class SeedsGlobally(HonestRounding):
    """The problem's seed goes to the global generator."""

    def prepare(self, problem: LayerProblem) -> Tensor:
        """See HonestRounding."""
        torch.manual_seed(problem.seed)
        return super().prepare(problem)


@killed_by("torch_settings_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class EnablesTf32(HonestSweep):
    """TF32 is switched on for a faster product, and stays on."""

    def sweep(self, weight: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
        """See HonestSweep."""
        torch.set_float32_matmul_precision("high")
        return super().sweep(weight, levels, factor)


@killed_by("torch_settings_are_left_alone")
@dataclass(frozen=True, kw_only=True)
class EnablesGradients(HonestRounding):
    """Gradients are switched on for an optimisation, and stay on."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        torch.set_grad_enabled(True)
        return super().quantize(problem)


@killed_by("answers_are_reproducible", "answers_do_not_depend_on_history")
@dataclass(frozen=True, kw_only=True)
class UnseededNoise(HonestRounding):
    """A generator of its own is seeded by the clock."""

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer. Codes stay, since one that tips over would be seen by more checks now and then."""
        generator = torch.Generator()
        generator.seed()
        layer = super().quantize(problem)
        codebook = cast(UniformGrid, layer.codebook)
        noise = 1 + 1e-5 * float(torch.rand((), generator=generator))
        return replace(layer, codebook=replace(codebook, scale=codebook.scale * noise))


@killed_by("prepared_statistics_do_not_change_answers")
@dataclass(frozen=True, kw_only=True)
class PreparesInHalfPrecision(HonestPreparation):
    """What is prepared is rounded on its way, to send less of it."""

    def prepare_statistics(self, statistics: InputStatistics, dtype: torch.dtype) -> Tensor:
        """See StatisticsPreparer."""
        return super().prepare_statistics(statistics, dtype).bfloat16().double()

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        if problem.prepared is None:
            return HonestPreparation().quantize(problem)
        return super().quantize(problem)


@killed_by("answers_do_not_depend_on_history")
@dataclass(frozen=True, kw_only=True)
class StaleScratch(HonestRounding):
    """A scratch buffer is as wide as the preceding layer, and what is left in it leaks into the grid."""

    preceding_width: ClassVar[list[int]] = [0]

    def grid(self, grouped: Tensor, spec: CodebookSpec) -> tuple[Tensor, Tensor]:
        """See HonestRounding."""
        scale, zero = super().grid(grouped, spec)
        leaked = 1e-7 * self.preceding_width[0]
        self.preceding_width[0] = grouped.shape[1] * grouped.shape[2]
        return scale * (1 + leaked), zero
