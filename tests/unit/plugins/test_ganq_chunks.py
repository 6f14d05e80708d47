"""GANQ solves chunks of rows one after the other; the answer must not show it."""

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem
from quantlab.solvers import request
from quantlab_ganq import GanqQuantizer
from quantlab_kernels import solver

pytestmark = pytest.mark.skipif(not solver.usable(torch.zeros(1)), reason="PyTorch takes all rows at once")


def problem() -> LayerProblem:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    weight = torch.randn(150, 40, generator=generator)
    statistics = InputStatistics(hessian=inputs.T @ inputs / 400, num_tokens=400)
    return LayerProblem(name="layer", weight=weight, spec=CodebookSpec(bits=3), statistics=statistics)


@pytest.mark.parametrize("options", [{}, {"outlier_fraction": 0.1, "outlier_selection": "cost"}, {"keep": "layer"}])
def test_the_answer_does_not_depend_on_the_chunks(monkeypatch, options):
    method, layer = GanqQuantizer(iterations=2, polish_rounds=2, **options), problem()
    whole = method.quantize(layer)
    monkeypatch.setattr(request, "_FEWEST_ROWS_PER_THREAD", 1)
    assert len(request.row_chunks(layer.weight)) > 1
    chunked = method.quantize(layer)
    assert torch.equal(chunked.codes, whole.codes)
    assert torch.equal(chunked.codebook.levels(), whole.codebook.levels())
    assert torch.equal(chunked.dequantize(), whole.dequantize())
    assert chunked.diagnostics == whole.diagnostics
