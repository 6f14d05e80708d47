import math
from dataclasses import replace

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, layer_loss
from quantlab.solvers.sweep import factor_for_sweep
from quantlab_ganq import GanqQuantizer
from quantlab_ganq.conditioning import diagonally_dominant_factor, shrinkage_for, shrunk
from quantlab_ganq.outliers import tails
from quantlab_ganq.starts import published_table, target_table, weight_table

PRESETS = GanqQuantizer.info.presets
QUICK = {"iterations": 2, "polish_rounds": 1}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(bits=3, in_features=64, tokens=300):
    inputs = normal(tokens, in_features, seed=1) @ normal(in_features, in_features, seed=2)
    return LayerProblem(
        name="layer",
        weight=normal(8, in_features, seed=0),
        spec=CodebookSpec(bits=bits),
        statistics=InputStatistics(hessian=inputs.T @ inputs / tokens, num_tokens=tokens),
    )


def loss_of(layer, **options):
    return GanqQuantizer(**options).quantize(layer).diagnostics["loss"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("iterations", 0, "iterations=0"),
        ("column_order", "act", "natural, hessian_diagonal"),
        ("damping", math.nan, "damping=nan"),
        ("preconditioner", "none", "damping, diagonal_dominance"),
        ("start", "uniform", "kmeans, screened, published"),
        ("block_passes", -1, "block_passes=-1"),
        ("polish_rounds", -1, "polish_rounds=-1"),
        ("keep", "column", "row, layer"),
        ("outlier_fraction", 1.1, "outlier_fraction=1.1"),
        ("outlier_selection", "magnitude", "tails, cost"),
    ],
)
def test_impossible_options_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        GanqQuantizer(**{option: value})


def test_the_best_preset_is_the_default():
    assert GanqQuantizer(**PRESETS["best"]) == GanqQuantizer()


def test_the_paper_s_preset_is_the_published_algorithm():
    paper = GanqQuantizer(**PRESETS["paper"])
    beyond = (paper.shrinkage, paper.block_passes, paper.polish_rounds, paper.outlier_fraction)
    assert beyond == (False, 0, 0, 0.0)
    assert (paper.iterations, paper.column_order, paper.start) == (10, "natural", "kmeans")


def test_the_preset_of_the_published_code_has_its_tables_and_preconditioner():
    code = GanqQuantizer(**PRESETS["published_code"])
    paper = GanqQuantizer(**PRESETS["paper"])
    assert code == replace(paper, preconditioner="diagonal_dominance", start="published", keep="layer")
    assert code.info.bits == {3, 4}
    assert not code.info.row_independent
    with pytest.raises(ValueError, match="bits=2"):
        code.quantize(problem(bits=2))


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 1},
        {"column_order": "natural"},
        {"damping": 1.0},
        {"preconditioner": "diagonal_dominance"},
        {"shrinkage": False},
        {"start": "kmeans"},
        {"start": "published"},
        {"block_passes": 0},
        {"polish_rounds": 0},
        {"keep": "layer"},
        {"outlier_fraction": 0.1},
        {"outlier_fraction": 0.1, "outlier_selection": "cost"},
    ],
    ids=str,
)
def test_every_option_changes_the_answer(options):
    base = GanqQuantizer(**QUICK).quantize(problem())
    changed = GanqQuantizer(**QUICK | options).quantize(problem())
    assert not torch.equal(changed.dequantize(), base.dequantize())


def test_the_seed_of_the_problem_draws_the_blocks():
    first, second = (GanqQuantizer(**QUICK).quantize(replace(problem(), seed=seed)).codes for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, GanqQuantizer(**QUICK).quantize(replace(problem(), seed=1)).codes)


def test_the_best_layer_is_not_better_than_the_best_rows():
    paper = PRESETS["paper"]
    assert loss_of(problem(), **paper) < loss_of(problem(), **paper | {"keep": "layer"})
    losses = [loss_of(problem(), **paper | {"keep": "layer", "iterations": count}) for count in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)


def test_codes_are_at_their_end_on_the_table_as_it_is_stored():
    layer = problem()
    answer = GanqQuantizer(shrinkage=False).quantize(layer)
    table = answer.codebook.values[:, 0].half().double()
    error = layer.weight.double() - table.gather(1, answer.codes.long())
    hessian = layer.require_hessian().double()
    step = (table[:, None, :] - table.gather(1, answer.codes.long())[..., None]).neg()  # of the error
    change = 2 * step * (error @ hessian)[..., None] + step.square() * hessian.diagonal()[:, None]
    losing = (change < -1e-4 * layer_loss(error, torch.zeros_like(error), hessian)[:, None, None]).any(dim=2)
    assert losing.sum() <= 0.01 * losing.numel()  # two passes: hardly anything is left to gain


def test_dead_inputs_get_the_nearest_final_level():
    layer = problem()
    hessian = layer.require_hessian().clone()
    hessian[::3] = 0
    hessian[:, ::3] = 0
    silent = replace(layer, statistics=InputStatistics(hessian=hessian, num_tokens=300))
    for preset in ("best", "paper", "published_code"):
        answer = GanqQuantizer(**PRESETS[preset]).quantize(silent)
        distance = (layer.weight[..., None] - answer.codebook.levels()).abs().amin(dim=2)
        assert torch.equal((layer.weight - answer.dequantize()).abs()[:, ::3], distance[:, ::3])


@pytest.mark.parametrize(("tokens", "share"), [(64, 0.6), (256, 0.25), (1024, 2 / 64), (0, 0.6)])
def test_fewer_tokens_shrink_the_off_diagonal_entries_more(tokens, share):
    hessian = problem().require_hessian()
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    result = shrunk(hessian, shrinkage_for(hessian, tokens))
    torch.testing.assert_close(result.diagonal(), hessian.diagonal())
    torch.testing.assert_close(result[off_diagonal], (1 - share) * hessian[off_diagonal])


def test_shrinkage_lowers_the_loss_on_other_text_when_tokens_are_few():
    truth = problem(tokens=10_000)
    few = problem(tokens=32)  # half a token per input: most of what they say about correlations is chance
    held_out = [
        layer_loss(few.weight, GanqQuantizer(shrinkage=on).quantize(few).dequantize(), truth.require_hessian()).sum()
        for on in (True, False)
    ]
    assert held_out[0] < 0.8 * held_out[1]


def test_the_dominant_diagonal_is_not_below_the_rest_of_its_row_and_its_loss_is_that_of_the_hessian():
    hessian = problem().require_hessian().double()
    hessian[5] = hessian[:, 5] = 0
    order = torch.arange(64)
    factor = diagonally_dominant_factor(hessian, order, torch.float64)
    lower = factor.feedback * factor.pivots
    preconditioned = (lower @ lower.T).flip(0, 1)
    live = order != 5
    rest = hessian.abs().sum(dim=1) - hessian.diagonal()
    torch.testing.assert_close(
        preconditioned.diagonal()[live], torch.maximum(rest, hessian.diagonal())[live], rtol=1e-6, atol=0
    )
    energy, shift = factor.loss_terms()
    assert energy[factor.columns == 5] == 0
    torch.testing.assert_close(
        shift.flip(0)[live], (hessian.diagonal() - preconditioned.diagonal())[live], rtol=1e-9, atol=1e-9
    )


def test_published_tables_of_four_bits_have_more_levels_in_the_middle_and_share_the_ends_of_quarters():
    row = torch.linspace(-4, 4, 33)[None]
    table = published_table(row, 16, with_outliers=False)[0]
    assert table.tolist() == [-4, -3, -2, -2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 2, 3, 4]
    table = published_table(row, 16, with_outliers=True)[0]
    assert table.unique().numel() == 13
    assert table[[0, 1, 2, 7, 8, 13, 14, 15]].tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_published_tables_of_three_bits_are_quantiles():
    table = published_table(torch.arange(101.0).flip(0)[None], 8, with_outliers=False)
    assert table.tolist() == [[0, 20, 35, 50, 65, 80, 90, 100]]


def test_dead_inputs_attract_no_level_of_a_first_table():
    weight = normal(4, 64, seed=0)
    weight[:, 7] = 50.0
    importance = (torch.arange(64) != 7).float()
    table = weight_table(weight, 4, importance)
    assert table.max() < 10
    assert torch.equal(table, weight_table(weight[:, torch.arange(64) != 7], 4, torch.ones(63)))


def test_target_tables_are_not_those_of_the_weights():
    layer = problem(bits=3)
    hessian = layer.require_hessian()
    factor = factor_for_sweep(hessian, hessian.diagonal().argsort(descending=True), 0.01, torch.float32)
    pivots = factor.pivots[factor.columns.argsort()].float()
    weights, targets = weight_table(layer.weight, 8, pivots), target_table(layer.weight, 8, factor, pivots)
    assert not torch.equal(weights, targets)
    assert (targets.diff(dim=1) >= 0).all()


def test_tails_are_both_ends_of_every_row():
    weight = torch.tensor([[3.0, -1, 0, 9, 5, 4], [0, 1, 2, 3, 4, 5]])
    assert tails(weight, 0.5).tolist() == [
        [False, True, False, True, True, False],
        [True, False, False, False, True, True],
    ]
    assert not tails(weight, 0.0).any()
    assert tails(weight, 1.0).all()


@pytest.mark.parametrize("selection", ["tails", "cost"])
def test_every_row_has_its_share_of_outliers(selection):
    options = QUICK | {"outlier_fraction": 0.1, "outlier_selection": selection}
    outliers = GanqQuantizer(**options).quantize(problem()).outliers
    assert torch.equal(outliers.rows.bincount(), torch.full((8,), round(0.1 * 64)))


@pytest.mark.parametrize("selection", ["tails", "cost"])
@pytest.mark.parametrize("preset", ["best", "paper"])
def test_more_outliers_have_less_loss_and_all_have_none(selection, preset):
    layer = problem(bits=2)
    losses = [
        loss_of(layer, **PRESETS[preset] | QUICK, outlier_fraction=share, outlier_selection=selection)
        for share in (0.0, 0.05, 0.1, 0.3, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-8 * losses[0]


def test_no_change_of_any_correction_lowers_the_loss():
    layer = problem()
    answer = GanqQuantizer(outlier_fraction=0.1, shrinkage=False).quantize(layer)
    gradient = (layer.weight - answer.dequantize()).double() @ layer.require_hessian().double()
    at_outliers = gradient[answer.outliers.rows, answer.outliers.columns].abs()
    assert at_outliers.max() < 1e-4 * gradient.abs().max()
