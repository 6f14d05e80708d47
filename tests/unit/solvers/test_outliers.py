import torch

from quantlab.solvers.outliers import as_outliers, largest


def test_the_largest_entries_are_taken_from_every_vector_by_itself():
    strength = torch.tensor([[1.0, 5.0, 3.0, 4.0], [0.0, 1.0, 9.0, 8.0]])
    assert largest(strength, 0.5).tolist() == [[False, True, False, True], [False, False, True, True]]
    assert largest(strength.flatten(), 0.25).nonzero().flatten().tolist() == [6, 7]


def test_none_and_all_can_be_taken():
    strength = torch.zeros(2, 3)
    assert not largest(strength, 0.0).any()
    assert largest(strength, 1.0).all()


def test_outliers_are_the_entries_that_are_not_zero():
    outliers = as_outliers(torch.tensor([[0.0, 2.0], [-1.0, 3.0]], dtype=torch.float64))
    assert outliers.rows.tolist() == [0, 1, 1]
    assert outliers.columns.tolist() == [1, 0, 1]
    assert torch.equal(outliers.values, torch.tensor([2.0, -1.0, 3.0]))
    assert as_outliers(torch.zeros(2, 2)) is None
