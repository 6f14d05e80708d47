"""What the contract does not say: which option values each method refuses."""

import math

import pytest

from quantlab_ganq import GanqQuantizer
from quantlab_gptq import GptqQuantizer
from quantlab_kmeans import KmeansQuantizer


@pytest.mark.parametrize("method", [GanqQuantizer, KmeansQuantizer])
@pytest.mark.parametrize("iterations", [0, -3])
def test_iterations_below_one_are_refused(method, iterations):
    with pytest.raises(ValueError, match=f"iterations={iterations}"):
        method(iterations=iterations)


@pytest.mark.parametrize("method", [GanqQuantizer, GptqQuantizer])
@pytest.mark.parametrize("damping", [-0.01, math.nan, math.inf])
def test_damping_that_is_negative_or_not_finite_is_refused(method, damping):
    with pytest.raises(ValueError, match=f"damping={damping}"):
        method(damping=damping)


@pytest.mark.parametrize("method", [GanqQuantizer, GptqQuantizer])
def test_unknown_column_orders_are_refused(method):
    with pytest.raises(ValueError, match="natural, hessian_diagonal"):
        method(column_order="act")


def test_block_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="block_size=0"):
        GptqQuantizer(block_size=0)


def test_paper_preset_is_the_published_algorithm():
    paper = GanqQuantizer(**GanqQuantizer.info.presets["paper"])
    assert paper == GanqQuantizer(iterations=10, column_order="natural", damping=0.01)
