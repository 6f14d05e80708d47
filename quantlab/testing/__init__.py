"""The plugin contract as a test suite: run it on any method, bundled or not.

    from quantlab.testing import parametrize_with_checks

    @parametrize_with_checks([MyQuantizer()])
    def test_contract(quantizer, check):
        check(quantizer)

`quantlab check my_method` runs the same checks from the command line. Every check kills at least one of the
defective methods in `quantlab.testing.mutants`; a new check enters together with one.
"""

from quantlab.testing.check import Check, ContractViolation
from quantlab.testing.checks import CHECKS
from quantlab.testing.runner import CheckResult, Status, check_quantizer, parametrize_with_checks

__all__ = [
    "CHECKS",
    "Check",
    "CheckResult",
    "ContractViolation",
    "Status",
    "check_quantizer",
    "parametrize_with_checks",
]
