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
from quantlab.engine.device import moved, solving_device
from quantlab.engine.moments import Moments
from quantlab.engine.rows import join_rows, split_rows
from quantlab.engine.solve import SolveOptions, solve_layers
from quantlab.engine.statistics import GroupStatistics, row_groups
from quantlab.engine.target import targets_of
from quantlab.engine.verify import verify_answer
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


class RecordingFisher(Recording):
    info: ClassVar[QuantizerInfo] = replace(Recording.info, needs=frozenset({Statistic.FISHER}))


def draw_hessian(seed=0):
    tokens = torch.randn(200, 16, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 3, 16)
    return tokens.T @ tokens / 200


@pytest.fixture
def hessian():
    return draw_hessian()


@pytest.fixture
def statistics(hessian):
    shared = Moments(hessian=hessian)
    return GroupStatistics(moments={"a": (shared,), "b": (shared,)}, num_tokens=200)


@pytest.fixture
def grouped():
    """Statistics with two row groups for each layer, all with Hessians of their own."""
    moments = {
        name: tuple(Moments(hessian=draw_hessian(seed)) for seed in seeds)
        for name, seeds in {"a": (1, 2), "b": (3, 4)}.items()
    }
    return GroupStatistics(moments=moments, num_tokens=200)


@pytest.fixture
def linears():
    torch.manual_seed(1)
    return {"a": nn.Linear(16, 5), "b": nn.Linear(16, 7, bias=False)}


def solve(linears, statistics, method, max_rows=None, **changes):
    options = SolveOptions(quantizer=method, spec=SPEC, **changes)
    return solve_layers(linears, statistics, dict.fromkeys(linears, options), max_rows)


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


def test_layers_with_other_options_are_solved_apart(linears, statistics):
    method = Recording([])
    linears = linears | {"c": nn.Linear(16, 2)}
    statistics = replace(statistics, moments=dict(statistics.moments) | {"c": statistics.moments["a"]})
    options = {name: SolveOptions(quantizer=method, spec=SPEC) for name in ("a", "c")}
    options["b"] = SolveOptions(quantizer=method, spec=CodebookSpec(bits=3, group_size=8))
    solved = solve_layers(linears, statistics, options)
    assert [problem.name for problem in method.problems] == ["a + c", "b"]
    assert [problem.spec.group_size for problem in method.problems] == [None, 8]
    assert [solved[name][1].group_size for name in ("a", "b", "c")] == [None, 8, None]


def test_row_groups_are_solved_with_their_own_hessians(linears, grouped):
    method = Recording([])
    solved = solve(linears, grouped, method)
    assert [problem.name for problem in method.problems] == ["a[0:2]", "a[2:5]", "b[0:3]", "b[3:7]"]
    posed = [problem.statistics.hessian for problem in method.problems]
    expected = [own.hessian for name in "ab" for own in grouped.moments[name]]
    assert all(mine is theirs for mine, theirs in zip(posed, expected, strict=True))
    for name, (module, result) in solved.items():
        weight = linears[name].weight.detach()
        torch.testing.assert_close(
            module.dequantize(), round_to_nearest(weight, SPEC).dequantize(), rtol=2e-3, atol=1e-4
        )
        loss = scale = 0
        for rows, own in zip(row_groups(len(weight), 2), grouped.moments[name], strict=True):
            loss += layer_loss(weight[rows], module.dequantize()[rows], own.hessian).sum()
            scale += layer_loss(weight[rows], 0 * weight[rows], own.hessian).sum()
        assert result.relative_loss == pytest.approx((loss / scale).item())


def test_row_groups_of_a_method_whose_rows_depend_on_each_other_are_solved_apart(linears, grouped):
    method = RecordingWhole([])
    solve(linears, grouped, method, max_rows=1)
    assert [problem.out_features for problem in method.problems] == [2, 3, 3, 4]


@pytest.mark.parametrize(("max_rows", "sizes"), [(12, [12]), (8, [5, 7]), (6, [6, 6]), (5, [5, 5, 2]), (2, [2] * 6)])
def test_a_large_stack_is_solved_in_pieces(linears, statistics, max_rows, sizes):
    method = Recording([])
    solved = solve(linears, statistics, method, max_rows=max_rows)
    assert [problem.out_features for problem in method.problems] == sizes
    whole = solve(linears, statistics, Recording([]))
    for name, (module, _) in solved.items():
        assert torch.equal(module.dequantize(), whole[name][0].dequantize())


def test_the_fisher_diagonal_goes_with_its_rows(linears, grouped):
    fisher = {name: torch.rand(linear.weight.shape) for name, linear in linears.items()}
    statistics = replace(grouped, fisher=fisher)
    method = RecordingFisher([])
    solve(linears, statistics, method)
    given = torch.cat([problem.require_fisher() for problem in method.problems])
    assert torch.equal(given, torch.cat(list(fisher.values())))
    blind = Recording([])
    solve(linears, statistics, blind)
    assert all(problem.statistics.fisher is None for problem in blind.problems)


def test_a_layer_that_no_token_reached_is_not_solved_unless_that_is_allowed(linears, statistics):
    empty = Moments(hessian=torch.zeros(16, 16))
    unreached = GroupStatistics(moments={"a": (empty,), "b": (empty,)}, num_tokens=0)
    with pytest.raises(QualityError, match=r"a \+ b: no calibration token reached this layer"):
        solve(linears, unreached, Recording([]))
    solved = solve(linears, unreached, Recording([]), allow_fallbacks=True)
    assert solved["a"][1].diagnostics == {"fallbacks": 1}
    assert solved["a"][1].num_tokens == 0


class Reporting(Recording):
    def quantize(self, problem):
        rows = problem.out_features
        return replace(super().quantize(problem), diagnostics={"fallbacks": 1.0, "damping": 0.1 * rows})


def test_diagnostics_of_the_parts_of_a_layer_are_merged(linears, grouped):
    solved = solve(linears, grouped, Reporting([]), allow_fallbacks=True)
    assert solved["a"][1].diagnostics == {"fallbacks": 2, "damping": pytest.approx(0.3)}


def test_the_method_and_its_baseline_are_given_the_shifted_target(linears, hessian):
    tokens = torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    shared = Moments(hessian=hessian, drift=0.1 * tokens.T @ tokens / 200)
    moments = {"a": (shared,), "b": (shared,)}
    statistics = GroupStatistics(moments=moments, num_tokens=200, target_alpha=0.5)
    method = Recording([])
    solved = solve(linears, statistics, method)
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    targets = targets_of(weights, statistics)
    assert torch.equal(method.problems[0].weight, torch.cat(list(targets.values())))
    for name, (module, result) in solved.items():
        target = targets[name]
        scale = layer_loss(target, 0 * target, hessian).sum().item()
        assert result.relative_loss * scale == pytest.approx(
            layer_loss(target, module.dequantize(), hessian).sum().item()
        )
        assert result.rtn_relative_loss == pytest.approx(result.relative_loss, rel=0.02)
        shift = layer_loss(target, weights[name], hessian).sum().item()
        assert result.target_shift == pytest.approx(shift / scale)
        assert result.target_shift > 1e-4


def test_without_drift_the_target_is_the_weight(linears, statistics):
    assert solve(linears, statistics, Recording([]))["a"][1].target_shift == 0


def test_the_loss_is_measured_on_what_is_stored(linears, statistics, hessian):
    module, result = solve(linears, statistics, Recording([]))["a"]
    weight = linears["a"].weight.detach()
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


@pytest.fixture
def layer():
    return replace(
        round_to_nearest(torch.randn(6, 8), CodebookSpec(bits=2, group_size=4)),
        outliers=Outliers(
            rows=torch.tensor([0, 3, 5]), columns=torch.tensor([7, 1, 2]), values=torch.tensor([1.0, 2.0, 3.0])
        ),
    )


@pytest.mark.parametrize("sizes", [[6], [2, 3, 1], [1, 2, 3]])
def test_splitting_a_stack_and_joining_it_again_changes_nothing(layer, sizes):
    parts = split_rows(layer, sizes)
    assert [part.codes.shape[0] for part in parts] == sizes
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), layer.dequantize())
    joined = join_rows(parts)
    assert type(joined.codebook) is type(layer.codebook)
    assert torch.equal(joined.dequantize(), layer.dequantize())
    for mine, original in zip(vars(joined.outliers).values(), vars(layer.outliers).values(), strict=True):
        assert torch.equal(mine, original)


def test_joining_free_and_equally_spaced_levels_gives_free_levels(layer):
    first, second = split_rows(layer, [2, 4])
    free = replace(first, codebook=Lut(values=first.codebook.levels()))
    joined = join_rows([free, second])
    assert isinstance(joined.codebook, Lut)
    assert torch.equal(joined.dequantize(), layer.dequantize())


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
def test_an_answer_that_breaks_the_contract_is_refused(linears, hessian, change, message):
    weight = linears["a"].weight.detach()
    statistics = InputStatistics(hessian=hessian, num_tokens=200)
    problem = LayerProblem(name="a", weight=weight, spec=SPEC, statistics=statistics)
    layer = round_to_nearest(weight, SPEC)
    verify_answer(problem, layer, hessian)
    with pytest.raises(PluginError, match=message):
        verify_answer(problem, QuantizedLayer(**vars(layer) | change(layer)), hessian)


def test_a_reported_loss_of_nothing_is_allowed_its_rounding(hessian):
    weight = torch.arange(8.0).repeat(2, 2)
    layer = round_to_nearest(weight, SPEC)
    scale = layer_loss(weight, 0 * weight, hessian).sum().item()
    problem = LayerProblem(name="a", weight=weight, spec=SPEC)
    verify_answer(problem, replace(layer, diagnostics={"loss": 1e-11 * scale}), hessian)
    with pytest.raises(PluginError, match="reports a loss"):
        verify_answer(problem, replace(layer, diagnostics={"loss": 1e-9 * scale}), hessian)


class Yielding(Recording):
    def quantize(self, problem):
        return replace(super().quantize(problem), diagnostics={"damping": 0.1, "fallbacks": 1.0})


def test_a_fallback_ends_the_run_unless_it_is_allowed(linears, statistics):
    with pytest.raises(QualityError, match=r"a \+ b: recording could not keep to its options .*damping=0\.1"):
        solve(linears, statistics, Yielding([]))
    solved = solve(linears, statistics, Yielding([]), allow_fallbacks=True)
    assert solved["a"][1].diagnostics["fallbacks"] == 1


def test_statistics_that_are_not_finite_are_refused_with_the_name_of_the_layers(linears, statistics):
    nan = Moments(hessian=torch.full((16, 16), torch.nan))
    broken = replace(statistics, moments={"a": (nan,), "b": (nan,)})
    with pytest.raises(NumericalError, match=r"recording cannot quantize a \+ b: the Hessian contains NaN"):
        solve(linears, broken, Recording([]))


class Failing(Recording):
    def quantize(self, problem):
        raise NumericalError("not positive definite")


def test_a_numerical_failure_names_the_layers(linears, statistics):
    with pytest.raises(NumericalError, match=r"recording cannot quantize a \+ b: not positive definite"):
        solve(linears, statistics, Failing([]))


@dataclass(frozen=True)
class Preparing(Recording):
    """Prepares an object of its own for each statistics, and remembers what for."""

    prepared: list

    def prepare_statistics(self, statistics, dtype):
        assert statistics.fisher is None
        assert dtype == torch.float32
        self.prepared.append(statistics.hessian)
        return self.prepared[-1].clone()


def test_statistics_are_prepared_once_for_all_pieces_of_all_layers(linears, statistics):
    method = Preparing([], [])
    solve(linears, statistics, method, max_rows=3)
    assert len(method.prepared) == 1
    assert len(method.problems) == 4
    first = method.problems[0].prepared
    assert torch.equal(first, statistics.moments["a"][0].hessian)
    assert all(problem.prepared is first for problem in method.problems)


def test_every_hessian_is_prepared_for_its_own_rows(linears, grouped):
    method = Preparing([], [])
    solve(linears, grouped, method, max_rows=2)
    assert len(method.prepared) == 4
    assert all(torch.equal(problem.prepared, problem.statistics.hessian) for problem in method.problems)


def test_layers_with_other_options_do_not_share_what_is_prepared(linears, statistics):
    methods = {"a": Preparing([], []), "b": Preparing([], [])}
    options = {
        "a": SolveOptions(quantizer=methods["a"], spec=SPEC),
        "b": SolveOptions(quantizer=methods["b"], spec=SPEC, seed=1),
    }
    solve_layers(linears, statistics, options)
    assert [len(method.prepared) for method in methods.values()] == [1, 1]


def test_an_error_while_preparing_names_the_method_and_the_layers(linears, statistics):
    class Failing(Recording):
        def prepare_statistics(self, statistics, dtype):
            raise NumericalError("not positive definite")

    with pytest.raises(NumericalError, match=r"^recording cannot quantize a \+ b: not positive definite$"):
        solve(linears, statistics, Failing([]))


def test_values_move_between_devices_at_any_depth():
    problem = LayerProblem(
        name="a",
        weight=torch.zeros(2, 3),
        spec=SPEC,
        statistics=InputStatistics(hessian=torch.eye(3), num_tokens=1),
        prepared=torch.ones(1),
    )
    there = moved(problem.statistics, torch.device("meta"))
    assert there.hessian.is_meta
    assert there.fisher is None
    assert moved(None, torch.device("meta")) is None
    answer = round_to_nearest(problem.weight, SPEC)
    assert moved(answer, torch.device("meta")).codebook.levels().is_meta
    assert solving_device(0, torch.device("cpu")) == torch.device("cpu")
    assert solving_device(0.5, torch.device("cpu")) == torch.device("cuda")
