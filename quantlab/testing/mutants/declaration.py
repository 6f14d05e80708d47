"""Defects of the method's class."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from quantlab.api import LayerProblem, QuantizedLayer, QuantizerInfo
from quantlab.testing.mutants.honest import HonestRounding, HonestSweep
from quantlab.testing.mutants.planting import killed_by


@killed_by("info_is_complete")
@dataclass(frozen=True, kw_only=True)
class NamelessPaper(HonestRounding):
    """`paper` was left empty."""

    info: ClassVar[QuantizerInfo] = replace(HonestRounding.info, paper="")


@killed_by("info_is_complete")
@dataclass(frozen=True, kw_only=True)
class CapitalName(HonestRounding):
    """The name is a title rather than an identifier."""

    info: ClassVar[QuantizerInfo] = replace(HonestRounding.info, name="Round To Nearest")


@killed_by("class_obeys_the_rules")
@dataclass(kw_only=True)
class MutableOptions:
    """The dataclass is not frozen, so options may change after they were recorded."""

    range_fraction: float = 1.0
    info: ClassVar[QuantizerInfo] = HonestRounding.info

    def quantize(self, problem: LayerProblem) -> QuantizedLayer:
        """See LayerQuantizer."""
        return HonestRounding(range_fraction=self.range_fraction).quantize(problem)


@killed_by("class_obeys_the_rules")
@dataclass(frozen=True, kw_only=True)
class BudgetInOptions(HonestRounding):
    """`bits` is an option, so that a comparison may give methods different budgets."""

    bits: int = 4


@killed_by("class_obeys_the_rules")
@dataclass(frozen=True, kw_only=True)
class ExtraArgument(HonestRounding):
    """`quantize` takes more than the problem."""

    def quantize(self, problem: LayerProblem, symmetric: bool = False) -> QuantizedLayer:
        """See LayerQuantizer."""
        return super().quantize(problem)


@killed_by("class_obeys_the_rules", "defaults_are_valid", "options_survive_a_recipe")
@dataclass(frozen=True, kw_only=True)
class TupleOption(HonestRounding):
    """An option has a type that no recipe can express."""

    candidates: tuple[float, ...] = (1.0, 0.9)


@killed_by("defaults_are_valid")
@dataclass(frozen=True, kw_only=True)
class NoneForInt(HonestRounding):
    """A default contradicts its annotation."""

    iterations: int = None  # type: ignore[assignment]  # the defect


@killed_by("options_survive_a_recipe")
@dataclass(frozen=True, kw_only=True)
class PercentDamping(HonestSweep):
    """Damping is given in percent and overwritten with the fraction, so reading it back divides it again."""

    damping: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", self.damping / 100)


@killed_by("presets_are_valid")
@dataclass(frozen=True, kw_only=True)
class MisspeltPreset(HonestRounding):
    """A preset sets an option that was renamed."""

    info: ClassVar[QuantizerInfo] = replace(HonestRounding.info, presets={"clipped": {"clip_fraction": 0.9}})


@killed_by("instances_can_be_pickled")
@dataclass(frozen=True, kw_only=True)
class LambdaAttribute(HonestRounding):
    """A derived attribute is a lambda."""

    halve: Callable[[float], float] = field(init=False, compare=False, default=lambda value: value / 2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "halve", lambda value: value / 2)
