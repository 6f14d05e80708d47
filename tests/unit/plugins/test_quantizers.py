"""Behaviour of single methods beyond the contract."""

from functools import partial

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, UniformGrid, layer_loss
from quantlab.solvers.grid import fit_grid, minmax_grid, round_to_nearest
from quantlab_ganq import GanqQuantizer
from quantlab_gptq import GptqQuantizer
from quantlab_leanquant import LeanquantQuantizer
from quantlab_lnq import LnqQuantizer
from quantlab_quantease import QuanteaseQuantizer
from quantlab_rtn import RtnQuantizer


def problem(bits=3, group_size=None, in_features=32, tokens=100):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    return LayerProblem(
        name="layer",
        weight=torch.randn(8, in_features, generator=generator),
        spec=CodebookSpec(bits=bits, group_size=group_size),
        statistics=InputStatistics(hessian=inputs.T @ inputs / tokens, num_tokens=tokens),
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_rounding_to_the_min_max_grid(symmetric):
    layer = problem(group_size=8)
    answer = RtnQuantizer(symmetric=symmetric).quantize(layer)
    assert torch.equal(
        answer.dequantize(), round_to_nearest(layer.weight, layer.spec, symmetric=symmetric).dequantize()
    )


@pytest.mark.parametrize("group_size", [None, 8])
def test_gptq_keeps_the_grid_of_the_original_weights(group_size):
    layer = problem(group_size=group_size)
    answer = GptqQuantizer().quantize(layer)
    expected = minmax_grid(layer.weight, layer.spec)
    assert isinstance(answer.codebook, UniformGrid)
    assert torch.equal(answer.codebook.scale, expected.scale)
    assert torch.equal(answer.codebook.zero, expected.zero)


def test_gptq_gains_from_groups():
    def loss(group_size):
        return GptqQuantizer().quantize(problem(group_size=group_size)).diagnostics["loss"]

    assert loss(4) < loss(None)


def test_gptq_in_natural_order_starts_at_the_first_input():
    layer = problem()
    codes = GptqQuantizer(column_order="natural").quantize(layer).codes
    nearest = round_to_nearest(layer.weight, layer.spec).codes
    assert torch.equal(codes[:, 0], nearest[:, 0])
    assert not torch.equal(codes[:, -1], nearest[:, -1])


def test_gptq_block_size_does_not_change_the_loss():
    losses = [GptqQuantizer(block_size=size).quantize(problem()).diagnostics["loss"] for size in (1, 5, 128)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("method", [GptqQuantizer, partial(GanqQuantizer, shrinkage=False), LeanquantQuantizer])
def test_diagnostics_tell_the_undamped_loss_and_the_damping_that_was_needed(method):
    layer = problem(tokens=5)
    answer = method(damping=0.0).quantize(layer)
    loss = layer_loss(layer.weight, answer.dequantize(), layer.require_hessian()).sum().item()
    assert answer.diagnostics["loss"] == pytest.approx(loss)
    assert 0 < answer.diagnostics["damping"] <= 1e-5
    assert answer.diagnostics["fallbacks"] == 1
    assert method(damping=0.1).quantize(layer).diagnostics["fallbacks"] == 0


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=str)
def test_rtn_rounds_to_the_searched_grid(clip_search, options):
    layer = problem(bits=2, group_size=16)
    answer = RtnQuantizer(clip_search=clip_search, **options).quantize(layer)
    expected = fit_grid(
        layer.weight, layer.spec, clip_search, hessian_diagonal=layer.require_hessian().diagonal(), **options
    )
    assert torch.equal(answer.codebook.scale, expected.scale)
    assert not torch.equal(answer.codes, RtnQuantizer(**options).quantize(layer).codes)


def test_each_clip_search_of_rtn_has_its_own_answer():
    answers = [RtnQuantizer(clip_search=name).quantize(problem(bits=2)).codes for name in ("none", "weight", "hessian")]
    assert len({tuple(codes.flatten().tolist()) for codes in answers}) == 3


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_gptq_sweeps_over_the_searched_grid(group_size, clip_search):
    layer = problem(bits=2, group_size=group_size)
    answer = GptqQuantizer(clip_search=clip_search).quantize(layer)
    expected = fit_grid(layer.weight, layer.spec, clip_search, hessian_diagonal=layer.require_hessian().diagonal())
    assert torch.equal(answer.codebook.scale, expected.scale)
    assert not torch.equal(answer.codes, GptqQuantizer().quantize(layer).codes)


@pytest.mark.parametrize("options", [{"exponent": 1.0}, {"damping": 1.0}, {"column_order": "natural"}], ids=str)
def test_every_option_of_leanquant_changes_its_answer(options):
    changed = LeanquantQuantizer(**options).quantize(problem())
    assert not torch.equal(changed.dequantize(), LeanquantQuantizer().quantize(problem()).dequantize())


def test_leanquant_has_no_overflow_at_any_exponent():
    answer = LeanquantQuantizer(exponent=1e4).quantize(problem())
    assert torch.isfinite(answer.dequantize()).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (GptqQuantizer, {"column_order": "natural"}),
        (GptqQuantizer, {"damping": 1.0}),
        (GptqQuantizer, {"groups": "dynamic", "column_order": "natural"}),
        (GptqQuantizer, {"clip_search": "weight"}),
        (LnqQuantizer, {"iterations": 1}),
        (LnqQuantizer, {"cd_sweeps": 1}),
        (LnqQuantizer, {"column_order": "natural"}),
        (QuanteaseQuantizer, {"iterations": 3}),
        (QuanteaseQuantizer, {"column_order": "hessian_diagonal"}),
        (QuanteaseQuantizer, {"start": "gptq"}),
        (QuanteaseQuantizer, {"start": "rtn"}),
        (QuanteaseQuantizer, {"outliers": "unstructured"}),
        (QuanteaseQuantizer, {"outliers": "structured", "outlier_fraction": 0.1}),
        (RtnQuantizer, {"symmetric": True}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_every_option_changes_the_answer(method, options):
    layer = problem(bits=2, group_size=16 if options.get("groups") else None)
    base = {"column_order": "natural"} if options.get("groups") else {}
    changed = method(**base | options).quantize(layer)
    assert not torch.equal(changed.dequantize(), method(**base).quantize(layer).dequantize())
