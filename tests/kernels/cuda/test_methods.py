"""Every method on CUDA: as good as on the CPU, by kernels throughout, whatever the size of the layer.

Without a device, the kernels are executed on the host.
"""

import pytest
import torch

from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, layer_loss
from quantlab.registry import load
from quantlab_kernels import solver_cuda_library, solver_library

FAST, ITERATIVE = ("rtn", "kmeans", "gptq", "leanquant"), ("quantease", "lnq", "ganq")
# Codes that rounding decides change what follows, and with it the losses of single rows; their sum less.
TOLERANCE = 0.03


def problem(device, group_size):
    rows, inputs = 36, 64
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    statistics = InputStatistics(
        hessian=(data.T @ data / len(data)).to(device),
        num_tokens=len(data),
        fisher=torch.rand(rows, inputs, generator=generator).to(device),
    )
    weight = torch.randn(rows, inputs, generator=generator).to(device)
    spec = CodebookSpec(bits=3, group_size=group_size)
    return LayerProblem(name="layer", weight=weight, spec=spec, statistics=statistics, seed=0)


def loss_of(method, layer_problem):
    layer = method.quantize(layer_problem)
    return layer_loss(layer_problem.weight, layer.dequantize(), layer_problem.require_hessian()).sum().item()


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ITERATIVE)])
def test_method_is_as_good_as_on_the_cpu(name, group_size, device, kernels_run, monkeypatch):
    method = load(name)()
    if group_size is not None and not method.info.supports_groups:
        pytest.skip(f"{name} has no groups")
    found = loss_of(method, problem(device, group_size))
    assert bool(kernels_run) == (name != "rtn")
    for library in (solver_library, solver_cuda_library):
        monkeypatch.setattr(library.LIBRARY, "get", lambda: None)
    expected = loss_of(method, problem("cpu", group_size))
    assert abs(found - expected) <= TOLERANCE * expected
