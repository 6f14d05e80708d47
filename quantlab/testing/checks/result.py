"""Promises about the answer: its form, for every request the method supports, and the refusal of all others."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantlab.api import MAX_BITS, MIN_BITS, LayerQuantizer, Statistic
from quantlab.finite import all_finite
from quantlab.testing.check import contract_check, require, require_refusal, skip
from quantlab.testing.judging import (
    relative_loss,
    require_agreement,
    require_sound,
    require_valid_codebook,
    require_valid_codes,
    solve,
)
from quantlab.testing.problems import GROUP_SIZE, IN_FEATURES, draw_weight, make_problem, with_statistics


@contract_check()
def codes_are_valid(quantizer: LayerQuantizer, device: str) -> None:
    """For every declared code width, codes are uint8, of the weight's shape and device, and below 2**bits."""
    for bits in sorted(quantizer.info.bits):
        problem = make_problem(quantizer.info, device, bits=bits)
        require_valid_codes(solve(quantizer, problem), problem)


@contract_check()
def codebook_is_valid(quantizer: LayerQuantizer, device: str) -> None:
    """For every declared code width, levels are float32, finite, on the device: (out_features, groups, 2**bits)."""
    for bits in sorted(quantizer.info.bits):
        problem = make_problem(quantizer.info, device, bits=bits)
        require_valid_codebook(solve(quantizer, problem), problem)


@contract_check()
def diagnostics_are_finite_numbers(quantizer: LayerQuantizer, device: str) -> None:
    """Diagnostics map names to finite Python numbers, ready for a manifest."""
    diagnostics = solve(quantizer, make_problem(quantizer.info, device)).diagnostics
    for name, value in diagnostics.items():
        sound = isinstance(name, str) and type(value) in (int, float) and math.isfinite(value)
        require(sound, f"diagnostic {name!r} is {value!r}, expected a finite int or float")


@contract_check()
def outliers_are_unique_and_ascend(quantizer: LayerQuantizer, device: str) -> None:
    """Outliers are int64 positions inside the weight, unique and ascending, and as many finite float32 values."""
    problem = make_problem(quantizer.info, device)
    outliers = solve(quantizer, problem).outliers
    if outliers is None:
        skip("the method returns no outliers")
    rows, columns, values = outliers.rows, outliers.columns, outliers.values
    dtypes = (rows.dtype, columns.dtype, values.dtype)
    require(dtypes == (torch.int64, torch.int64, torch.float32), f"dtypes are {dtypes}, expected int64, int64, float32")
    require(
        rows.shape == columns.shape == values.shape, f"shapes differ: {rows.shape}, {columns.shape}, {values.shape}"
    )
    inside = (rows >= 0) & (rows < problem.out_features) & (columns >= 0) & (columns < problem.in_features)
    require(bool(inside.all()), f"an outlier lies outside the weight {tuple(problem.weight.shape)}")
    require(bool((torch.diff(rows * problem.in_features + columns) > 0).all()), "outliers do not ascend, or repeat")
    require(all_finite(values), "an outlier is not finite")


@contract_check()
def outliers_are_additive(quantizer: LayerQuantizer, device: str) -> None:
    """Outliers are corrections added to the dense weight: leaving them out makes the loss larger, not smaller."""
    problem = make_problem(quantizer.info, device)
    layer = solve(quantizer, problem)
    if layer.outliers is None:
        skip("the method returns no outliers")
    corrected = relative_loss(problem, layer.dequantize())
    dense = relative_loss(problem, replace(layer, outliers=None).dequantize())
    require(corrected <= dense, f"relative loss is {corrected:.4g} with outliers and {dense:.4g} without")


@contract_check()
def half_precision_weights_are_exact(quantizer: LayerQuantizer, device: str) -> None:
    """A float16 or bfloat16 weight gives the answer of its float32 copy: arithmetic inside is float32 or better."""
    for dtype in (torch.float16, torch.bfloat16):
        problem = make_problem(quantizer.info, device, weight=draw_weight(0).to(dtype))
        half, full = solve(quantizer, problem), solve(quantizer, replace(problem, weight=problem.weight.float()))
        require_sound(half, problem)
        require_agreement(half.dequantize(), full.dequantize(), f"a {dtype} weight must be solved as its float32 copy")


@contract_check()
def strided_weights_are_accepted(quantizer: LayerQuantizer, device: str) -> None:
    """A non-contiguous weight, and non-contiguous statistics, give the answer of their contiguous copies."""
    problem = make_problem(quantizer.info, device)
    contiguous = solve(quantizer, problem).dequantize()
    strided = replace(problem, weight=_strided(problem.weight))
    require_agreement(solve(quantizer, strided).dequantize(), contiguous, "strides of the weight must not matter")
    if problem.statistics is not None:
        hessian, fisher = problem.statistics.hessian, problem.statistics.fisher
        strided = with_statistics(
            problem, hessian=_strided(hessian), fisher=None if fisher is None else _strided(fisher)
        )
        require_agreement(solve(quantizer, strided).dequantize(), contiguous, "strides of statistics must not matter")


@contract_check()
def small_layers_are_accepted(quantizer: LayerQuantizer, device: str) -> None:
    """A single row, a single column, a single weight, and fewer inputs than levels are all solved."""
    for shape in ((1, 1), (1, 8), (8, 1), (3, 5)):
        for bits in (min(quantizer.info.bits), max(quantizer.info.bits)):
            problem = make_problem(quantizer.info, device, bits=bits, weight=draw_weight(0, *shape))
            require_sound(solve(quantizer, problem), problem)


@contract_check(applies_to=lambda info: len(info.bits) < MAX_BITS - MIN_BITS + 1)
def unsupported_bits_are_refused(quantizer: LayerQuantizer, device: str) -> None:
    """A code width that is not declared raises ValueError naming it; it is never replaced by another."""
    for bits in set(range(MIN_BITS, MAX_BITS + 1)) - quantizer.info.bits:
        problem = make_problem(quantizer.info, device, bits=bits)
        require_refusal(partial(solve, quantizer, problem), f"bits={bits}", str(bits))


@contract_check(applies_to=lambda info: not info.supports_groups)
def groups_are_refused(quantizer: LayerQuantizer, device: str) -> None:
    """A method that does not declare groups raises ValueError naming the group size."""
    problem = make_problem(quantizer.info, device, group_size=GROUP_SIZE)
    require_refusal(partial(solve, quantizer, problem), f"group_size={GROUP_SIZE}", str(GROUP_SIZE))


@contract_check(applies_to=lambda info: info.supports_groups)
def groups_have_their_own_codebooks(quantizer: LayerQuantizer, device: str) -> None:
    """With groups, each group of consecutive inputs is resolved on its own scale."""
    weight = draw_weight(0)
    quiet = torch.arange(IN_FEATURES) < GROUP_SIZE
    weight[:, quiet] *= 1e-3
    problem = make_problem(
        quantizer.info, device, bits=max(quantizer.info.bits), group_size=GROUP_SIZE, weight=weight,
        hessian=torch.eye(IN_FEATURES),
    )  # fmt: skip
    layer = solve(quantizer, problem)
    require_sound(layer, problem)
    error = (layer.dequantize() - problem.weight)[:, quiet].norm() / problem.weight[:, quiet].norm()
    require(bool(error < 0.5), f"a group of small weights has relative error {float(error):.3g}, expected below 0.5")


@contract_check(applies_to=lambda info: bool(info.needs))
def missing_statistics_are_refused(quantizer: LayerQuantizer, device: str) -> None:
    """A method that needs statistics and does not get them raises ValueError naming the layer."""
    problem = make_problem(quantizer.info, device)
    require_refusal(partial(solve, quantizer, replace(problem, statistics=None)), "no statistics", problem.name)
    if problem.statistics is not None and problem.statistics.fisher is not None:
        incomplete = replace(problem, statistics=replace(problem.statistics, fisher=None))
        require_refusal(partial(solve, quantizer, incomplete), "no Fisher diagonal", problem.name)


@contract_check(applies_to=lambda info: not info.needs >= set(Statistic))
def undeclared_statistics_are_ignored(quantizer: LayerQuantizer, device: str) -> None:
    """Statistics that a method does not declare to need, but that others had collected, do not change its answer."""
    withheld = make_problem(quantizer.info, device)
    offered = make_problem(replace(quantizer.info, needs=frozenset(Statistic)), device)
    require_agreement(
        solve(quantizer, offered).dequantize(),
        solve(quantizer, withheld).dequantize(),
        "undeclared statistics must not matter",
    )


def _strided(matrix: Tensor) -> Tensor:
    """An equal matrix whose entries are two apart in memory, in columns."""
    spread = matrix.new_zeros(matrix.shape[1], 2 * matrix.shape[0]).T[::2]
    return spread.copy_(matrix)
