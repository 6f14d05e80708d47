"""Where defective methods are planted, together with the checks that must find them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from quantlab.api import LayerQuantizer

Method = TypeVar("Method", bound=type)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A method with one planted defect.

    Attributes:
        quantizer: the defective method; its class says what the defect is.
        killed_by: names of exactly the checks that must fail.
    """

    quantizer: LayerQuantizer
    killed_by: frozenset[str]

    @property
    def name(self) -> str:
        """The name of the method's class."""
        return type(self.quantizer).__name__


MUTANTS: list[Mutant] = []


def killed_by(*checks: str, **options: object) -> Callable[[Method], Method]:
    """Plant a defective method, constructed with `options`, that exactly these checks must find."""

    def plant(method_class: Method) -> Method:
        MUTANTS.append(Mutant(quantizer=method_class(**options), killed_by=frozenset(checks)))
        return method_class

    return plant
