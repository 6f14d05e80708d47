"""Check a method's answer against the contract before anything is built on it."""

import math

import torch
from torch import Tensor

from quantlab.api import LayerProblem, QuantizedLayer, layer_loss
from quantlab.errors import PluginError
from quantlab.finite import all_finite

REPORTED_LOSS_TOLERANCE = 1e-3  # relative; methods accumulate in float32, the engine in float64


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
    require(all_finite(levels), "the codebook contains NaN or infinity")
    if answer.outliers is not None:
        require(all_finite(answer.outliers.values), "outliers contain NaN or infinity")
    require(all(map(math.isfinite, answer.diagnostics.values())), "diagnostics contain NaN or infinity")
    if "loss" in answer.diagnostics:
        reported = answer.diagnostics["loss"]
        actual = layer_loss(problem.weight, answer.dequantize(), hessian).sum().item()
        if abs(reported - actual) > REPORTED_LOSS_TOLERANCE * actual:
            # The floor allows for float32 round-off where the loss is next to nothing.
            floor = 1e-10 * layer_loss(problem.weight, torch.zeros_like(problem.weight), hessian).sum().item()
            require(
                abs(reported - actual) <= REPORTED_LOSS_TOLERANCE * actual + floor,
                f"it reports a loss of {reported:.6g}, but the loss is {actual:.6g}",
            )
