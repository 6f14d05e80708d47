"""Recipes back to YAML; what is written here reads back as the same recipe."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from quantlab.recipe.document import resolve_scalar
from quantlab.recipe.schema import Recipe

# Text that YAML cannot mistake for anything else when it stands without quotes, also inside [a, b].
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./~][\w./:~@+-]*(?<!:)", re.ASCII)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every value written out."""
    return "".join(f"{line}\n" for _, line in _lines(recipe))


def annotate_recipe(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """The recipe as YAML, each value with a trailing comment that says where it came from.

    Args:
        recipe: the recipe.
        origins: by path such as "method.bits".
    """
    lines = list(_lines(recipe))
    width = max(len(line) for path, line in lines if path in origins)
    return "".join(f"{line:<{width}}  # {origins[path]}\n" if path in origins else f"{line}\n" for path, line in lines)


def _lines(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for name, value in _items(recipe):
        if _is_section(value):
            yield name, f"{name}:"
            yield from ((f"{name}.{key}", f"  {key}: {_format(item)}") for key, item in _items(value))
        elif isinstance(value, tuple) and value and _is_section(value[0]):
            yield name, f"{name}:"
            for index, section in enumerate(value):
                for position, (key, item) in enumerate(_items(section)):
                    yield f"{name}[{index}].{key}", f"  {'- ' if position == 0 else '  '}{key}: {_format(item)}"
        else:
            yield name, f"{name}: {_format(value)}"


def _is_section(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _items(section: object) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(section):  # type: ignore[arg-type]  # sections are dataclass instances
        value = getattr(section, field.name)
        if field.metadata.get("collects_rest"):
            yield from value.items()
        else:
            yield field.name, value


def _format(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_format(item) for item in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        is_plain = _PLAIN_TEXT.fullmatch(value) and isinstance(resolve_scalar(value), str)
        return value if is_plain else _quote(value)
    return repr(value)


def _quote(text: str) -> str:
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'
