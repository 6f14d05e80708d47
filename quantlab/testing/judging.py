"""How an answer is obtained and judged."""

import torch
from torch import Tensor

from quantlab.api import LayerProblem, LayerQuantizer, QuantizedLayer, layer_loss
from quantlab.finite import all_finite
from quantlab.testing.check import require

AGREEMENT = 1e-4
"""Largest difference, relative to the largest weight of the row, between answers that should be equal: float32
rounding of a few dozen accumulated terms stays below 1e-5, while one changed code moves a weight by 1e-3 or more."""
SLACK = 1.02
"""A method may lose to rounding on single layers; on average it may lose by no more than this factor."""


def solve(quantizer: LayerQuantizer, problem: LayerProblem) -> QuantizedLayer:
    """The method's answer, obtained as the engine obtains it: without gradients."""
    with torch.no_grad():
        return quantizer.quantize(problem)


def relative_loss(problem: LayerProblem, weight_hat: Tensor) -> float:
    """Layer loss over the loss of a zero weight; without statistics the Hessian counts as the identity."""
    weight, statistics = problem.weight, problem.statistics
    hessian = torch.eye(problem.in_features, device=weight.device) if statistics is None else statistics.hessian
    loss = layer_loss(weight, weight_hat, hessian).sum()
    return float(loss / layer_loss(weight, torch.zeros_like(weight), hessian).sum())


def rounded_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """The yardstick: each row rounded to a uniform grid from its minimum to its maximum, 0 being a level."""
    low, high = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
    top_code = 2**bits - 1
    scale = (high - low) / top_code
    scale = torch.where(scale > 0, scale, 1)
    zero = (-low / scale).round()
    codes = (weight / scale + zero).round().clamp(0, top_code)
    return (codes - zero) * scale


def require_quality(quantizer: LayerQuantizer, problems: list[LayerProblem], what: str) -> None:
    """Require sound answers that, averaged over the problems, lose no more than rounding does."""
    total, yardstick = 0.0, 0.0
    for problem in problems:
        layer = solve(quantizer, problem)
        require_sound(layer, problem)
        total += relative_loss(problem, layer.dequantize())
        yardstick += relative_loss(problem, rounded_to_nearest(problem.weight, problem.spec.bits))
    message = (
        f"mean relative loss over {what} is {total / len(problems):.4g}, rounding has {yardstick / len(problems):.4g}"
    )
    require(total <= SLACK * yardstick, message)


def require_agreement(answer: Tensor, expected: Tensor, rule: str) -> None:
    """Require two dequantized weights to be equal up to float32 rounding; names the worst coordinate."""
    require(answer.shape == expected.shape, f"{rule}; shapes {tuple(answer.shape)} and {tuple(expected.shape)}")
    difference = (answer - expected).abs() / expected.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    worst = int(difference.nan_to_num(nan=torch.inf).argmax())
    row, column = divmod(worst, answer.shape[1])
    require(
        bool(difference.flatten()[worst] <= AGREEMENT),
        f"{rule}; at row {row}, column {column}: got {float(answer[row, column])}, expected "
        f"{float(expected[row, column])}",
    )


def require_sound(layer: QuantizedLayer, problem: LayerProblem) -> None:
    """Require codes, codebook and dequantized weight of the right types, shapes, devices and ranges."""
    require_valid_codes(layer, problem)
    require_valid_codebook(layer, problem)
    weight_hat = layer.dequantize()
    require(all_finite(weight_hat), f"{_request(problem)}: the dequantized weight is not finite")


def require_valid_codes(layer: QuantizedLayer, problem: LayerProblem) -> None:
    """Require uint8 codes of the weight's shape, on its device, below 2**bits."""
    codes, request = layer.codes, _request(problem)
    expected = (torch.uint8, tuple(problem.weight.shape), problem.weight.device)
    actual = (codes.dtype, tuple(codes.shape), codes.device)
    require(actual == expected, f"{request}: codes are {actual}, expected {expected}")
    highest = int(codes.max())
    require(highest < problem.spec.levels, f"{request}: a code is {highest}, expected below {problem.spec.levels}")


def require_valid_codebook(layer: QuantizedLayer, problem: LayerProblem) -> None:
    """Require float32, finite levels of shape (out_features, groups, 2**bits) on the weight's device."""
    levels, spec, request = layer.codebook.levels(), problem.spec, _request(problem)
    groups = 1 if spec.group_size is None else problem.in_features // spec.group_size
    expected = (torch.float32, (problem.out_features, groups, spec.levels), problem.weight.device)
    actual = (levels.dtype, tuple(levels.shape), levels.device)
    require(actual == expected, f"{request}: codebook levels are {actual}, expected {expected}")
    require(all_finite(levels), f"{request}: the codebook is not finite")


def _request(problem: LayerProblem) -> str:
    size = "" if problem.spec.group_size is None else f" group_size={problem.spec.group_size}"
    return f"weight {tuple(problem.weight.shape)} {problem.weight.dtype} bits={problem.spec.bits}{size}"
