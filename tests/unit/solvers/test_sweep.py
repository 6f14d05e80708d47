import pytest
import torch

from quantlab.api import Lut
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.order import processing_order
from quantlab.solvers.sweep import factor_for_sweep, sweep


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setup(in_features=20, dtype=torch.float32):
    inputs = normal(60, in_features, seed=1)
    hessian = inputs.T @ inputs / 60
    order = processing_order(hessian, "hessian_diagonal", backwards=True)
    factor = factor_for_sweep(hessian, order, 0.01, dtype)
    weight = normal(7, in_features, seed=2).to(dtype)
    lut = Lut(values=normal(7, 1, 4, seed=3).sort(dim=2).values.to(dtype))
    return weight, factor, lut


def test_error_is_the_weight_minus_the_selected_levels():
    weight, factor, lut = setup()
    result = sweep(weight, factor, LutRounder(lut, 20))
    assert result.codes.dtype == torch.uint8
    assert torch.equal(result.error, weight - lut.values[:, 0].gather(1, result.codes.long()))


def test_results_are_contiguous_and_the_weight_is_left_alone():
    weight, factor, lut = setup()
    copy = weight.clone()
    result = sweep(weight, factor, LutRounder(lut, 20))
    assert result.codes.is_contiguous()
    assert result.error.is_contiguous()
    assert torch.equal(weight, copy)


def test_the_input_quantized_first_is_rounded_to_nearest():
    weight, factor, lut = setup()
    first = factor.columns[-1]
    codes = sweep(weight, factor, LutRounder(lut, 20)).codes
    expected = (weight[:, first, None] - lut.values[:, 0]).abs().argmin(dim=1)
    assert torch.equal(codes[:, first].long(), expected)


def test_feedback_is_unit_triangular_in_the_requested_precision():
    for dtype in (torch.float32, torch.float64):
        _, factor, _ = setup(dtype=dtype)
        assert factor.feedback.dtype == dtype
        assert torch.equal(factor.feedback, factor.feedback.tril())
        assert (factor.feedback.diagonal() == 1).all()


def test_the_damping_used_is_reported():
    hessian = torch.ones(4, 4)
    factor = factor_for_sweep(hessian, torch.arange(4), 0.0, torch.float32)
    assert factor.damping > 0


def test_pivots_are_the_diagonal_of_the_factor_in_its_order():
    _, factor, _ = setup(dtype=torch.float64)
    inputs = normal(60, 20, seed=1)
    hessian = (inputs.T @ inputs / 60).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)
    lower = torch.linalg.cholesky(damped[factor.columns][:, factor.columns])
    torch.testing.assert_close(factor.pivots, lower.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("block_size", [1, 6, 20, 50])
def test_blocks_are_entered_with_the_weights_that_best_make_up_for_all_errors_so_far(block_size):
    weight, factor, lut = setup(dtype=torch.float64)
    entries = []
    result = sweep(
        weight, factor, LutRounder(lut, 20), block_size=block_size, enter_block=lambda *entry: entries.append(entry)
    )
    assert torch.cat([columns for columns, _ in reversed(entries)]).tolist() == factor.columns.tolist()
    lower = factor.feedback * factor.pivots
    hessian = torch.empty_like(lower)
    hessian[factor.columns[:, None], factor.columns] = lower @ lower.T
    done = torch.zeros(20, dtype=torch.bool)
    for columns, updated in entries:
        free = ~done
        # The errors of the free inputs that minimise e H eᵀ for the errors already made.
        best = -torch.linalg.solve(hessian[free][:, free], hessian[free][:, done] @ result.error[:, done].T).T
        expected = weight.clone()
        expected[:, free] -= best
        torch.testing.assert_close(updated, expected[:, columns], rtol=1e-8, atol=1e-8)
        done[columns] = True
    plain = sweep(weight, factor, LutRounder(lut, 20), block_size=block_size)
    assert torch.equal(plain.codes, result.codes)
