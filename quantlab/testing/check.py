"""What a check is: one promise of the plugin contract, and a function that tries to break it."""

import re
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from inspect import cleandoc
from typing import NoReturn

from quantlab.api import LayerQuantizer, QuantizerInfo, Statistic
from quantlab.testing.settings import settings_restored

CheckFunction = Callable[[LayerQuantizer, str], None]
"""Takes the method and a device; raises ContractViolation, SkipTest, or whatever the method itself raises."""


class ContractViolation(AssertionError):
    """A method broke a promise; the message holds the two values and the rule."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One promise of the contract.

    Attributes:
        name: the check's name, a statement that holds for a method that keeps the contract.
        promise: the published wording of the promise.
        run: the function that tries to break it.
        applies_to: whether a method of these capabilities makes the promise.
    """

    name: str
    promise: str
    run: CheckFunction
    applies_to: Callable[[QuantizerInfo], bool]

    def __call__(self, quantizer: LayerQuantizer, device: str = "cpu") -> None:
        """Try to break the promise; raises if that succeeds."""
        with settings_restored():
            self.run(quantizer, device)


def contract_check(applies_to: Callable[[QuantizerInfo], bool] = lambda info: True) -> Callable[[CheckFunction], Check]:
    """Make a check of a function: its name is the check's name, its docstring the promise."""

    def build(function: CheckFunction) -> Check:
        promise = cleandoc(function.__doc__ or "")
        return Check(name=function.__name__, promise=promise, run=function, applies_to=applies_to)

    return build


def needs(statistic: Statistic) -> Callable[[QuantizerInfo], bool]:
    """For `applies_to`: whether a method asks for a statistic."""
    return lambda info: statistic in info.needs


def require(condition: bool, message: str) -> None:
    """Raise ContractViolation unless the condition holds; unlike `assert`, also under `python -O`."""
    if not condition:
        raise ContractViolation(message)


def require_refusal(call: Callable[[], object], request: str, mentions: str) -> None:
    """Require that a call raises ValueError with a message that mentions, as a word, what is refused."""
    rule = f"{request}: expected a ValueError that mentions {mentions!r}"
    try:
        call()
    except ValueError as error:
        require(re.search(rf"\b{re.escape(mentions)}\b", str(error)) is not None, f"{rule}, got {error}")
    else:
        raise ContractViolation(f"{rule}, got an answer")


def skip(reason: str) -> NoReturn:
    """Leave the check: the promise turns out to be vacuous. pytest counts it as a skipped test."""
    raise unittest.SkipTest(reason)
