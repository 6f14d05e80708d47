"""Sums of outer products in PyTorch, on a machine without the native library."""

import pytest
import torch

from quantlab.solvers.products import add_products
from quantlab_kernels.solver_library import LIBRARY


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    monkeypatch.setattr(LIBRARY, "get", lambda: None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [5, 300])
def test_the_upper_triangle_of_a_symmetric_product_is_complete(features):
    inputs, sums = normal(40, features, seed=1), normal(features, features, seed=2)
    expected = sums.double() + inputs.double().T @ inputs.double()
    add_products(sums, inputs, inputs)
    torch.testing.assert_close(sums.double().triu(), expected.triu(), rtol=1e-5, atol=1e-4)


def test_two_matrices_are_multiplied_in_their_order():
    drift, inputs, sums = normal(40, 3, seed=1), normal(40, 7, seed=2), normal(3, 7, seed=3)
    expected = sums.double() + drift.double().T @ inputs.double()
    add_products(sums, drift, inputs)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)
