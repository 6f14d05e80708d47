"""How checks are selected, run, expected to fail, and reported."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from quantlab.errors import PluginError
from quantlab.testing import CHECKS, Status, check_quantizer, parametrize_with_checks
from quantlab.testing.mutants import HonestRounding, HonestSweep
from quantlab.testing.mutants.purity import EnablesTf32
from quantlab.testing.mutants.result import NanDiagnostic
from quantlab.testing.mutants.robustness import UnguardedRange


@dataclass(frozen=True, kw_only=True)
class Crashing(HonestRounding):
    def quantize(self, problem):
        raise RuntimeError(f"{problem.name}: no")


def result_of(name, results):
    return next(result for result in results if result.name == name)


def test_every_check_has_one_result_in_order():
    assert [result.name for result in check_quantizer(HonestRounding())] == list(CHECKS)


def test_checks_of_capabilities_a_method_lacks_are_skipped():
    results = check_quantizer(HonestRounding())
    assert result_of("hessian_scale_does_not_matter", results).status is Status.SKIPPED
    assert result_of("groups_are_refused", results).status is Status.SKIPPED
    assert result_of("groups_have_their_own_codebooks", results).status is Status.PASSED


def test_vacuous_promises_are_skipped_with_the_reason():
    result = result_of("outliers_are_additive", check_quantizer(HonestRounding()))
    assert (result.status, result.message) == (Status.SKIPPED, "the method returns no outliers")


def test_violation_is_reported_with_its_values():
    result = result_of("diagnostics_are_finite_numbers", check_quantizer(NanDiagnostic()))
    assert result.status is Status.FAILED
    assert result.message == "diagnostic 'clipped_fraction' is nan, expected a finite int or float"
    assert result.promise == "Diagnostics map names to finite Python numbers, ready for a manifest."


def test_exception_of_the_method_is_reported_with_its_place():
    result = result_of("codes_are_valid", check_quantizer(Crashing()))
    assert result.status is Status.FAILED
    assert result.message.startswith("RuntimeError: layer0: no (")
    assert "test_runner.py:" in result.message


def test_expected_failure_does_not_count_as_failed():
    results = check_quantizer(UnguardedRange(), expected_failures={"constant_rows_are_reproduced": "known"})
    assert result_of("constant_rows_are_reproduced", results).status is Status.EXPECTED_FAILURE
    assert Status.FAILED not in {result.status for result in results}


def test_expected_failure_that_passes_counts_as_failed():
    results = check_quantizer(HonestRounding(), expected_failures={"constant_rows_are_reproduced": "ticket 7"})
    result = result_of("constant_rows_are_reproduced", results)
    assert (result.status, result.message) == (Status.FAILED, "passes, but was expected to fail: ticket 7")


@pytest.mark.parametrize("run", [check_quantizer, lambda quantizer, **kw: parametrize_with_checks([quantizer], **kw)])
def test_object_without_info_is_refused(run):
    with pytest.raises(PluginError, match="cannot be checked: expected an instance with an `info: QuantizerInfo`"):
        run(object())
    with pytest.raises(PluginError, match="expected an instance"):
        run(HonestRounding)


def test_unknown_expected_failure_is_refused_with_the_nearest_name():
    with pytest.raises(PluginError, match="'codes_are_vald', which is not a check; did you mean codes_are_valid"):
        check_quantizer(HonestRounding(), expected_failures={"codes_are_vald": "?"})


def test_inapplicable_expected_failure_is_refused():
    with pytest.raises(PluginError, match="'groups_are_refused', which does not apply to 'honest_rounding'"):
        check_quantizer(HonestRounding(), expected_failures={"groups_are_refused": "?"})


def test_settings_that_a_method_changes_are_put_back():
    before = torch.get_float32_matmul_precision()
    check_quantizer(EnablesTf32())
    assert torch.get_float32_matmul_precision() == before


def test_parametrize_makes_a_case_of_each_applicable_check():
    names, cases = parametrize_with_checks([HonestRounding(), HonestSweep()]).args
    applicable = [
        (quantizer, check)
        for quantizer in (HonestRounding(), HonestSweep())
        for check in CHECKS.values()
        if check.applies_to(quantizer.info)
    ]
    assert names == ("quantizer", "check")
    assert [tuple(case.values) for case in cases] == applicable


def test_parametrize_makes_strict_xfails_of_expected_failures():
    expected = {"honest_rounding": {"codes_are_valid": "known"}}
    cases = parametrize_with_checks([HonestRounding(), HonestSweep()], expected_failures=expected).args[1]
    marked = [case for case in cases if case.marks]
    assert [(case.values[0], case.values[1].name) for case in marked] == [(HonestRounding(), "codes_are_valid")]
    assert marked[0].marks[0].kwargs == {"strict": True, "reason": "known"}


def test_selection_depends_on_capabilities_rather_than_names():
    @dataclass(frozen=True, kw_only=True)
    class Renamed(HonestRounding):
        info: ClassVar = replace(HonestRounding.info, name="ganq")

    def statuses(quantizer):
        return [result.status for result in check_quantizer(quantizer) if result.name != "instances_can_be_pickled"]

    assert statuses(Renamed()) == statuses(HonestRounding())
