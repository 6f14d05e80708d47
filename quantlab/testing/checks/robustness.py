"""Promises about layers that break careless formulas: every one of them occurs in real models."""

import torch

from quantlab.api import LayerQuantizer, Lut, Statistic
from quantlab.testing.check import contract_check, needs
from quantlab.testing.judging import require_agreement, require_quality, require_sound, solve
from quantlab.testing.problems import IN_FEATURES, OUT_FEATURES, draw_fisher, draw_hessian, make_problem


@contract_check(applies_to=needs(Statistic.HESSIAN))
def dead_inputs_do_no_harm(quantizer: LayerQuantizer, device: str) -> None:
    """Inputs that are always zero leave the answer finite and no worse than rounding."""
    alive = (torch.arange(IN_FEATURES) % 4 != 1).float()
    hessians = [draw_hessian(seed) * alive * alive[:, None] for seed in range(5)]
    problems = [make_problem(quantizer.info, device, seed=seed, hessian=h) for seed, h in enumerate(hessians)]
    require_quality(quantizer, problems, "layers with dead inputs")


@contract_check(applies_to=needs(Statistic.HESSIAN))
def layers_without_input_are_solved(quantizer: LayerQuantizer, device: str) -> None:
    """A Hessian of zeros, as of an expert that no token reached, has a sound answer."""
    problem = make_problem(quantizer.info, device, hessian=torch.zeros(IN_FEATURES, IN_FEATURES))
    require_sound(solve(quantizer, problem), problem)


@contract_check(applies_to=needs(Statistic.HESSIAN))
def singular_hessians_are_solved(quantizer: LayerQuantizer, device: str) -> None:
    """Fewer tokens than inputs, or inputs that repeat others, leave the answer finite and no worse than rounding."""
    repeated = torch.arange(IN_FEATURES) // 2
    hessians = {
        "layers with fewer tokens than inputs": [draw_hessian(seed, num_tokens=IN_FEATURES // 4) for seed in range(5)],
        "layers with repeated inputs": [draw_hessian(seed)[repeated][:, repeated] for seed in range(5)],
    }
    for what, drawn in hessians.items():
        problems = [make_problem(quantizer.info, device, seed=seed, hessian=h) for seed, h in enumerate(drawn)]
        require_quality(quantizer, problems, what)


@contract_check()
def constant_rows_are_reproduced(quantizer: LayerQuantizer, device: str) -> None:
    """Rows of one value, zero included, are reproduced; the empty range divides nothing."""
    constants = torch.tensor([0.0, 0.02, -0.5, 1e-6])
    problem = make_problem(quantizer.info, device, weight=constants[:, None].repeat(1, IN_FEATURES))
    layer = solve(quantizer, problem)
    require_sound(layer, problem)
    require_agreement(layer.dequantize(), problem.weight, "constant rows must be reproduced")


@contract_check()
def rows_of_few_values_are_solved(quantizer: LayerQuantizer, device: str) -> None:
    """Rows with fewer distinct values than levels have a sound answer, which free codebooks reproduce."""
    generator = torch.Generator().manual_seed(0)
    for values in ((-0.3, 0.5), (0.0, 0.01), (-0.2, 0.0, 0.7)):
        chosen = torch.randint(len(values), (OUT_FEATURES, IN_FEATURES), generator=generator)
        problem = make_problem(quantizer.info, device, weight=torch.tensor(values)[chosen])
        layer = solve(quantizer, problem)
        require_sound(layer, problem)
        if isinstance(layer.codebook, Lut):
            require_agreement(layer.dequantize(), problem.weight, f"rows of the values {values} must be reproduced")


@contract_check(applies_to=needs(Statistic.FISHER))
def weights_without_fisher_information_are_solved(quantizer: LayerQuantizer, device: str) -> None:
    """Rows and inputs whose Fisher diagonal is zero, as behind outputs that nothing reads, have a sound answer."""
    fisher = draw_fisher(0, draw_hessian(0))
    fisher[::3] = 0
    fisher[:, 1::4] = 0
    for diagonal in (fisher, torch.zeros_like(fisher)):
        problem = make_problem(quantizer.info, device, fisher=diagonal)
        require_sound(solve(quantizer, problem), problem)
