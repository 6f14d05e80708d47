"""Promises about side effects: there are none, so layers may be solved in any order, in parallel, and again."""

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from quantlab.api import LayerQuantizer, StatisticsPreparer
from quantlab.testing.check import contract_check, require, skip
from quantlab.testing.judging import solve
from quantlab.testing.problems import draw_weight, make_problem, with_rows
from quantlab.testing.settings import read_settings

_RANDOM_STATES: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.get_rng_state().numpy().tobytes(),
    "NumPy": lambda: pickle.dumps(np.random.get_state()),  # noqa: NPY002  # the legacy state is the global one
    "Python": random.getstate,
}


@contract_check()
def inputs_are_left_alone(quantizer: LayerQuantizer, device: str) -> None:
    """Weight and statistics are not written to, even for layers with dead inputs; other layers share them."""
    problem = make_problem(quantizer.info, device)
    tensors = {"weight": problem.weight}
    if problem.statistics is not None:
        tensors["hessian"] = problem.statistics.hessian
        problem.statistics.hessian[:2] = problem.statistics.hessian[:, :2] = 0
        if problem.statistics.fisher is not None:
            tensors["fisher"] = problem.statistics.fisher
            problem.statistics.fisher[:, :2] = 0
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    solve(quantizer, problem)
    for name, tensor in tensors.items():
        changed = int((tensor != before[name]).sum())
        require(changed == 0, f"{changed} of {tensor.numel()} entries of the {name} were changed in place")


@contract_check()
def instances_are_left_alone(quantizer: LayerQuantizer, device: str) -> None:
    """Solving a layer sets no attribute of the method, of its instance or of its class."""
    owners = {"instance": quantizer, "class": type(quantizer)}
    before = {owner: _attributes(holder) for owner, holder in owners.items()}
    solve(quantizer, make_problem(quantizer.info, device))
    for owner, holder in owners.items():
        earlier, later = before[owner], _attributes(holder)
        changed = sorted(name for name in earlier | later if earlier.get(name) is not later.get(name))
        require(not changed, f"attributes {changed} of the {owner} were changed")


@contract_check()
def global_random_states_are_left_alone(quantizer: LayerQuantizer, device: str) -> None:
    """The global generators of torch, NumPy and Python are neither seeded nor drawn from."""
    torch.rand(()), np.random.rand(), random.random()  # so that seeding anew is a change  # noqa: NPY002
    before = {library: read() for library, read in _RANDOM_STATES.items()}
    solve(quantizer, make_problem(quantizer.info, device))
    used = [library for library, read in _RANDOM_STATES.items() if read() != before[library]]
    require(not used, f"the global random state of {', '.join(used)} was changed; use problem.seed")


@contract_check()
def torch_settings_are_left_alone(quantizer: LayerQuantizer, device: str) -> None:
    """Precision, determinism, default dtype, gradient mode and thread count are the engine's; they stay as they are."""
    problem = make_problem(quantizer.info, device)
    with torch.no_grad():
        before = read_settings()
        quantizer.quantize(problem)
        after = read_settings()
    changed = [f"{name}: {before[name]} became {after[name]}" for name in before if before[name] != after[name]]
    require(not changed, "; ".join(changed))


@contract_check()
def answers_are_reproducible(quantizer: LayerQuantizer, device: str) -> None:
    """The same problem, seed included, has the same answer, bit for bit."""
    problem = make_problem(quantizer.info, device)
    first, second = solve(quantizer, problem).dequantize(), solve(quantizer, problem).dequantize()
    require(torch.equal(first, second), f"two runs differ in {int((first != second).sum())} of {first.numel()} weights")


@contract_check()
def answers_do_not_depend_on_history(quantizer: LayerQuantizer, device: str) -> None:
    """Nothing is remembered: other layers solved before, of other shapes and widths, do not change an answer."""
    info = quantizer.info
    problem = make_problem(info, device, seed=1)
    fresh = solve(copy.deepcopy(quantizer), problem).dequantize()
    for other in (make_problem(info, device, seed=2), make_problem(info, device, weight=draw_weight(3, 5, 24))):
        solve(quantizer, other)
    later = solve(quantizer, problem).dequantize()
    require(torch.equal(fresh, later), "the answer changed after other layers had been solved")


@contract_check(applies_to=lambda info: bool(info.needs))
def prepared_statistics_do_not_change_answers(quantizer: LayerQuantizer, device: str) -> None:
    """A problem that comes with what `prepare_statistics` made has the answer that it has without, bit for bit."""
    if not isinstance(quantizer, StatisticsPreparer):
        skip("the method has no `prepare_statistics`")
    info = quantizer.info
    problem = make_problem(info, device)
    statistics = replace(problem.require_statistics(), fisher=None)
    with torch.no_grad():
        prepared = quantizer.prepare_statistics(statistics, torch.float32)
    pieces = [problem, make_problem(info, device, weight=draw_weight(4), hessian=problem.require_hessian())]
    if info.row_independent:  # the same is shared by pieces of a layer
        pieces.append(with_rows(problem, slice(3, 8)))
    for piece in pieces:
        alone, shared = solve(quantizer, piece), solve(quantizer, replace(piece, prepared=prepared))
        require(
            torch.equal(alone.dequantize(), shared.dequantize()) and alone.diagnostics == shared.diagnostics,
            f"{piece.out_features} rows have another answer with prepared statistics, or report other diagnostics",
        )


def _attributes(holder: object) -> dict[str, object]:
    slots = getattr(type(holder), "__slots__", ())
    return {name: getattr(holder, name) for name in slots} | dict(getattr(holder, "__dict__", {}))
