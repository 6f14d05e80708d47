"""Promises about the arithmetic: quality, and what must not matter."""

from dataclasses import replace
from itertools import pairwise

import torch

from quantlab.api import LayerQuantizer, Statistic, layer_loss
from quantlab.testing.check import contract_check, needs, require, skip
from quantlab.testing.judging import relative_loss, require_agreement, require_quality, solve
from quantlab.testing.problems import (
    IN_FEATURES,
    OUT_FEATURES,
    draw_weight,
    make_problem,
    with_rows,
    with_statistics,
)
from quantlab.testing.settings import reference_kernels

PATH_TOLERANCE = 0.05
"""Relative; sums in another order flip single codes, after which an alternating method may settle elsewhere."""
LOSS_TOLERANCE = 1e-3
"""Relative; methods accumulate their loss in float32."""
NEGLIGIBLE = 1e-6
"""A relative loss below which there is nothing left to gain; 8 bits per weight have about 1e-5."""
LOSS_FLOOR = 1e-10
"""Of the loss of a zero weight; below it a loss is round-off."""


@contract_check()
def weights_on_a_grid_are_reproduced(quantizer: LayerQuantizer, device: str) -> None:
    """A row that takes 2**bits equally spaced values, each equally often, is reproduced: every level is usable."""
    bits = min(quantizer.info.bits)
    levels = torch.arange(2**bits).repeat_interleave(8) - 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(0)
    rows = [levels[torch.randperm(len(levels), generator=generator)] for _ in range(OUT_FEATURES)]
    spacing = torch.logspace(-3, -1, OUT_FEATURES)[:, None]
    problem = make_problem(quantizer.info, device, bits=bits, weight=torch.stack(rows) * spacing)
    answer = solve(quantizer, problem).dequantize()
    require_agreement(answer, problem.weight, "weights on a grid must be reproduced")


@contract_check()
def loss_does_not_exceed_that_of_rounding(quantizer: LayerQuantizer, device: str) -> None:
    """Averaged over layers, the loss is not above that of rounding to nearest with the same budget."""
    problems = [make_problem(quantizer.info, device, seed=seed) for seed in range(5)]
    require_quality(quantizer, problems, "five layers")


@contract_check(applies_to=needs(Statistic.HESSIAN))
def hessian_is_put_to_use(quantizer: LayerQuantizer, device: str) -> None:
    """Averaged over layers, the layer loss is smaller with the true Hessian than with the identity in its place."""
    problems = [make_problem(quantizer.info, device, seed=seed) for seed in range(5)]
    informed = [relative_loss(problem, solve(quantizer, problem).dequantize()) for problem in problems]
    blind = [with_statistics(problem, hessian=torch.eye(IN_FEATURES, device=device)) for problem in problems]
    uninformed = [
        relative_loss(problem, solve(quantizer, other).dequantize())
        for problem, other in zip(problems, blind, strict=True)
    ]
    require(sum(informed) < sum(uninformed), f"relative losses {informed} with the Hessian, {uninformed} without")


@contract_check(applies_to=lambda info: len(info.bits) > 1)
def wider_codes_lose_less(quantizer: LayerQuantizer, device: str) -> None:
    """Each wider declared code width has a smaller loss, down to next to nothing: all of its levels are used."""
    widths = sorted(quantizer.info.bits)
    weight = draw_weight(0, 4, 128)
    problems = [make_problem(quantizer.info, device, bits=bits, weight=weight) for bits in widths]
    losses = [relative_loss(problem, solve(quantizer, problem).dequantize()) for problem in problems]
    listing = ", ".join(f"{bits} bits {loss:.3g}" for bits, loss in zip(widths, losses, strict=True))
    require(all(wide < max(narrow, NEGLIGIBLE) for narrow, wide in pairwise(losses)), f"losses: {listing}")


@contract_check()
def row_order_does_not_matter(quantizer: LayerQuantizer, device: str) -> None:
    """Permuted rows have the permuted answer."""
    problem = make_problem(quantizer.info, device)
    order = torch.randperm(problem.out_features, generator=torch.Generator().manual_seed(0)).to(device)
    answer = solve(quantizer, with_rows(problem, order))
    require_agreement(answer.dequantize(), solve(quantizer, problem).dequantize()[order], "row order must not matter")


@contract_check(applies_to=lambda info: info.row_independent)
def rows_are_solved_independently(quantizer: LayerQuantizer, device: str) -> None:
    """A part of the rows, solved by itself, has its part of the answer; the engine stacks and splits layers."""
    problem = make_problem(quantizer.info, device)
    whole = solve(quantizer, problem).dequantize()
    for rows in (slice(0, 5), slice(5, None)):
        part = solve(quantizer, with_rows(problem, rows))
        require_agreement(part.dequantize(), whole[rows], "rows must be solved independently, as info declares")


@contract_check()
def weight_scale_does_not_matter(quantizer: LayerQuantizer, device: str) -> None:
    """A weight scaled by 2**-12 or 2**12 has the scaled answer: no absolute epsilon takes part."""
    problem = make_problem(quantizer.info, device)
    expected = solve(quantizer, problem).dequantize()
    for factor in (2.0**-12, 2.0**12):
        scaled = solve(quantizer, replace(problem, weight=problem.weight * factor))
        require_agreement(
            scaled.dequantize() / factor, expected, f"scaling the weight by {factor} must scale the answer"
        )


@contract_check(applies_to=needs(Statistic.HESSIAN))
def hessian_scale_does_not_matter(quantizer: LayerQuantizer, device: str) -> None:
    """A Hessian scaled by 2**-20 or 2**20 has the same answer: damping is relative, sums and means are alike."""
    problem = make_problem(quantizer.info, device)
    expected = solve(quantizer, problem).dequantize()
    for factor in (2.0**-20, 2.0**20):
        scaled = solve(quantizer, with_statistics(problem, hessian=factor * problem.require_hessian()))
        require_agreement(scaled.dequantize(), expected, f"scaling the Hessian by {factor} must not matter")


@contract_check()
def code_paths_agree(quantizer: LayerQuantizer, device: str) -> None:
    """Averaged over layers, the loss with native kernels is that with their PyTorch reference, up to rounding."""
    problems = [make_problem(quantizer.info, device, seed=seed) for seed in range(5)]
    usual = sum(relative_loss(problem, solve(quantizer, problem).dequantize()) for problem in problems)
    with reference_kernels():
        reference = sum(relative_loss(problem, solve(quantizer, problem).dequantize()) for problem in problems)
    require(
        abs(usual - reference) <= PATH_TOLERANCE * reference,
        f"mean relative loss is {usual / 5:.4g}, with QUANTLAB_KERNELS=reference it is {reference / 5:.4g}",
    )


@contract_check(applies_to=needs(Statistic.HESSIAN))
def reported_loss_is_true(quantizer: LayerQuantizer, device: str) -> None:
    """A reported "loss" is the layer loss of the returned answer under the undamped Hessian, nothing less or else."""
    problem = make_problem(quantizer.info, device)
    layer = solve(quantizer, problem)
    if "loss" not in layer.diagnostics:
        skip("the method reports no loss")
    hessian = problem.require_hessian()
    actual = float(layer_loss(problem.weight, layer.dequantize(), hessian).sum())
    floor = LOSS_FLOOR * float(layer_loss(problem.weight, torch.zeros_like(problem.weight), hessian).sum())
    reported = layer.diagnostics["loss"]
    require(abs(reported - actual) <= LOSS_TOLERANCE * actual + floor, f"reported {reported:.6g}, actual {actual:.6g}")
