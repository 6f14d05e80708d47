"""Promises about the method's class: what it declares, and how it is constructed."""

import dataclasses
import json
import pickle
import re

from quantlab.api import MAX_BITS, MIN_BITS, LayerQuantizer, Statistic
from quantlab.registry import class_violations, option_errors
from quantlab.testing.check import contract_check, require


@contract_check()
def info_is_complete(quantizer: LayerQuantizer, device: str) -> None:
    """`info` has a lower-case name, a one-line summary, a paper, and bits and needs that exist."""
    info = quantizer.info
    require(re.fullmatch(r"[a-z][a-z0-9_]*", info.name) is not None, f"name {info.name!r} is no lower-case identifier")
    for label, text in {"summary": info.summary, "paper": info.paper}.items():
        require(len(text.strip().splitlines()) == 1, f"{label} {text!r} must be one line of text")
    widths = set(range(MIN_BITS, MAX_BITS + 1))
    require(bool(info.bits) and info.bits <= widths, f"bits {sorted(info.bits)} must be some of {sorted(widths)}")
    require(all(isinstance(need, Statistic) for need in info.needs), f"needs {info.needs} must be Statistic members")


@contract_check()
def class_obeys_the_rules(quantizer: LayerQuantizer, device: str) -> None:
    """The class is a frozen dataclass with `quantize(self, problem)`; every option has a default and a recipe type."""
    violations = class_violations(type(quantizer))
    require(not violations, "; ".join(violations))


@contract_check()
def defaults_are_valid(quantizer: LayerQuantizer, device: str) -> None:
    """The method can be constructed without options, and each default fits the option's own annotation."""
    default = type(quantizer)()
    errors = option_errors(type(quantizer), _options(default))
    require(not errors, f"defaults do not fit their annotations: {errors}")


@contract_check()
def options_survive_a_recipe(quantizer: LayerQuantizer, device: str) -> None:
    """Options written to a recipe or a manifest and read back give an equal method: none is changed on construction."""
    options = json.loads(json.dumps(_options(quantizer), allow_nan=False))
    restored = type(quantizer)(**options)
    require(restored == quantizer, f"{restored} was read back where {quantizer} was written")


@contract_check()
def presets_are_valid(quantizer: LayerQuantizer, device: str) -> None:
    """Every preset names existing options, with values that the method accepts."""
    for name, values in quantizer.info.presets.items():
        errors = option_errors(type(quantizer), values)
        require(not errors, f"preset {name!r}: {errors}")
        type(quantizer)(**values)


@contract_check()
def instances_can_be_pickled(quantizer: LayerQuantizer, device: str) -> None:
    """A method can be sent to another process and arrives equal."""
    restored = pickle.loads(pickle.dumps(quantizer))  # noqa: S301  # its own dump
    require(restored == quantizer, f"{restored} arrived where {quantizer} was sent")


def _options(quantizer: LayerQuantizer) -> dict[str, object]:
    fields = [field for field in dataclasses.fields(type(quantizer)) if field.init]  # type: ignore[arg-type]  # see class_obeys_the_rules
    return {field.name: getattr(quantizer, field.name) for field in fields}
