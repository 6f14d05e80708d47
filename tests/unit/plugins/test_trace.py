"""What the iterative methods report about their iterations."""

from itertools import pairwise

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, layer_loss
from quantlab.engine.measure import _merged
from quantlab.registry import configure


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 48, generator=generator)
    inputs = torch.randn(480, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    statistics = InputStatistics(hessian=inputs.T @ inputs / 480, num_tokens=480)
    return LayerProblem(name="a", weight=weight, spec=CodebookSpec(bits=3), statistics=statistics)


def losses_of(answer):
    steps = sum(name.startswith("loss_") for name in answer.diagnostics)
    return [answer.diagnostics[f"loss_{step}"] for step in range(steps)]


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("ganq", {"preset": "paper"}, 10),
        ("ganq", {"options": {"shrinkage": False}}, 3 + 7 + 6),  # starts, the other iterations, polish
        ("ganq", {"options": {"shrinkage": False, "keep": "layer"}}, 3 + 7 + 6),
        ("lnq", {}, 4),
        ("quantease", {"options": {"start": "rtn"}}, 30),
        ("quantease", {}, 21),  # nine of the thirty leave out rounding
    ],
)
def test_the_loss_after_every_step_is_reported(problem, name, options, steps):
    losses = losses_of(configure(name, **options).quantize(problem))
    assert len(losses) == steps
    if name != "quantease" or options:  # which leaves local optima behind on purpose
        tolerance = 1e-5 * losses[0]
        assert all(after <= before + tolerance for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lnq", "quantease"])
def test_the_last_loss_is_that_of_the_answer(problem, name):
    answer = configure(name).quantize(problem)
    assert losses_of(answer)[-1] == pytest.approx(answer.diagnostics["loss"], rel=2e-3)  # the grid is stored in float16


def test_few_rows_stand_for_a_large_layer(problem):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(100, 48, generator=generator)
    large = LayerProblem(name="a", weight=weight, spec=problem.spec, statistics=problem.statistics)
    answer = configure("lnq").quantize(large)
    rows = layer_loss(weight, answer.dequantize(), problem.require_hessian())
    assert losses_of(answer)[-1] == pytest.approx(rows[:64].sum().item(), rel=1e-4)


def test_losses_of_the_parts_of_a_layer_add_up():
    parts = [{"loss": 1.0, "loss_0": 2.0, "lossless": 5.0}, {"loss": 3.0, "loss_0": 4.0, "lossless": 4.0}]
    assert _merged(parts) == {"loss": 4.0, "loss_0": 6.0, "lossless": 5.0}
