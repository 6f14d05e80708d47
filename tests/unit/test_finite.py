"""One pass over the numbers finds what torch.isfinite finds."""

import pytest
import torch

from quantlab.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_one_bad_value_is_found_wherever_it_is(dtype, value, count):
    numbers = torch.full((count, 2), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(numbers)
    for row in {0, count // 2, count - 1}:
        bad = numbers.clone()
        bad[row, 1] = value
        assert not all_finite(bad)
        assert not all_finite(bad.T)


def test_nothing_is_finite():
    assert all_finite(torch.empty(0, 4))
