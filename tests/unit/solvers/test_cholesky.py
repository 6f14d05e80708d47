import pytest
import torch

from quantlab.errors import NumericalError
from quantlab.solvers.cholesky import damped_cholesky


def gram(in_features=12, tokens=40, seed=0):
    inputs = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return inputs.T @ inputs / tokens


def damped(hessian, damping):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
def test_factor_reproduces_the_damped_hessian(damping):
    hessian = gram()
    factor = damped_cholesky(hessian, damping)
    assert factor.damping == damping
    assert torch.equal(factor.lower, factor.lower.tril())
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped(hessian, damping), rtol=1e-12, atol=1e-12)


def test_factorisation_is_in_double_precision_and_leaves_the_hessian_alone():
    hessian = gram().float()
    copy = hessian.clone()
    assert damped_cholesky(hessian, 0.01).lower.dtype == torch.float64
    assert torch.equal(hessian, copy)


def test_damping_grows_tenfold_until_the_factorisation_succeeds():
    # Its smallest eigenvalue is -0.0005 of the mean diagonal: 1e-4 is not enough.
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    hessian[0, 1] = hessian[1, 0] = 1.0005
    factor = damped_cholesky(hessian, 1e-6)
    assert factor.damping == pytest.approx(1e-3)
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped(hessian, factor.damping))


def test_singular_hessians_are_factored_even_when_no_damping_is_asked_for():
    hessian = torch.ones(6, 6, dtype=torch.float64)
    factor = damped_cholesky(hessian, 0.0)
    assert 0 < factor.damping <= 1e-6
    assert torch.isfinite(factor.lower).all()


def test_hessians_that_are_not_semi_definite_are_an_error():
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(NumericalError, match="2 x 2 Hessian is not positive definite"):
        damped_cholesky(hessian, 0.01)


def test_dead_inputs_get_the_mean_of_the_others_and_no_coupling():
    hessian = gram()
    dead = torch.tensor([2, 7])
    live = [index for index in range(12) if index not in dead]
    hessian[dead] = 0
    hessian[:, dead] = 0
    lower = damped_cholesky(hessian, 0.01).lower
    product = lower @ lower.T
    mean = hessian.diagonal()[live].mean().item()
    expected = torch.diag(torch.full((2,), 1.01 * mean, dtype=torch.float64))
    torch.testing.assert_close(product[dead][:, dead], expected)
    assert (product[dead][:, live] == 0).all()
    torch.testing.assert_close(product[live][:, live], damped(hessian[live][:, live], 0.01))


def test_a_layer_without_input_has_a_factor():
    assert torch.equal(damped_cholesky(torch.zeros(3, 3), 0.0).lower, torch.eye(3, dtype=torch.float64))


def test_the_order_of_inputs_and_the_shrinkage_are_those_asked_for():
    hessian = gram(in_features=300, tokens=900)
    columns = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    factor = damped_cholesky(hessian, 0.01, columns, shrinkage=0.25)
    expected = 0.75 * hessian
    expected.diagonal().copy_(hessian.diagonal())
    permuted = damped(expected, 0.01)[columns][:, columns]
    torch.testing.assert_close(factor.lower @ factor.lower.T, permuted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor.added, permuted.diagonal() - hessian.diagonal()[columns])


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_damping_is_relative(scale):
    lower = damped_cholesky(gram(), 0.01).lower
    torch.testing.assert_close(damped_cholesky(scale * gram(), 0.01).lower, scale**0.5 * lower, rtol=1e-10, atol=0)
