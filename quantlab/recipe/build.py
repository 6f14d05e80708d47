"""Document nodes to recipe dataclasses; every mistake is collected, none stops the reading."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from quantlab.errors import did_you_mean
from quantlab.recipe.document import Node
from quantlab.recipe.problems import Problem
from quantlab.recipe.schema import Recipe

DEFAULT_ORIGIN = "default"

_INVALID = object()
"""Stands for a value whose problem has been noted."""

_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

Section = TypeVar("Section")


class RecipeBuilder:
    """Builds a recipe from a document.

    Attributes:
        problems: everything that is wrong; the recipe is unusable unless this stays empty.
        origins: where every value came from, by its path such as "method.bits".
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.origins: dict[str, str] = {}

    def build(self, root: Node) -> Recipe | None:
        """The recipe of a document, or None if anything is wrong with it."""
        recipe = self._section(Recipe, root, "")
        return None if self.problems else recipe

    def _section(self, section: type[Section], node: Node, path: str) -> Section | None:
        if not isinstance(node.value, dict):
            name = path.removesuffix(".")
            what = f"{name} must be a section with keys" if name else "a recipe must be a mapping of sections"
            self._note(node, f"{what}, not {_show(node.value)}")
            return None
        hints = typing.get_type_hints(section)
        fields = dataclasses.fields(typing.cast(Any, section))
        keys = {field.name: field for field in fields if not field.metadata.get("collects_rest")}
        rest = {key: child for key, child in node.value.items() if key not in keys}
        values: dict[str, object] = {}
        for key, field in keys.items():
            if key not in node.value and _is_required(field):
                matches = difflib.get_close_matches(key, rest, n=1)
                guess = f"; or is `{matches[0]}` meant to be it?" if matches else ""
                self._note(node, f"{path}{key} is missing; {field.metadata['needed']}{guess}")
                values[key] = _INVALID
            else:
                values[key] = self._field(field, hints[key], node.value.get(key), node, path)
        collector = next((field.name for field in fields if field.name not in keys), None)
        if collector is not None:
            values[collector] = self._options(rest, path)
        else:
            self._note_unknown(rest, list(keys), path)
        return None if _INVALID in values.values() else section(**values)

    def _field(self, field: "dataclasses.Field[Any]", hint: Any, child: Node | None, parent: Node, path: str) -> object:
        where = path + field.name
        if dataclasses.is_dataclass(hint):
            return self._value(child or Node({}, parent.origin), hint, where, field.metadata)
        if child is None:
            self.origins[where] = DEFAULT_ORIGIN
            return field.default
        self.origins[where] = child.origin
        return self._value(child, hint, where, field.metadata)

    def _value(self, node: Node, hint: Any, where: str, rules: Mapping[str, Any]) -> object:
        if dataclasses.is_dataclass(hint):
            section = self._section(typing.cast("type[Any]", hint), node, f"{where}.")
            return _INVALID if section is None else section
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            if node.value is None:
                return None
            return self._value(node, arguments[0], where, rules)
        if origin is tuple:
            return self._list(node, arguments[0], where, rules)
        error = _type_error(node.value, hint) or _rule_error(node.value, rules)
        if error is not None:
            self._note(node, f"{where} {error}")
            return _INVALID
        return float(typing.cast(float, node.value)) if hint is float else node.value  # a whole number is a number, too

    def _list(self, node: Node, hint: Any, where: str, rules: Mapping[str, Any]) -> object:
        if not isinstance(node.value, list):
            self._note(node, f"{where} must be a list, not {_show(node.value)}; write [{_show(node.value)}]")
            return _INVALID
        items = [self._value(item, hint, f"{where}[{index}]", rules) for index, item in enumerate(node.value)]
        for index, item in enumerate(items):
            if item is not _INVALID and item in items[:index]:
                self._note(node.value[index], f"{where} lists {_show(item)} twice; remove one")
        return _INVALID if _INVALID in items else tuple(items)

    def _options(self, children: Mapping[str, Node], path: str) -> dict[str, object]:
        options: dict[str, object] = {}
        for name, child in children.items():
            if isinstance(child.value, dict | list):
                self._note(child, f"{path}{name} must be a single value, not {_show(child.value)}")
            else:
                options[name] = child.value
                self.origins[path + name] = child.origin
        return options

    def _note_unknown(self, children: Mapping[str, Node], known: list[str], path: str) -> None:
        for name, child in children.items():
            hint = did_you_mean(name, known)
            self._note(child, f"{path}{name} is not a key of recipes{hint or '; known here: ' + ', '.join(known)}")

    def _note(self, node: Node, message: str) -> None:
        self.problems.append(Problem(node.origin, message))


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _type_error(value: object, hint: Any) -> str | None:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return None
        allowed = ", ".join(str(choice) for choice in choices)
        guess = did_you_mean(value, [str(choice) for choice in choices]) if isinstance(value, str) else ""
        return f"is {_show(value)}, but must be {'one of ' if len(choices) > 1 else ''}{allowed}{guess}"
    if type(value) is hint or (hint is float and type(value) is int):  # not isinstance: true is not a number
        return None
    advice = "; put it in quotes" if hint is str and isinstance(value, int | float) else ""
    return f"is {_show(value)}, but must be {_KIND_NAMES[hint]}{advice}"


def _rule_error(value: Any, rules: Mapping[str, Any]) -> str | None:
    minimum, maximum = rules.get("minimum"), rules.get("maximum")
    if minimum is not None and maximum is not None and not minimum <= value <= maximum:
        return f"is {value}, but must be between {minimum} and {maximum}"
    if minimum is not None and value < minimum:
        return f"is {value}, but must be at least {minimum}"
    error: str | None = rules["check"](value) if "check" in rules else None
    return error


def _show(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
