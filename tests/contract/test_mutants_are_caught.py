"""The checks can fail: each finds planted defects, and none finds fault with an honest method."""

import pytest

from quantlab.testing import CHECKS, Status, check_quantizer
from quantlab.testing.mutants import (
    MUTANTS,
    HonestFisher,
    HonestOutliers,
    HonestPreparation,
    HonestRounding,
    HonestSweep,
)

HONEST = (HonestRounding(), HonestOutliers(), HonestSweep(), HonestPreparation(), HonestFisher())
FEW = 3


def names_with(status, quantizer):
    return {result.name for result in check_quantizer(quantizer) if result.status is status}


@pytest.mark.parametrize("quantizer", HONEST, ids=repr)
def test_honest_method_passes_every_check(quantizer):
    failures = [result for result in check_quantizer(quantizer) if result.status is Status.FAILED]
    assert failures == []


def test_every_check_is_exercised_by_an_honest_method():
    passed = set().union(*(names_with(Status.PASSED, quantizer) for quantizer in HONEST))
    assert passed == set(CHECKS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught_by_exactly_the_checks_that_watch_for_its_defect(mutant):
    assert names_with(Status.FAILED, mutant.quantizer) == mutant.killed_by


@pytest.mark.parametrize("name", CHECKS)
def test_check_catches_a_mutant_that_few_others_catch(name):
    catches = [mutant for mutant in MUTANTS if name in mutant.killed_by]
    assert any(len(mutant.killed_by) <= FEW for mutant in catches)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_expects_checks_that_exist(mutant):
    assert mutant.killed_by
    assert mutant.killed_by <= set(CHECKS)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check_publishes_a_promise(check):
    assert check.promise.endswith(".")
    assert len(check.promise.splitlines()) == 1
