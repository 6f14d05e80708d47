"""Small layers with the traits of real ones.

Rows differ in scale by more than an order of magnitude, weights have heavy tails, inputs are correlated, and a few
input channels are much louder than the rest.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, QuantizerInfo, Statistic

OUT_FEATURES, IN_FEATURES, NUM_TOKENS = 12, 32, 256
GROUP_SIZE = 16
FIRST_SEED = 1 << 62
"""Problem seeds are as wide as the engine's, 63 bits."""


def draw_weight(seed: int, out_features: int = OUT_FEATURES, in_features: int = IN_FEATURES) -> Tensor:
    """A weight with rows of different scales and heavy tails: (out_features, in_features) float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(out_features, in_features, generator=generator)
    row_scale: Tensor = torch.logspace(-1, 0.5, out_features)[torch.randperm(out_features, generator=generator)]
    return 0.02 * row_scale[:, None] * normal * (0.5 + 0.5 * normal.abs())


def draw_hessian(seed: int, in_features: int = IN_FEATURES, num_tokens: int = NUM_TOKENS) -> Tensor:
    """The Hessian of correlated inputs with loud channels: (in_features, in_features) float32.

    With fewer tokens than features it is singular.
    """
    generator = torch.Generator().manual_seed(seed)
    independent = torch.randn(num_tokens, in_features, generator=generator)
    shared = torch.randn(num_tokens, 1, generator=generator) * torch.randn(in_features, generator=generator)
    inputs = independent.cumsum(dim=1) / math.sqrt(in_features) + 0.3 * independent + shared
    inputs[:, torch.randperm(in_features, generator=generator)[: max(1, in_features // 16)]] *= 8
    return inputs.T @ inputs / num_tokens


def draw_fisher(seed: int, hessian: Tensor, out_features: int = OUT_FEATURES) -> Tensor:
    """A Fisher diagonal that is larger for loud inputs and varies widely: (out_features, in_features) float32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out_features, len(hessian), generator=generator)
    return hessian.diagonal() * (0.1 + noise.square())


def make_problem(
    info: QuantizerInfo,
    device: str,
    *,
    seed: int = 0,
    bits: int | None = None,
    group_size: int | None = None,
    weight: Tensor | None = None,
    hessian: Tensor | None = None,
    fisher: Tensor | None = None,
) -> LayerProblem:
    """A problem such as the engine would pose to a method of these capabilities.

    Args:
        info: decides which statistics the problem carries; the Hessian always comes with them.
        device: where its tensors are.
        seed: what weight, Hessian and Fisher diagonal are drawn from, unless they are given; tells problems apart.
        bits: code width; by default the smallest that the method supports.
        group_size: as in CodebookSpec.
        weight: (out_features, in_features).
        hessian: (in_features, in_features).
        fisher: (out_features, in_features).
    """
    weight = draw_weight(seed) if weight is None else weight
    hessian = draw_hessian(seed, weight.shape[1]) if hessian is None else hessian
    if Statistic.FISHER in info.needs:
        fisher = draw_fisher(seed, hessian, len(weight)) if fisher is None else fisher
        fisher = fisher.to(device)
    statistics = InputStatistics(hessian=hessian.to(device), num_tokens=NUM_TOKENS, fisher=fisher)
    return LayerProblem(
        name=f"layer{seed}",
        weight=weight.to(device),
        spec=CodebookSpec(bits=min(info.bits) if bits is None else bits, group_size=group_size),
        statistics=statistics if info.needs else None,
        seed=FIRST_SEED + seed,
    )


def with_rows(problem: LayerProblem, rows: slice | Tensor) -> LayerProblem:
    """The problem of some rows, or of the rows in another order."""
    statistics = problem.statistics
    if statistics is not None and statistics.fisher is not None:
        statistics = replace(statistics, fisher=statistics.fisher[rows])
    return replace(problem, weight=problem.weight[rows], statistics=statistics)


def with_statistics(
    problem: LayerProblem, *, hessian: Tensor | None = None, fisher: Tensor | None = None
) -> LayerProblem:
    """The problem with another Hessian or Fisher diagonal; one without statistics stays without."""
    statistics = problem.statistics
    if statistics is None:
        return problem
    hessian = statistics.hessian if hessian is None else hessian
    fisher = statistics.fisher if fisher is None else fisher
    return replace(problem, statistics=replace(statistics, hessian=hessian, fisher=fisher))
