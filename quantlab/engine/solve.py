"""Solve the layers that share one input: stack their rows, call the method, verify and measure the answer.

Rows of a row-independent method are separate problems, so that the rows of layers with the same Hessian and the same
options are stacked and solved as one: the factorisation is done once and the products are larger. Rows with Hessians
of their own (`saliency_groups`) are solved apart. Every stack is a unit of an executor, and so are the rows that are
measured together; what a method prepares from a Hessian is made once for all stacks that share it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.api import (
    CodebookSpec,
    InputStatistics,
    LayerProblem,
    LayerQuantizer,
    QuantizedLayer,
    Statistic,
    StatisticsPreparer,
)
from quantlab.engine.device import moved, solving_device
from quantlab.engine.linears import bias_of, weight_of
from quantlab.engine.measure import LayerResult, measure_layer
from quantlab.engine.moments import Moments
from quantlab.engine.rows import join_rows, split_rows
from quantlab.engine.statistics import GroupStatistics, row_groups
from quantlab.engine.target import targets_of
from quantlab.engine.verify import verify_answer
from quantlab.errors import NumericalError, QualityError
from quantlab.executors import Executor, LocalExecutor
from quantlab.finite import all_finite
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


@dataclass(frozen=True, kw_only=True, eq=False)
class StackProblem:
    """Rows to be solved as one; what belongs to their statistics comes apart.

    Attributes:
        name: of the problem.
        weight: (rows, in_features) float32, what is to be approximated.
        fisher: (rows, in_features) float32, or None.
        num_tokens: calibration tokens behind the statistics.
        options: how they are solved.
    """

    name: str
    weight: Tensor
    fisher: Tensor | None
    num_tokens: int
    options: SolveOptions


def solve_layers(
    linears: Mapping[str, nn.Module],
    statistics: GroupStatistics,
    options: Mapping[str, SolveOptions],
    max_rows: int | None = None,
) -> Solved:
    """Quantize layers that share one input, in this process; see `LayerSolver`."""
    return LayerSolver(linears, statistics, options, max_rows, LocalExecutor()).finish()


class LayerSolver:
    """Quantizes layers that share one input: begins on construction, as far as the executor does that.

    Args:
        linears: layers by their full name in the model.
        statistics: of the shared input.
        options: by layer; layers whose options differ are solved apart.
        max_rows: most rows that a row-independent method is given at once, to bound its memory; None for all.
        executor: where rows are solved and measured.

    Raises:
        NumericalError: an error-propagating target cannot be had.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        statistics: GroupStatistics,
        options: Mapping[str, SolveOptions],
        max_rows: int | None,
        executor: Executor,
    ) -> None:
        self._linears, self._statistics, self._options, self._executor = linears, statistics, options, executor
        self._weights = {name: weight_of(linear).detach() for name, linear in linears.items()}
        self._targets = targets_of(self._weights, statistics)
        self._hessians = {
            id(own): executor.put(own.hessian) for moments in statistics.moments.values() for own in set(moments)
        }
        stacks = _by_preparation(_stacks(self._weights, statistics, options, max_rows), options)
        self._stacks = [stack for together in stacks for stack in together]
        self._answers = executor.map(solve_stack, self._units(stacks))

    def finish(self) -> Solved:
        """The answers.

        Returns:
            By name, the module that takes the layer's place and what is reported about it.

        Raises:
            PluginError: the method broke its contract.
            QualityError: the method departed from its options, and may not; or it has no statistics to go by.
            NumericalError: the layers cannot be solved: values that are not finite, or a singular system.
        """
        answers: dict[str, dict[int, QuantizedLayer]] = {name: {} for name in self._linears}  # by layer and first row
        for stack, answer in zip(self._stacks, self._answers, strict=True):
            for part, piece in zip(stack, split_rows(answer, [part.size for part in stack]), strict=True):
                answers[part.layer][part.rows.start] = replace(piece, diagnostics=answer.diagnostics)
        solved: Solved = {}
        for name, linear in self._linears.items():
            pieces = [piece for _, piece in sorted(answers[name].items(), key=lambda item: item[0])]
            spec = self._options[name].spec
            module = LutLinear.from_layer(join_rows(pieces), spec, bias_of(linear))
            result = measure_layer(
                name,
                self._weights[name],
                self._targets[name],
                module,
                spec,
                self._statistics,
                [piece.diagnostics for piece in pieces],
                executor=self._executor,
                hessians=self._hessians,
            )
            solved[name] = (module, result)
        return solved

    def _units(self, stacks: list[list[list[_Part]]]) -> Iterator[tuple[Any, ...]]:
        executor, statistics, gpus = self._executor, self._statistics, self._executor.task.gpus
        for together in stacks:
            first = together[0][0]
            options, hessian = self._options[first.layer], self._hessians[id(first.moments)]
            prepared = None
            if isinstance(options.quantizer, StatisticsPreparer) and options.quantizer.info.needs:
                layers = " + ".join(dict.fromkeys(part.layer for stack in together for part in stack))
                what = f"{options.quantizer.info.name} cannot quantize {layers}"
                prepared = executor.call(prepare, options.quantizer, what, hessian, statistics.num_tokens, gpus)
            for stack in together:
                wanted = Statistic.FISHER in options.quantizer.info.needs
                problem = StackProblem(
                    name=" + ".join(part.name for part in stack),
                    weight=_gather(stack, self._targets).float(),
                    fisher=_gather(stack, statistics.fisher) if wanted else None,
                    num_tokens=statistics.num_tokens,
                    options=options,
                )
                yield problem, hessian, prepared, gpus


def prepare(quantizer: StatisticsPreparer, what: str, hessian: Tensor, num_tokens: int, gpus: float) -> object:
    """What a method makes of statistics for all problems that share them; this is a unit of an executor.

    Args:
        quantizer: the method.
        what: is said if it cannot be done.
        hessian: (in_features, in_features).
        num_tokens: behind the Hessian.
        gpus: CUDA devices to compute on, if more than 0.
    """
    if not all_finite(hessian):
        return None  # every problem with this Hessian is refused by its own name
    device = solving_device(gpus, hessian.device)
    statistics = InputStatistics(hessian=hessian.to(device), num_tokens=num_tokens)
    try:
        return moved(quantizer.prepare_statistics(statistics, torch.float32), hessian.device)
    except NumericalError as error:
        raise NumericalError(f"{what}: {error}") from error


def solve_stack(stack: StackProblem, hessian: Tensor, prepared: object, gpus: float) -> QuantizedLayer:
    """Have rows quantized, and check the answer; this is a unit of an executor.

    Args:
        stack: the rows.
        hessian: (in_features, in_features), of their inputs.
        prepared: what the method has prepared from it, or None.
        gpus: CUDA devices to compute on, if more than 0.

    Raises:
        PluginError: the method broke its contract.
        QualityError: the method departed from its options, and may not; or it has no statistics to go by.
        NumericalError: the rows cannot be solved.
    """
    options, name, device = stack.options, stack.name, solving_device(gpus, stack.weight.device)
    quantizer = options.quantizer
    uninformed = stack.num_tokens == 0 and bool(quantizer.info.needs)
    if uninformed and not options.allow_fallbacks:
        raise QualityError(
            f"{name}: no calibration token reached this layer, so that {quantizer.info.name} has nothing to go by; "
            "calibrate on more text, or accept it with allow_fallbacks: true"
        )
    statistics = InputStatistics(hessian=hessian, num_tokens=stack.num_tokens, fisher=stack.fisher)
    try:
        problem = LayerProblem(
            name=name,
            weight=stack.weight.to(device),
            spec=options.spec,
            statistics=moved(statistics, device) if quantizer.info.needs else None,
            prepared=moved(prepared, device),
            seed=_derive_seed(options.seed, name),
        )
        answer = quantizer.quantize(problem)
    except ValueError as error:  # values that are not finite, or a request that the method refuses
        raise NumericalError(f"{quantizer.info.name} cannot quantize {error}") from error
    except NumericalError as error:
        raise NumericalError(f"{quantizer.info.name} cannot quantize {name}: {error}") from error
    verify_answer(problem, answer, hessian.to(device))
    if answer.diagnostics.get("fallbacks", 0) > 0 and not options.allow_fallbacks:
        reported = ", ".join(f"{key}={value:g}" for key, value in answer.diagnostics.items())
        raise QualityError(
            f"{name}: {quantizer.info.name} could not keep to its options on this layer ({reported}); change "
            "the options, calibrate on more text, or accept it with allow_fallbacks: true"
        )
    if uninformed:
        fallbacks = answer.diagnostics.get("fallbacks", 0) + 1
        answer = replace(answer, diagnostics={**answer.diagnostics, "fallbacks": fallbacks})
    return moved(answer, stack.weight.device)


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


def _by_preparation(stacks: list[list[_Part]], options: Mapping[str, SolveOptions]) -> list[list[list[_Part]]]:
    """The stacks with the same moments and options side by side, so that one preparation at a time is held."""
    together: list[list[list[_Part]]] = []
    for stack in stacks:
        for others in together:
            first = others[0][0]
            if first.moments is stack[0].moments and options[first.layer] == options[stack[0].layer]:
                others.append(stack)
                break
        else:
            together.append([stack])
    return together


def _parts(layer: str, out_features: int, moments: tuple[Moments, ...], max_rows: int | None) -> list[_Part]:
    parts = []
    for group, own in zip(row_groups(out_features, len(moments)), moments, strict=True):
        for start in range(group.start, group.stop, max_rows or out_features):
            rows = slice(start, min(group.stop, start + (max_rows or out_features)))
            whole = rows.stop - rows.start == out_features
            parts.append(_Part(layer=layer, rows=rows, whole=whole, moments=own))
    return parts


def _gather(stack: list[_Part], matrices: Mapping[str, Tensor]) -> Tensor:
    """The rows of a stack: (rows, in_features)."""
    return torch.cat([matrices[part.layer][part.rows] for part in stack])


def _derive_seed(seed: int, name: str) -> int:
    """A seed that depends on nothing but the run's seed and the layer, so order and resuming do not matter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch generators take 63 bits
