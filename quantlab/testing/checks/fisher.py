"""Promises of methods that read the diagonal of the Fisher information."""

import torch
from torch import Tensor

from quantlab.api import LayerProblem, LayerQuantizer, Statistic
from quantlab.testing.check import contract_check, needs, require
from quantlab.testing.judging import require_agreement, solve
from quantlab.testing.problems import make_problem, with_statistics


@contract_check(applies_to=needs(Statistic.FISHER))
def fisher_is_put_to_use(quantizer: LayerQuantizer, device: str) -> None:
    """Averaged over layers, the error weighted by the Fisher diagonal is smaller than if that had been constant."""
    informed = uninformed = 0.0
    for seed in range(5):
        problem = make_problem(quantizer.info, device, seed=seed)
        blind = with_statistics(problem, fisher=torch.ones_like(problem.require_fisher()))
        informed += _weighted_error(problem, solve(quantizer, problem).dequantize())
        uninformed += _weighted_error(problem, solve(quantizer, blind).dequantize())
    require(
        informed < uninformed,
        f"weighted errors add up to {informed:.4g} with the Fisher diagonal, {uninformed:.4g} without",
    )


@contract_check(applies_to=needs(Statistic.FISHER))
def fisher_scale_does_not_matter(quantizer: LayerQuantizer, device: str) -> None:
    """A Fisher diagonal scaled by 2**-40 or 2**20 has the same answer: no absolute epsilon takes part."""
    problem = make_problem(quantizer.info, device)
    expected = solve(quantizer, problem).dequantize()
    for factor in (2.0**-40, 2.0**20):
        scaled = solve(quantizer, with_statistics(problem, fisher=factor * problem.require_fisher()))
        require_agreement(scaled.dequantize(), expected, f"scaling the Fisher diagonal by {factor} must not matter")


def _weighted_error(problem: LayerProblem, weight_hat: Tensor) -> float:
    fisher = problem.require_fisher()
    error = (fisher * (problem.weight - weight_hat).square()).sum()
    return float(error / (fisher * problem.weight.square()).sum())
