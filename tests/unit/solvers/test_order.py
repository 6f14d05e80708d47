import pytest
import torch

from quantlab.solvers.options import check_choice
from quantlab.solvers.order import ColumnOrder, inverse_order, processing_order

HESSIAN = torch.diag(torch.tensor([2.0, 9.0, 2.0, 5.0]))


def test_natural_order_starts_at_either_end():
    assert processing_order(HESSIAN, "natural", backwards=False).tolist() == [0, 1, 2, 3]
    assert processing_order(HESSIAN, "natural", backwards=True).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("backwards", [False, True])
def test_strong_inputs_come_first_and_equals_by_position(backwards):
    assert processing_order(HESSIAN, "hessian_diagonal", backwards=backwards).tolist() == [1, 3, 0, 2]


def test_inverse_order_undoes_an_order():
    values = torch.tensor([4, 8, 15, 16, 23])
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(values[order][inverse_order(order)], values)


def test_unknown_orders_are_refused_naming_the_known_ones():
    check_choice("column_order", "natural", ColumnOrder)
    with pytest.raises(ValueError, match="column_order='random' must be one of natural, hessian_diagonal"):
        check_choice("column_order", "random", ColumnOrder)
