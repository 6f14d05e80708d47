"""What the contract does not say: which option values each method refuses."""

import math
from dataclasses import fields, replace

import pytest

from quantlab.api import Statistic
from quantlab_ganq import GanqQuantizer
from quantlab_gptq import GptqQuantizer
from quantlab_kmeans import KmeansQuantizer
from quantlab_leanquant import LeanquantQuantizer
from quantlab_rtn import RtnQuantizer


@pytest.mark.parametrize("method", [GanqQuantizer, KmeansQuantizer])
@pytest.mark.parametrize("iterations", [0, -3])
def test_iterations_below_one_are_refused(method, iterations):
    with pytest.raises(ValueError, match=f"iterations={iterations}"):
        method(iterations=iterations)


@pytest.mark.parametrize("method", [GanqQuantizer, GptqQuantizer, LeanquantQuantizer])
@pytest.mark.parametrize("damping", [-0.01, math.nan, math.inf])
def test_damping_that_is_negative_or_not_finite_is_refused(method, damping):
    with pytest.raises(ValueError, match=f"damping={damping}"):
        method(damping=damping)


@pytest.mark.parametrize("method", [GanqQuantizer, GptqQuantizer, LeanquantQuantizer])
def test_unknown_column_orders_are_refused(method):
    with pytest.raises(ValueError, match="natural, hessian_diagonal"):
        method(column_order="act")


def test_block_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="block_size=0"):
        GptqQuantizer(block_size=0)


@pytest.mark.parametrize("method", [RtnQuantizer, GptqQuantizer])
def test_unknown_clip_searches_are_refused(method):
    with pytest.raises(ValueError, match="none, weight, hessian"):
        method(clip_search="mse")


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="static, dynamic"):
        GptqQuantizer(groups="permuted", column_order="natural")


def test_dynamic_groups_refuse_to_be_visited_out_of_order():
    with pytest.raises(ValueError, match=r"column_order='hessian_diagonal'.*column_order: natural"):
        GptqQuantizer(groups="dynamic")


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_powers_that_are_negative_or_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=f"hessian_power={value}"):
        KmeansQuantizer(hessian_power=value)
    with pytest.raises(ValueError, match=f"exponent={value}"):
        LeanquantQuantizer(exponent=value)


@pytest.mark.parametrize(
    ("without", "with_hessian"),
    [
        (KmeansQuantizer(), KmeansQuantizer(weighting="hessian_diagonal")),
        (RtnQuantizer(clip_search="weight"), RtnQuantizer(clip_search="hessian")),
    ],
)
def test_calibration_is_needed_if_and_only_if_an_option_asks_for_it(without, with_hessian):
    assert without.info.needs == frozenset()
    assert with_hessian.info.needs == {Statistic.HESSIAN}
    assert type(with_hessian).info.needs == frozenset()
    assert replace(with_hessian, **{field.name: getattr(without, field.name) for field in fields(without)}) == without


def test_the_paper_s_preset_of_leanquant_is_its_default():
    assert LeanquantQuantizer(**LeanquantQuantizer.info.presets["paper"]) == LeanquantQuantizer()
