import torch

from quantlab.api import Lut
from quantlab.solvers.descent import descend, relax, round_descending
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.sweep import Assignment

ORDER = torch.arange(20).flip(0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setup():
    inputs = normal(60, 20, seed=1)
    weight = normal(7, 20, seed=2)
    lut = Lut(values=normal(7, 1, 4, seed=3).sort(dim=2).values)
    codes = torch.randint(0, 4, weight.shape, generator=torch.Generator().manual_seed(4))
    start = Assignment(codes=codes.to(torch.uint8), error=weight - lut.values[:, 0].gather(1, codes))
    return weight, start, inputs.T @ inputs / 60, lut


class CountingRounder(LutRounder):
    calls = 0

    def __call__(self, column, targets):
        self.calls += 1
        return super().__call__(column, targets)


def test_error_is_the_weight_minus_the_selected_levels():
    weight, start, hessian, lut = setup()
    nearest = LutRounder(lut, 20)
    for result in (
        descend(weight, start, hessian, ORDER, nearest, sweeps=2),
        round_descending(weight, start.error, hessian, ORDER, nearest),
    ):
        assert result.codes.dtype == torch.uint8
        assert torch.equal(result.error, weight - lut.values[:, 0].gather(1, result.codes.long()))


def test_results_are_contiguous_and_operands_are_left_alone():
    weight, start, hessian, lut = setup()
    operands = (weight, start.codes, start.error, hessian)
    copies = [operand.clone() for operand in operands]
    nearest = LutRounder(lut, 20)
    first = descend(weight, start, hessian, ORDER, nearest, sweeps=2)
    second = round_descending(weight, start.error, hessian, ORDER, nearest)
    relaxed = relax(start.error, hessian, ORDER)
    assert all(part.is_contiguous() for part in (first.codes, first.error, second.codes, second.error, relaxed))
    assert all(torch.equal(operand, copy) for operand, copy in zip(operands, copies, strict=True))


def test_no_pass_changes_nothing():
    weight, start, hessian, lut = setup()
    result = descend(weight, start, hessian, ORDER, LutRounder(lut, 20), sweeps=0)
    assert torch.equal(result.codes, start.codes)
    assert torch.equal(result.error, start.error)


def test_passes_end_when_one_changes_nothing():
    weight, start, hessian, lut = setup()
    nearest = CountingRounder(lut, 20)
    converged = descend(weight, start, hessian, ORDER, nearest, sweeps=1000)
    assert nearest.calls < 1000
    nearest.calls = 0
    descend(weight, converged, hessian, ORDER, nearest, sweeps=1000)
    assert nearest.calls == 20
