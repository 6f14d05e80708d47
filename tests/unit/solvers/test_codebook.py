import pytest
import torch

from quantlab.errors import NumericalError
from quantlab.solvers.codebook import refit_codebook


def test_crossed_levels_are_sorted_and_relabelled():
    # With uncorrelated inputs every level moves to the mean of its weights; here these are in the other order.
    weight = torch.tensor([[5.0, 7.0, 1.0, 3.0]])
    codes = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    levels = torch.tensor([[0.0, 1.0]])
    result = refit_codebook(levels, codes, weight - levels.gather(1, codes.long()), torch.eye(4))
    torch.testing.assert_close(result.levels, torch.tensor([[2.0, 6.0]]))
    assert result.codes.tolist() == [[1, 1, 0, 0]]
    assert result.codes.dtype == torch.uint8
    torch.testing.assert_close(result.dequantize(), torch.tensor([[6.0, 6.0, 2.0, 2.0]]))


def test_a_silent_layer_keeps_its_levels():
    levels = torch.tensor([[0.0, 1.0]])
    codes = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    result = refit_codebook(levels, codes, torch.ones(1, 3), torch.zeros(3, 3))
    assert torch.equal(result.levels, levels)


def test_perfectly_correlated_inputs_keep_levels_finite():
    levels = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    codes = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.uint8)
    hessian = torch.ones(3, 3)
    error = torch.tensor([[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]])
    result = refit_codebook(levels, codes, error, hessian)
    assert torch.isfinite(result.levels).all()
    # Row 0 has the output error 1.75 for inputs of 1; row 1 has none and must not move with its neighbour.
    weight = levels.gather(1, codes.long()) + error
    assert (weight - result.dequantize())[0].sum().abs() < 1e-4
    assert torch.equal(result.levels[1], levels[1])


def test_a_row_that_needs_a_stronger_ridge_does_not_change_others():
    # Indefinite by 5e-5, which only rows feel that tell the two inputs apart.
    hessian = torch.tensor([[1.0, 1.00005], [1.00005, 1.0]])
    codes = torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8)
    levels, error = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.25], [0.3, 0.1]])
    together = refit_codebook(levels, codes, error, hessian)
    alone = refit_codebook(levels[1:], codes[1:], error[1:], hessian)
    assert torch.isfinite(together.levels).all()
    assert torch.equal(together.levels[1:], alone.levels)


def test_an_indefinite_hessian_is_an_error():
    hessian = torch.tensor([[1.0, 50.0], [50.0, 1.0]])
    codes = torch.tensor([[0, 1]], dtype=torch.uint8)
    with pytest.raises(NumericalError, match="1 of 1 rows"):
        refit_codebook(torch.tensor([[0.0, 1.0]]), codes, torch.ones(1, 2), hessian)
