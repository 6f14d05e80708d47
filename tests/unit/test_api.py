"""The data that passes between engine and methods."""

import pytest
import torch

from quantlab import api
from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, Lut, Outliers, QuantizedLayer, layer_loss

SPEC = CodebookSpec(bits=2)


def pose(weight=None, hessian=None, fisher=None, spec=SPEC):
    statistics = InputStatistics(hessian=torch.eye(6) if hessian is None else hessian, num_tokens=10, fisher=fisher)
    return LayerProblem(
        name="layer7", weight=torch.ones(4, 6) if weight is None else weight, spec=spec, statistics=statistics
    )


def with_value(shape, value):
    matrix = torch.ones(shape)
    matrix[1, 2] = value
    return matrix


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("field", "shape", "what"),
    [
        ("weight", (4, 6), "weight contains NaN or infinity"),
        ("hessian", (6, 6), "the Hessian contains NaN or infinity"),
        ("fisher", (4, 6), "the Fisher diagonal contains NaN, infinity or negative values"),
    ],
)
def test_values_that_are_not_finite_are_refused_with_the_name_of_the_layer(field, shape, what, value):
    with pytest.raises(ValueError, match=f"layer7: {what}"):
        pose(**{field: with_value(shape, value)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\)"),
        ({"weight": torch.ones(0, 6)}, "must be a non-empty matrix"),
        ({"weight": torch.ones(4, 6, dtype=torch.int32)}, "must be floating point"),
        ({"hessian": torch.eye(5)}, r"Hessian has shape \(5, 5\), expected \(6, 6\)"),
        ({"fisher": torch.ones(6, 4)}, r"Fisher diagonal has shape \(6, 4\), expected \(4, 6\)"),
        ({"fisher": with_value((4, 6), -1.0)}, "negative values"),
        ({"spec": CodebookSpec(bits=2, group_size=4)}, "in_features=6 is not a multiple of group_size=4"),
    ],
    ids=["vector", "empty", "integers", "hessian", "fisher", "negative", "groups"],
)
def test_a_malformed_problem_is_refused_with_the_name_of_the_layer(changes, message):
    with pytest.raises(ValueError, match=f"layer7: .*{message}"):
        pose(**changes)


def test_missing_statistics_are_refused_with_the_name_of_the_layer():
    problem = LayerProblem(name="layer7", weight=torch.ones(4, 6), spec=SPEC)
    with pytest.raises(ValueError, match=r"layer7: .*Hessian"):
        problem.require_hessian()
    for other in (problem, pose()):
        with pytest.raises(ValueError, match=r"layer7: .*Fisher"):
            other.require_fisher()


@pytest.mark.parametrize(("rows", "columns"), [(512, 1024), (3, 4), (1, 1)])
def test_the_layer_loss_does_not_depend_on_how_it_is_cut_in_blocks(monkeypatch, rows, columns):
    monkeypatch.setattr(api, "_ROWS", rows)
    monkeypatch.setattr(api, "_COLUMNS", columns)
    tokens = torch.randn(20, 10)
    weight, weight_hat = torch.randn(7, 10), torch.randn(7, 10)
    outputs = tokens.double() @ (weight - weight_hat).double().T
    loss = layer_loss(weight, weight_hat, tokens.T @ tokens / 20)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, outputs.square().mean(dim=0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rows", [512, 3])
def test_every_weight_is_the_level_that_its_code_selects_plus_its_outlier(monkeypatch, rows):
    monkeypatch.setattr(api, "_ROWS", rows)
    values, codes = torch.randn(5, 2, 4), torch.randint(4, (5, 6), dtype=torch.uint8)
    outliers = Outliers(rows=torch.tensor([0, 4]), columns=torch.tensor([5, 0]), values=torch.tensor([10.0, 20.0]))
    weight = QuantizedLayer(codes=codes, codebook=Lut(values=values), outliers=outliers).dequantize()
    for row in range(5):
        for column in range(6):
            extra = {(0, 5): 10.0, (4, 0): 20.0}.get((row, column), 0.0)
            assert weight[row, column] == values[row, column // 3, codes[row, column].long()] + extra
