from dataclasses import dataclass

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem
from quantlab_kernels import solver


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A float64 layer with correlated inputs of unequal strength, as activations of language models have."""

    weight: torch.Tensor
    inputs: torch.Tensor

    @property
    def hessian(self):
        return self.inputs.T @ self.inputs / len(self.inputs)

    def problem(self, bits, group_size=None, dtype=torch.float64):
        return LayerProblem(
            name="layer",
            weight=self.weight.to(dtype),
            spec=CodebookSpec(bits=bits, group_size=group_size),
            statistics=InputStatistics(hessian=self.hessian.to(dtype), num_tokens=len(self.inputs)),
        )


@pytest.fixture(params=["native", "reference"])
def kernels(request, monkeypatch):
    """Runs a test in both ways in which single precision is computed on the CPU; double precision knows only one."""
    monkeypatch.setenv("QUANTLAB_KERNELS", request.param)
    if request.param == "native" and not solver.usable(torch.zeros(1)):
        pytest.skip("no native library on this machine")


@pytest.fixture
def make_layer():
    def make(seed=0, out_features=24, in_features=48, tokens=None):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mixing = normal(in_features, in_features) / in_features**0.5
        strength = (0.7 * normal(in_features)).exp()
        inputs = (normal(tokens or 4 * in_features, in_features) @ mixing + 0.3) * strength
        return Layer(weight=normal(out_features, in_features), inputs=inputs)

    return make
