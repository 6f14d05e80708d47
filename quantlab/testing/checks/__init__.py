"""Every check of the plugin contract, in the order in which they run."""

from quantlab.testing.check import Check
from quantlab.testing.checks import declaration, fisher, numerics, purity, result, robustness

CHECKS: dict[str, Check] = {
    value.name: value
    for module in (declaration, result, purity, numerics, fisher, robustness)
    for value in vars(module).values()
    if isinstance(value, Check)
}
"""Checks by name; a function becomes one by standing in one of these modules under `@contract_check`."""
