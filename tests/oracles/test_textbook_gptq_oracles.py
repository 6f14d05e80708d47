"""Variants of GPTQ against its textbook form: inverse Cholesky factor, first column to last, in float64."""

import pytest
import torch

from quantlab.api import CodebookSpec, layer_loss
from quantlab.solvers.grid import fit_grid, minmax_grid
from quantlab.solvers.kmeans import kmeans_levels
from quantlab_gptq import GptqQuantizer
from quantlab_leanquant import LeanquantQuantizer
from quantlab_rtn import RtnQuantizer

DAMPING = 0.01


def relative_loss(method, problem):
    zero, hessian = torch.zeros_like(problem.weight), problem.require_hessian()
    loss = layer_loss(problem.weight, method.quantize(problem).dequantize(), hessian).sum()
    return (loss / layer_loss(problem.weight, zero, hessian).sum()).item()


def inverse_factor(hessian):
    """Upper U with Uᵀ U the inverse of the damped Hessian."""
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def textbook_gptq(weight, hessian, choose):
    """Algorithm 1 of arXiv:2210.17323; `choose` sees all columns that are still to come, compensated so far."""
    weight, upper = weight.clone(), inverse_factor(hessian)
    codes = torch.zeros(weight.shape, dtype=torch.long)
    for j in range(weight.shape[1]):
        codes[:, j], value = choose(j, weight[:, j:])
        error = (weight[:, j] - value) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return codes


def dynamic_gptq(layer, bits, group_size, fit):
    grids = []

    def choose(column, remaining):
        if column % group_size == 0:
            grids.append(fit(remaining[:, :group_size], slice(column, column + group_size)))
        scale, zero = grids[-1].scale[:, 0], grids[-1].zero[:, 0]
        codes = (remaining[:, 0] / scale + zero).round().clamp(0, 2**bits - 1)
        return codes.long(), (codes - zero) * scale

    codes = textbook_gptq(layer.weight, layer.hessian, choose)
    return codes, torch.cat([grid.scale for grid in grids], dim=1), torch.cat([grid.zero for grid in grids], dim=1)


def dynamic(**options):
    return GptqQuantizer(groups="dynamic", column_order="natural", **options)


@pytest.mark.parametrize("block_size", [5, 128])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 4), (3, 16), (4, 48), (8, 1)])
def test_dynamic_groups_are_those_of_the_textbook(make_layer, bits, group_size, block_size):
    layer = make_layer(seed=1)
    spec = CodebookSpec(bits=bits)
    codes, scale, zero = dynamic_gptq(layer, bits, group_size, lambda values, columns: minmax_grid(values, spec))
    answer = dynamic(block_size=block_size).quantize(layer.problem(bits, group_size))
    assert torch.equal(answer.codes.long(), codes)
    assert torch.equal(answer.codebook.zero.double(), zero)
    torch.testing.assert_close(answer.codebook.scale.double(), scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip_search", ["weight", "hessian"])
def test_dynamic_groups_search_their_clipping_in_the_compensated_weights(make_layer, clip_search):
    layer = make_layer(seed=2)
    spec, diagonal = CodebookSpec(bits=3), layer.hessian.diagonal()

    def fit(values, columns):
        return fit_grid(values, spec, clip_search, hessian_diagonal=diagonal[columns])

    codes, scale, zero = dynamic_gptq(layer, 3, 16, fit)
    answer = dynamic(clip_search=clip_search).quantize(layer.problem(3, 16))
    assert torch.equal(answer.codes.long(), codes)
    assert torch.equal(answer.codebook.zero.double(), zero)
    torch.testing.assert_close(answer.codebook.scale.double(), scale, rtol=1e-6, atol=0)


def test_dynamic_groups_differ_from_static_ones_only_behind_the_first(make_layer):
    problem = make_layer(seed=3).problem(3, 16)
    static = GptqQuantizer(column_order="natural").quantize(problem)
    answer = dynamic().quantize(problem)
    assert torch.equal(answer.codebook.scale[:, 0], static.codebook.scale[:, 0])
    assert torch.equal(answer.codes[:, :16], static.codes[:, :16])
    assert (answer.codebook.scale[:, 1:] != static.codebook.scale[:, 1:]).all()


def test_without_groups_dynamic_is_static(make_layer):
    problem = make_layer(seed=4).problem(3)
    static = GptqQuantizer(column_order="natural").quantize(problem)
    assert torch.equal(dynamic().quantize(problem).dequantize(), static.dequantize())


def test_dynamic_groups_pay_where_compensation_leaves_the_range_of_the_weights(make_layer):
    static = total = 0.0
    for seed in range(8):
        problem = make_layer(seed).problem(4, 16)
        static += relative_loss(GptqQuantizer(column_order="natural"), problem)
        total += relative_loss(dynamic(), problem)
    assert total < static


@pytest.mark.parametrize("method", [RtnQuantizer, GptqQuantizer])
def test_clipping_pays_at_two_bits_and_most_if_it_knows_the_inputs(make_layer, method):
    totals = {"none": 0.0, "weight": 0.0, "hessian": 0.0}
    for seed in range(6):
        for clip_search in totals:
            totals[clip_search] += relative_loss(method(clip_search=clip_search), make_layer(seed).problem(2))
    assert totals["hessian"] < totals["weight"] < 0.9 * totals["none"]


@pytest.mark.parametrize("column_order", ["natural", "hessian_diagonal"])
@pytest.mark.parametrize("exponent", [0.0, 2.0, 4.0])
def test_leanquant_is_gptq_on_a_table_weighted_by_the_inverse_factor(make_layer, exponent, column_order):
    layer = make_layer(seed=5)
    natural = torch.arange(48)
    strong_first = layer.hessian.diagonal().argsort(descending=True)
    order = strong_first if column_order == "hessian_diagonal" else natural
    weight, hessian = layer.weight[:, order], layer.hessian[order][:, order]
    importance = inverse_factor(hessian).diagonal() ** -exponent
    levels = kmeans_levels(weight, 8, 100, importance)

    def choose(column, remaining):
        codes = (remaining[:, :1] - levels).abs().argmin(dim=1)
        return codes, levels.gather(1, codes[:, None])[:, 0]

    codes = torch.empty(weight.shape, dtype=torch.long)
    codes[:, order] = textbook_gptq(weight, hessian, choose)
    answer = LeanquantQuantizer(exponent=exponent, column_order=column_order).quantize(layer.problem(3))
    torch.testing.assert_close(answer.codebook.values[:, 0].double(), levels, rtol=1e-6, atol=1e-6)
    assert torch.equal(answer.codes.long(), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_leanquant_is_better_than_gptq_and_than_its_own_table_without_weights(make_layer, bits):
    methods = [LeanquantQuantizer(), LeanquantQuantizer(exponent=0.0), GptqQuantizer()]
    totals = [0.0, 0.0, 0.0]
    for seed in range(6):
        problem = make_layer(seed).problem(bits)
        for index, method in enumerate(methods):
            totals[index] += relative_loss(method, problem)
    assert totals[0] < 0.9 * totals[1] < totals[2]


def test_a_large_exponent_guards_the_strongest_input(make_layer):
    layer = make_layer(seed=6)
    first = int(layer.hessian.diagonal().argmax())

    def distance(exponent):
        levels = LeanquantQuantizer(exponent=exponent).quantize(layer.problem(2)).codebook.values[:, 0]
        return (layer.weight[:, first, None] - levels).abs().amin(dim=1).mean()

    assert distance(16.0) < 0.2 * distance(0.0)


def test_dead_inputs_attract_no_level_of_leanquant(make_layer):
    layer = make_layer(seed=7)
    dead = torch.arange(48) % 5 == 0
    inputs = layer.inputs * ~dead
    loud = torch.where(dead, 100.0, layer.weight)
    tables = [
        LeanquantQuantizer().quantize(type(layer)(weight=weight, inputs=inputs).problem(3)).codebook.values
        for weight in (layer.weight, loud)
    ]
    assert torch.equal(*tables)
