from dataclasses import replace

import pytest
import torch

from quantlab.api import (
    CodebookSpec,
    InputStatistics,
    LayerProblem,
    Lut,
    QuantizedLayer,
    QuantizerInfo,
    Statistic,
)
from quantlab.solvers.request import check_request, needing, with_loss, working_dtype

INFO = QuantizerInfo(name="some", summary="", paper="", bits=frozenset({3, 4}))


def problem(**spec):
    return LayerProblem(name="block.0.up", weight=torch.ones(2, 4), spec=CodebookSpec(**spec))


def test_supported_requests_pass():
    check_request(problem(bits=4), INFO)


def test_unsupported_bits_are_refused_naming_layer_method_and_choices():
    with pytest.raises(ValueError, match=r"block\.0\.up: some does not support bits=5; choose from 3, 4"):
        check_request(problem(bits=5), INFO)


def test_unsupported_groups_are_refused_naming_the_size():
    with pytest.raises(ValueError, match=r"block\.0\.up: some .* group_size=2"):
        check_request(problem(bits=4, group_size=2), INFO)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float64, torch.float64), torch.float64),
        ((torch.float64, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float32),
        ((torch.float16,), torch.float32),
    ],
)
def test_arithmetic_is_double_only_if_every_operand_is(dtypes, expected):
    assert working_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == expected


def test_loss_is_added_to_the_other_diagnostics():
    statistics = InputStatistics(hessian=torch.diag(torch.tensor([1.0, 2.0])), num_tokens=1)
    layer = LayerProblem(name="l", weight=torch.ones(3, 2), spec=CodebookSpec(bits=2), statistics=statistics)
    answer = QuantizedLayer(codes=torch.zeros(3, 2, dtype=torch.uint8), codebook=Lut(values=torch.zeros(3, 1, 4)))
    assert with_loss(answer, layer, damping=0.5).diagnostics == {"loss": 9.0, "damping": 0.5}


def test_capabilities_with_hessian_differ_in_nothing_else():
    informed = needing(INFO, Statistic.HESSIAN)
    assert informed.needs == {Statistic.HESSIAN}
    assert replace(informed, needs=frozenset()) == INFO
    assert INFO.needs == frozenset()
