"""Run the contract's checks on a method: for the command line and for pytest."""

import traceback
import unittest
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantlab.api import LayerQuantizer, QuantizerInfo
from quantlab.errors import PluginError, did_you_mean
from quantlab.testing.check import Check, ContractViolation
from quantlab.testing.checks import CHECKS

if TYPE_CHECKING:
    import pytest

NONE_EXPECTED: Mapping[str, Any] = MappingProxyType({})


class Status(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    EXPECTED_FAILURE = "expected failure"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        name: the check's name.
        promise: what the contract promises there.
        status: how the check ended.
        message: why it failed or was skipped; empty if it passed.
    """

    name: str
    promise: str
    status: Status
    message: str = ""


def check_quantizer(
    quantizer: LayerQuantizer, *, expected_failures: Mapping[str, str] = NONE_EXPECTED, device: str = "cpu"
) -> list[CheckResult]:
    """Run every check of the contract on one method.

    Which checks apply is decided by the capabilities in the method's `info`; the others are reported as skipped.

    Args:
        quantizer: the method, options set.
        expected_failures: check name to reason. An expected failure that passes counts as failed, so that the
            list cannot outlive its reasons.
        device: where the problems are posed.

    Returns:
        One result per check; the method keeps the contract if none has status FAILED.

    Raises:
        PluginError: the method has no `info`, or `expected_failures` names a check that does not exist or does not
            apply.
    """
    _require_info(quantizer)
    _require_applicable(quantizer, expected_failures)
    return [_run(check, quantizer, expected_failures.get(check.name), device) for check in CHECKS.values()]


def parametrize_with_checks(
    quantizers: Sequence[LayerQuantizer],
    *,
    expected_failures: Mapping[str, Mapping[str, str]] = NONE_EXPECTED,
) -> "pytest.MarkDecorator":
    """A decorator that makes one pytest case of each method and applicable check.

        @parametrize_with_checks([MyQuantizer(), MyQuantizer(iterations=1)])
        def test_contract(quantizer, check):
            check(quantizer)

    Args:
        quantizers: methods, options set.
        expected_failures: method name to check name to reason; the cases become strict xfails.

    Raises:
        PluginError: as for `check_quantizer`.
    """
    import pytest

    cases = []
    for quantizer in quantizers:
        _require_info(quantizer)
        expected = expected_failures.get(quantizer.info.name, NONE_EXPECTED)
        _require_applicable(quantizer, expected)
        for check in CHECKS.values():
            if check.applies_to(quantizer.info):
                marks = [pytest.mark.xfail(strict=True, reason=expected[check.name])] if check.name in expected else []
                cases.append(pytest.param(quantizer, check, marks=marks, id=f"{quantizer!r}-{check.name}"))
    return pytest.mark.parametrize(("quantizer", "check"), cases)


def _run(check: Check, quantizer: LayerQuantizer, expected_failure: str | None, device: str) -> CheckResult:
    def result(status: Status, message: str = "") -> CheckResult:
        return CheckResult(name=check.name, promise=check.promise, status=status, message=message)

    if not check.applies_to(quantizer.info):
        return result(Status.SKIPPED, "does not apply to the method's capabilities")
    try:
        check(quantizer, device)
    except unittest.SkipTest as reason:
        return result(Status.SKIPPED, str(reason))
    except Exception as error:  # the method under test may raise anything
        failed = Status.FAILED if expected_failure is None else Status.EXPECTED_FAILURE
        return result(failed, _explain(error))
    if expected_failure is not None:
        return result(Status.FAILED, f"passes, but was expected to fail: {expected_failure}")
    return result(Status.PASSED)


def _explain(error: Exception) -> str:
    if isinstance(error, ContractViolation):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"


def _require_info(quantizer: LayerQuantizer) -> None:
    info: Any = getattr(quantizer, "info", None)
    if isinstance(quantizer, type) or not isinstance(info, QuantizerInfo):
        raise PluginError(f"{quantizer!r} cannot be checked: expected an instance with an `info: QuantizerInfo`")


def _require_applicable(quantizer: LayerQuantizer, expected_failures: Mapping[str, str]) -> None:
    for name in expected_failures:
        if name not in CHECKS:
            raise PluginError(f"expected_failures names {name!r}, which is not a check{did_you_mean(name, CHECKS)}")
        if not CHECKS[name].applies_to(quantizer.info):
            raise PluginError(f"expected_failures names {name!r}, which does not apply to {quantizer.info.name!r}")
