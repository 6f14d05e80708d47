"""Solve the layers that share one input: stack their rows, call the method, verify and measure the answer.

Layers with the same input share their Hessian, and the rows of a row-independent method are separate problems,
so their weights are stacked and solved as one: the factorisation is done once and the products are larger.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.api import (
    Codebook,
    CodebookSpec,
    InputStatistics,
    LayerProblem,
    LayerQuantizer,
    Lut,
    Outliers,
    QuantizedLayer,
    layer_loss,
)
from quantlab.engine.linears import bias_of, weight_of
from quantlab.errors import NumericalError, PluginError, QualityError
from quantlab.runtime import LutLinear
from quantlab.solvers.grid import round_to_nearest

REPORTED_LOSS_TOLERANCE = 1e-3  # relative; methods accumulate in float32, the engine in float64


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What is reported about one quantized layer.

    Attributes:
        name: the layer's name in the model.
        shape: (out_features, in_features).
        bits: code width.
        group_size: inputs per codebook, or None for one codebook per row.
        storage_bits: everything stored in place of the weight: codes, codebook or scales, outliers.
        num_tokens: calibration tokens behind the Hessian.
        relative_loss: tr(E H Eᵀ) / tr(W H Wᵀ) after rounding to storage precision.
        rtn_relative_loss: the same for round-to-nearest with the same budget.
        diagnostics: what the method reported for the stack of layers that were solved together.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    storage_bits: int
    num_tokens: int
    relative_loss: float
    rtn_relative_loss: float
    diagnostics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """What is the same for every layer of a run.

    Attributes:
        quantizer: the method.
        spec: the storage budget of every layer.
        seed: the run's seed; each problem derives its own from it and its name.
        allow_fallbacks: whether the method may depart from its options where a layer forces it to.
    """

    quantizer: LayerQuantizer
    spec: CodebookSpec
    seed: int = 0
    allow_fallbacks: bool = False


Solved = dict[str, tuple[LutLinear, LayerResult]]


def solve_layers(linears: Mapping[str, nn.Module], statistics: InputStatistics, options: SolveOptions) -> Solved:
    """Quantize layers that share one input.

    Args:
        linears: layers by their full name in the model.
        statistics: of the shared input.
        options: the method and its budget.

    Returns:
        By name, the module that takes the layer's place and what is reported about it.

    Raises:
        PluginError: the method broke its contract.
        QualityError: the method departed from its options, and may not.
        NumericalError: the layers cannot be solved: values that are not finite, or a singular system.
    """
    if options.quantizer.info.row_independent:
        return _solve_stack(linears, statistics, options)
    return {
        name: solved
        for layer, linear in linears.items()
        for name, solved in _solve_stack({layer: linear}, statistics, options).items()
    }


def _solve_stack(linears: Mapping[str, nn.Module], statistics: InputStatistics, options: SolveOptions) -> Solved:
    quantizer, spec = options.quantizer, options.spec
    weights = {name: weight_of(linear).detach() for name, linear in linears.items()}
    stack_name = " + ".join(weights)
    try:
        problem = LayerProblem(
            name=stack_name,
            weight=torch.cat(list(weights.values())).float(),
            spec=spec,
            statistics=statistics if quantizer.info.needs else None,
            seed=_derive_seed(options.seed, stack_name),
        )
        answer = quantizer.quantize(problem)
    except ValueError as error:  # values that are not finite, or a request that the method refuses
        raise NumericalError(f"{quantizer.info.name} cannot quantize {error}") from error
    except NumericalError as error:
        raise NumericalError(f"{quantizer.info.name} cannot quantize {stack_name}: {error}") from error
    verify_answer(problem, answer, statistics.hessian)
    if answer.diagnostics.get("fallbacks", 0) > 0 and not options.allow_fallbacks:
        reported = ", ".join(f"{key}={value:g}" for key, value in answer.diagnostics.items())
        raise QualityError(
            f"{stack_name}: {quantizer.info.name} could not keep to its options on this layer ({reported}); change "
            "the options, calibrate on more text, or accept it with allow_fallbacks: true"
        )

    solved = {}
    parts = split_rows(answer, [weight.shape[0] for weight in weights.values()])
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        module = LutLinear.from_layer(part, spec, bias_of(linears[name]))
        solved[name] = (module, _measure(name, weight, module, spec, statistics, answer.diagnostics))
    return solved


def _measure(
    name: str,
    weight: Tensor,
    module: LutLinear,
    spec: CodebookSpec,
    statistics: InputStatistics,
    diagnostics: Mapping[str, float],
) -> LayerResult:
    hessian = statistics.hessian.double()  # once, since every loss is computed in float64
    scale = layer_loss(weight, torch.zeros_like(weight), hessian).sum().item() or 1.0
    baseline = round_to_nearest(weight.float(), spec).dequantize()
    return LayerResult(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        bits=spec.bits,
        group_size=spec.group_size,
        storage_bits=module.storage_bits,
        num_tokens=statistics.num_tokens,
        relative_loss=layer_loss(weight, module.dequantize(), hessian).sum().item() / scale,
        rtn_relative_loss=layer_loss(weight, baseline, hessian).sum().item() / scale,
        diagnostics=diagnostics,
    )


def verify_answer(problem: LayerProblem, answer: QuantizedLayer, hessian: Tensor) -> None:
    """Check an answer against the contract.

    Raises:
        PluginError: wrong shapes, dtypes or code range, values that are not finite, or a wrong reported loss.
    """

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise PluginError(f"{problem.name}: the method broke the LayerQuantizer contract: {what}")

    spec = problem.spec
    groups = 1 if spec.group_size is None else problem.in_features // spec.group_size
    shape = (problem.out_features, problem.in_features)
    require(
        answer.codes.dtype == torch.uint8 and tuple(answer.codes.shape) == shape,
        f"codes are {answer.codes.dtype} {tuple(answer.codes.shape)}, expected uint8 {shape}",
    )
    require(int(answer.codes.max()) < spec.levels, f"code {int(answer.codes.max())} is not below {spec.levels}")
    levels = answer.codebook.levels()
    expected = (problem.out_features, groups, spec.levels)
    require(tuple(levels.shape) == expected, f"the codebook has shape {tuple(levels.shape)}, expected {expected}")
    require(bool(torch.isfinite(levels).all()), "the codebook contains NaN or infinity")
    if answer.outliers is not None:
        require(bool(torch.isfinite(answer.outliers.values).all()), "outliers contain NaN or infinity")
    require(all(map(math.isfinite, answer.diagnostics.values())), "diagnostics contain NaN or infinity")
    if "loss" in answer.diagnostics:
        reported = answer.diagnostics["loss"]
        actual = layer_loss(problem.weight, answer.dequantize(), hessian).sum().item()
        # The floor allows for float32 round-off where the loss is next to nothing.
        floor = 1e-10 * layer_loss(problem.weight, torch.zeros_like(problem.weight), hessian).sum().item()
        require(
            abs(reported - actual) <= REPORTED_LOSS_TOLERANCE * actual + floor,
            f"it reports a loss of {reported:.6g}, but the loss is {actual:.6g}",
        )


def split_rows(layer: QuantizedLayer, sizes: list[int]) -> list[QuantizedLayer]:
    """Cut a stack of layers into its layers, `sizes` rows each; diagnostics stay with the stack."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(
            QuantizedLayer(
                codes=layer.codes[rows],
                codebook=_codebook_rows(layer.codebook, rows),
                outliers=None if layer.outliers is None else _outlier_rows(layer.outliers, rows),
            )
        )
        start += size
    return parts


def _codebook_rows(codebook: Codebook, rows: slice) -> Codebook:
    if isinstance(codebook, Lut):
        return Lut(values=codebook.values[rows])
    return type(codebook)(scale=codebook.scale[rows], zero=codebook.zero[rows], bits=codebook.bits)


def _outlier_rows(outliers: Outliers, rows: slice) -> Outliers:
    inside = (outliers.rows >= rows.start) & (outliers.rows < rows.stop)
    return Outliers(
        rows=outliers.rows[inside] - rows.start, columns=outliers.columns[inside], values=outliers.values[inside]
    )


def _derive_seed(seed: int, name: str) -> int:
    """A seed that depends on nothing but the run's seed and the layer, so order and resuming do not matter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch generators take 63 bits
