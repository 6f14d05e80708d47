from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from quantlab.api import (
    CodebookSpec,
    InputStatistics,
    LayerProblem,
    Lut,
    Outliers,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
    layer_loss,
)
from quantlab.engine.solve import SolveOptions, solve_layers, split_rows, verify_answer
from quantlab.errors import NumericalError, PluginError, QualityError
from quantlab.solvers.grid import round_to_nearest

SPEC = CodebookSpec(bits=3)


@dataclass(frozen=True)
class Recording:
    """Round-to-nearest that remembers its problems."""

    problems: list
    info: ClassVar[QuantizerInfo] = QuantizerInfo(
        name="recording", summary="", paper="", bits=frozenset({3}), needs=frozenset({Statistic.HESSIAN})
    )

    def quantize(self, problem):
        self.problems.append(problem)
        return round_to_nearest(problem.weight, problem.spec)


class RecordingWhole(Recording):
    info: ClassVar[QuantizerInfo] = replace(Recording.info, row_independent=False)


@pytest.fixture
def statistics():
    tokens = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 16)
    return InputStatistics(hessian=tokens.T @ tokens / 200, num_tokens=200)


@pytest.fixture
def linears():
    torch.manual_seed(1)
    return {"a": nn.Linear(16, 5), "b": nn.Linear(16, 7, bias=False)}


def solve(linears, statistics, method, **changes):
    return solve_layers(linears, statistics, SolveOptions(quantizer=method, spec=SPEC, **changes))


def test_layers_with_the_same_input_are_solved_as_one_stack_of_rows(linears, statistics):
    method = Recording([])
    solved = solve(linears, statistics, method)
    assert [problem.weight.shape for problem in method.problems] == [(12, 16)]
    for name, (module, result) in solved.items():
        alone = round_to_nearest(linears[name].weight.detach(), SPEC).dequantize()
        torch.testing.assert_close(module.dequantize(), alone, rtol=2e-3, atol=1e-4)  # float16 storage
        assert result.name == name
        assert result.shape == tuple(linears[name].weight.shape)


def test_a_method_whose_rows_depend_on_each_other_gets_each_layer_alone(linears, statistics):
    method = RecordingWhole([])
    solve(linears, statistics, method)
    assert [problem.weight.shape for problem in method.problems] == [(5, 16), (7, 16)]


def test_the_loss_is_measured_on_what_is_stored(linears, statistics):
    module, result = solve(linears, statistics, Recording([]))["a"]
    weight = linears["a"].weight.detach()
    hessian = statistics.hessian
    loss = layer_loss(weight, module.dequantize(), hessian).sum()
    assert result.relative_loss == pytest.approx((loss / layer_loss(weight, 0 * weight, hessian).sum()).item())
    assert result.rtn_relative_loss == pytest.approx(result.relative_loss, rel=0.02)
    assert result.storage_bits == module.storage_bits


def test_the_seed_depends_on_the_run_and_on_the_layers_only(linears, statistics):
    seeds = []
    for seed in (0, 0, 1):
        method = Recording([])
        solve(linears, statistics, method, seed=seed)
        seeds.append(method.problems[0].seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_the_bias_is_kept(linears, statistics):
    solved = solve(linears, statistics, Recording([]))
    assert torch.equal(solved["a"][0].bias, linears["a"].bias)
    assert solved["b"][0].bias is None


def test_splitting_a_stack_and_joining_it_again_changes_nothing():
    weight = torch.randn(6, 8)
    layer = replace(
        round_to_nearest(weight, CodebookSpec(bits=2, group_size=4)),
        outliers=Outliers(
            rows=torch.tensor([0, 3, 5]), columns=torch.tensor([7, 1, 2]), values=torch.tensor([1.0, 2.0, 3.0])
        ),
    )
    parts = split_rows(layer, [2, 3, 1])
    assert [part.codes.shape[0] for part in parts] == [2, 3, 1]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), layer.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: {"codes": layer.codes.int()}, "codes are torch.int32"),
        (lambda layer: {"codes": layer.codes[:, :-1]}, r"expected uint8 \(5, 16\)"),
        (lambda layer: {"codes": layer.codes.clone().fill_(8)}, "code 8 is not below 8"),
        (lambda layer: {"codebook": Lut(values=torch.zeros(5, 1, 4))}, r"\(5, 1, 4\), expected \(5, 1, 8\)"),
        (lambda layer: {"codebook": Lut(values=torch.full((5, 1, 8), torch.nan))}, "NaN or infinity"),
        (lambda layer: {"diagnostics": {"loss": 1e-3}}, "reports a loss of 0.001"),
        (lambda layer: {"diagnostics": {"steps": float("inf")}}, "diagnostics contain"),
    ],
    ids=["dtype", "shape", "range", "levels", "finite", "loss", "diagnostics"],
)
def test_an_answer_that_breaks_the_contract_is_refused(linears, statistics, change, message):
    weight = linears["a"].weight.detach()
    problem = LayerProblem(name="a", weight=weight, spec=SPEC, statistics=statistics)
    layer = round_to_nearest(weight, SPEC)
    verify_answer(problem, layer, statistics.hessian)
    with pytest.raises(PluginError, match=message):
        verify_answer(problem, QuantizedLayer(**vars(layer) | change(layer)), statistics.hessian)


class Yielding(Recording):
    def quantize(self, problem):
        return replace(super().quantize(problem), diagnostics={"damping": 0.1, "fallbacks": 1.0})


def test_a_fallback_ends_the_run_unless_it_is_allowed(linears, statistics):
    with pytest.raises(QualityError, match=r"a \+ b: recording could not keep to its options .*damping=0\.1"):
        solve(linears, statistics, Yielding([]))
    solved = solve(linears, statistics, Yielding([]), allow_fallbacks=True)
    assert solved["a"][1].diagnostics["fallbacks"] == 1


def test_statistics_that_are_not_finite_are_refused_with_the_name_of_the_layers(linears, statistics):
    broken = replace(statistics, hessian=torch.full((16, 16), torch.nan))
    with pytest.raises(NumericalError, match=r"recording cannot quantize a \+ b: the Hessian contains NaN"):
        solve(linears, broken, Recording([]))


class Failing(Recording):
    def quantize(self, problem):
        raise NumericalError("not positive definite")


def test_a_numerical_failure_names_the_layers(linears, statistics):
    with pytest.raises(NumericalError, match=r"recording cannot quantize a \+ b: not positive definite"):
        solve(linears, statistics, Failing([]))
