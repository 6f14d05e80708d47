"""GANQ against the plain form of its paper."""

import importlib.util
from pathlib import Path

import pytest
import torch

from quantlab.api import layer_loss
from quantlab.solvers.kmeans import kmeans_levels
from quantlab_ganq import GanqQuantizer

SPECIFICATION = importlib.util.spec_from_file_location("textbook_ganq", Path(__file__).with_name("textbook_ganq.py"))
textbook = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(textbook)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_paper_preset_is_not_worse_than_the_textbook(make_layer, dtype):
    ours = theirs = 0.0
    for seed in range(4):
        problem = make_layer(seed, in_features=64).problem(3, dtype=dtype)
        weight, hessian = problem.weight, problem.require_hessian()
        first = kmeans_levels(weight, 8, 50, cells=256)
        weight_hat, _ = textbook.textbook_ganq(weight, hessian, first, 10, 0.01)
        theirs += layer_loss(weight, weight_hat, hessian).sum()
        answer = GanqQuantizer(**GanqQuantizer.info.presets["paper"]).quantize(problem)
        ours += layer_loss(weight, answer.dequantize(), hessian).sum()
    assert ours <= 1.0005 * theirs


def test_one_iteration_is_that_of_the_textbook(make_layer):
    problem = make_layer(seed=5, in_features=64).problem(3)
    weight, hessian = problem.weight, problem.require_hessian()
    first = kmeans_levels(weight, 8, 50, cells=256)
    weight_hat, _ = textbook.textbook_ganq(weight, hessian, first, 1, 0.01)
    method = GanqQuantizer(**{**GanqQuantizer.info.presets["paper"], "iterations": 1})
    torch.testing.assert_close(method.quantize(problem).dequantize().double(), weight_hat, rtol=1e-5, atol=1e-5)
