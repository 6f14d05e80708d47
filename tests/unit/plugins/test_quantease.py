import math

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem
from quantlab_quantease import QuanteaseQuantizer
from quantlab_quantease.outliers import OutlierSupport


def problem(tokens=100):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, 32, generator=generator)
    return LayerProblem(
        name="layer",
        weight=torch.randn(8, 32, generator=generator),
        spec=CodebookSpec(bits=3),
        statistics=InputStatistics(hessian=inputs.T @ inputs / tokens, num_tokens=tokens),
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("iterations", 0, "iterations=0"),
        ("column_order", "act", "natural, hessian_diagonal"),
        ("start", "kmeans", "float, gptq, rtn"),
        ("outliers", "rows", "none, unstructured, structured"),
        ("outlier_fraction", -0.1, "outlier_fraction=-0.1"),
        ("outlier_fraction", 1.5, "outlier_fraction=1.5"),
        ("outlier_fraction", math.nan, "outlier_fraction=nan"),
    ],
)
def test_impossible_options_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        QuanteaseQuantizer(**{option: value})


def test_paper_preset_is_the_published_algorithm():
    paper = QuanteaseQuantizer(**QuanteaseQuantizer.info.presets["paper"])
    assert paper == QuanteaseQuantizer(iterations=30, column_order="natural", start="float", outliers="none")


def test_rows_depend_on_each_other_only_through_outliers():
    assert QuanteaseQuantizer().info.row_independent
    assert not QuanteaseQuantizer(outliers="unstructured").info.row_independent
    assert not QuanteaseQuantizer(outliers="structured").info.row_independent


def test_a_start_from_gptq_reports_more_damping_than_usual_as_a_fallback():
    assert "damping" not in QuanteaseQuantizer().quantize(problem()).diagnostics
    diagnostics = QuanteaseQuantizer(start="gptq").quantize(problem()).diagnostics
    assert diagnostics["damping"] == 0.01
    assert diagnostics["fallbacks"] == 0


def test_the_number_of_outliers_is_the_share_of_all_weights():
    outliers = QuanteaseQuantizer(outliers="unstructured", outlier_fraction=0.1).quantize(problem()).outliers
    assert len(outliers.values) == round(0.1 * 8 * 32)


def test_structured_outliers_fill_the_share_of_columns():
    outliers = QuanteaseQuantizer(outliers="structured", outlier_fraction=0.1).quantize(problem()).outliers
    assert len(outliers.values) == 8 * round(0.1 * 32)
    assert len(outliers.columns.unique()) == round(0.1 * 32)


def test_unstructured_support_keeps_the_largest_entries_of_all_rows():
    values = torch.tensor([[1.0, -5.0, 2.0, 0.5], [0.0, 1.0, -3.0, 0.1]])
    kept = OutlierSupport("unstructured", 0.25).keep_largest(values)
    assert torch.equal(kept, torch.tensor([[0.0, -5.0, 0.0, 0.0], [0.0, 0.0, -3.0, 0.0]]))


def test_structured_support_keeps_the_largest_columns():
    values = torch.tensor([[1.0, -5.0, 3.0, 0.5], [0.0, 1.0, -4.5, 0.1]])
    kept = OutlierSupport("structured", 0.25).keep_largest(values)
    assert torch.equal(kept, torch.tensor([[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, -4.5, 0.0]]))


def test_grids_leave_out_half_the_share_at_either_end_of_every_row_or_group():
    weight = torch.arange(20.0).view(2, 10)
    support = OutlierSupport("unstructured", 0.4)
    assert torch.equal(support.without(weight, None)[0], torch.arange(10.0).clamp(2, 7))
    assert torch.equal(support.without(weight, 5)[1], torch.tensor([11.0, 11, 12, 13, 13, 16, 16, 17, 18, 18]))
    assert torch.equal(OutlierSupport("none", 0.4).without(weight, None), weight)


def test_grids_leave_out_structured_outliers():
    weight = torch.tensor([[1.0, -5.0, 3.0, 0.5], [0.0, 1.0, -4.5, 0.1]])
    without = OutlierSupport("structured", 0.25).without(weight, None)
    assert torch.equal(without, torch.tensor([[1.0, -5.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.1]]))
