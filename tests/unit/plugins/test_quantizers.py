"""Behaviour of single methods beyond the contract."""

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, Lut, UniformGrid, layer_loss
from quantlab.solvers.grid import minmax_grid, round_to_nearest
from quantlab_ganq import GanqQuantizer
from quantlab_gptq import GptqQuantizer
from quantlab_kmeans import KmeansQuantizer
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


def test_kmeans_fits_a_table_per_group():
    answer = KmeansQuantizer().quantize(problem(group_size=8))
    assert isinstance(answer.codebook, Lut)
    assert answer.codebook.values.shape == (8, 4, 8)
    assert torch.equal(answer.dequantize(), problem().weight)  # eight values on eight levels


@pytest.mark.parametrize("method", [GptqQuantizer, GanqQuantizer])
def test_diagnostics_tell_the_undamped_loss_and_the_damping_that_was_needed(method):
    layer = problem(tokens=5)
    answer = method(damping=0.0).quantize(layer)
    loss = layer_loss(layer.weight, answer.dequantize(), layer.require_hessian()).sum().item()
    assert answer.diagnostics["loss"] == pytest.approx(loss)
    assert 0 < answer.diagnostics["damping"] <= 1e-5
    assert answer.diagnostics["fallbacks"] == 1
    assert method(damping=0.1).quantize(layer).diagnostics["fallbacks"] == 0


def test_ganq_gives_dead_inputs_the_nearest_final_level():
    layer = problem()
    hessian = layer.require_hessian().clone()
    hessian[::3] = 0
    hessian[:, ::3] = 0
    silent = LayerProblem(
        name="layer",
        weight=layer.weight,
        spec=layer.spec,
        statistics=InputStatistics(hessian=hessian, num_tokens=100),
    )
    answer = GanqQuantizer().quantize(silent)
    distance = (layer.weight[..., None] - answer.codebook.levels()).abs().amin(dim=2)
    assert torch.equal((layer.weight - answer.dequantize()).abs()[:, ::3], distance[:, ::3])
