"""Solve the layers that share one input: stack their rows, call the method, verify and measure the answer.

Rows of a row-independent method are separate problems, so that the rows of layers with the same Hessian and the same
options are stacked and solved as one: the factorisation is done once and the products are larger. Rows with Hessians
of their own (`saliency_groups`) are solved apart.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, LayerQuantizer, QuantizedLayer, Statistic
from quantlab.engine.linears import bias_of, weight_of
from quantlab.engine.measure import LayerResult, measure_layer
from quantlab.engine.moments import Moments
from quantlab.engine.rows import join_rows, split_rows
from quantlab.engine.statistics import GroupStatistics, row_groups
from quantlab.engine.target import targets_of
from quantlab.engine.verify import verify_answer
from quantlab.errors import NumericalError, QualityError
from quantlab.runtime import LutLinear


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """How a layer is to be quantized.

    Attributes:
        quantizer: the method.
        spec: the storage budget.
        seed: the run's seed; each problem derives its own from it and its name.
        allow_fallbacks: whether the method may depart from its options where a layer forces it to.
    """

    quantizer: LayerQuantizer
    spec: CodebookSpec
    seed: int = 0
    allow_fallbacks: bool = False


Solved = dict[str, tuple[LutLinear, LayerResult]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Rows of one layer that belong together: one row group of it, or a piece of one."""

    layer: str
    rows: slice
    whole: bool
    moments: Moments

    @property
    def name(self) -> str:
        return self.layer if self.whole else f"{self.layer}[{self.rows.start}:{self.rows.stop}]"

    @property
    def size(self) -> int:
        return int(self.rows.stop - self.rows.start)


def solve_layers(
    linears: Mapping[str, nn.Module],
    statistics: GroupStatistics,
    options: Mapping[str, SolveOptions],
    max_rows: int | None = None,
) -> Solved:
    """Quantize layers that share one input.

    Args:
        linears: layers by their full name in the model.
        statistics: of the shared input.
        options: by layer; layers whose options differ are solved apart.
        max_rows: most rows that a row-independent method is given at once, to bound its memory; None for all.

    Returns:
        By name, the module that takes the layer's place and what is reported about it.

    Raises:
        PluginError: the method broke its contract.
        QualityError: the method departed from its options, and may not; or it has no statistics to go by.
        NumericalError: the layers cannot be solved: values that are not finite, or a singular system.
    """
    weights = {name: weight_of(linear).detach() for name, linear in linears.items()}
    targets = targets_of(weights, statistics)
    answers: dict[str, dict[int, QuantizedLayer]] = {name: {} for name in linears}  # by layer and first row
    for stack in _stacks(weights, statistics, options, max_rows):
        answer = _solve_stack(stack, targets, statistics, options[stack[0].layer])
        for part, piece in zip(stack, split_rows(answer, [part.size for part in stack]), strict=True):
            answers[part.layer][part.rows.start] = replace(piece, diagnostics=answer.diagnostics)
    solved: Solved = {}
    for name, linear in linears.items():
        pieces = [piece for _, piece in sorted(answers[name].items(), key=lambda item: item[0])]
        spec = options[name].spec
        module = LutLinear.from_layer(join_rows(pieces), spec, bias_of(linear))
        diagnostics = [piece.diagnostics for piece in pieces]
        result = measure_layer(name, weights[name], targets[name], module, spec, statistics, diagnostics)
        solved[name] = (module, result)
    return solved


def _stacks(
    weights: Mapping[str, Tensor],
    statistics: GroupStatistics,
    options: Mapping[str, SolveOptions],
    max_rows: int | None,
) -> list[list[_Part]]:
    """The rows of all layers, arranged in problems."""
    stacks: list[list[_Part]] = []
    for layer, weight in weights.items():
        independent = options[layer].quantizer.info.row_independent
        for part in _parts(layer, len(weight), statistics.moments[layer], max_rows if independent else None):
            for stack in reversed(stacks):  # from the last, so that pieces of one layer stay in order
                fits = max_rows is None or sum(other.size for other in stack) + part.size <= max_rows
                same = stack[0].moments is part.moments and options[stack[0].layer] == options[layer]
                if independent and fits and same:
                    stack.append(part)
                    break
            else:
                stacks.append([part])
    return stacks


def _parts(layer: str, out_features: int, moments: tuple[Moments, ...], max_rows: int | None) -> list[_Part]:
    parts = []
    for group, own in zip(row_groups(out_features, len(moments)), moments, strict=True):
        for start in range(group.start, group.stop, max_rows or out_features):
            rows = slice(start, min(group.stop, start + (max_rows or out_features)))
            whole = rows.stop - rows.start == out_features
            parts.append(_Part(layer=layer, rows=rows, whole=whole, moments=own))
    return parts


def _solve_stack(
    stack: list[_Part], targets: Mapping[str, Tensor], statistics: GroupStatistics, options: SolveOptions
) -> QuantizedLayer:
    quantizer, name = options.quantizer, " + ".join(part.name for part in stack)
    uninformed = statistics.num_tokens == 0 and bool(quantizer.info.needs)
    if uninformed and not options.allow_fallbacks:
        raise QualityError(
            f"{name}: no calibration token reached this layer, so that {quantizer.info.name} has nothing to go by; "
            "calibrate on more text, or accept it with allow_fallbacks: true"
        )
    problem_statistics = _statistics_for(stack, statistics, quantizer) if quantizer.info.needs else None
    try:
        problem = LayerProblem(
            name=name,
            weight=_gather(stack, targets).float(),
            spec=options.spec,
            statistics=problem_statistics,
            seed=_derive_seed(options.seed, name),
        )
        answer = quantizer.quantize(problem)
    except ValueError as error:  # values that are not finite, or a request that the method refuses
        raise NumericalError(f"{quantizer.info.name} cannot quantize {error}") from error
    except NumericalError as error:
        raise NumericalError(f"{quantizer.info.name} cannot quantize {name}: {error}") from error
    verify_answer(problem, answer, stack[0].moments.hessian)
    if answer.diagnostics.get("fallbacks", 0) > 0 and not options.allow_fallbacks:
        reported = ", ".join(f"{key}={value:g}" for key, value in answer.diagnostics.items())
        raise QualityError(
            f"{name}: {quantizer.info.name} could not keep to its options on this layer ({reported}); change "
            "the options, calibrate on more text, or accept it with allow_fallbacks: true"
        )
    if uninformed:
        fallbacks = answer.diagnostics.get("fallbacks", 0) + 1
        answer = replace(answer, diagnostics={**answer.diagnostics, "fallbacks": fallbacks})
    return answer


def _statistics_for(stack: list[_Part], statistics: GroupStatistics, quantizer: LayerQuantizer) -> InputStatistics:
    wanted = Statistic.FISHER in quantizer.info.needs
    return InputStatistics(
        hessian=stack[0].moments.hessian,
        num_tokens=statistics.num_tokens,
        fisher=_gather(stack, statistics.fisher) if wanted else None,
    )


def _gather(stack: list[_Part], matrices: Mapping[str, Tensor]) -> Tensor:
    """The rows of a stack: (rows, in_features)."""
    return torch.cat([matrices[part.layer][part.rows] for part in stack])


def _derive_seed(seed: int, name: str) -> int:
    """A seed that depends on nothing but the run's seed and the layer, so order and resuming do not matter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch generators take 63 bits
