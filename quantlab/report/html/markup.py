"""HTML that cannot be broken by its content: whatever is not `Html` already is escaped."""

import html
from collections.abc import Iterable

_VOID = {"br", "meta", "hr"}


class Html(str):
    """Markup, to be taken as it is. Only this module and trusted package files make it from plain strings."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | int | bool | None) -> Html:
    """One element.

    Args:
        name: of the element.
        children: `Html` as it is, any other text escaped; None is left out.
        attributes: underscores stand for dashes, and one at the end is dropped (`class_`); None and False are left
            out, True means an attribute without a value.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        parts.append(f" {attribute}" if value is True else f' {attribute}="{escape(str(value))}"')
    parts.append(">")
    if name not in _VOID:
        parts += [join(children), f"</{name}>"]
    return Html("".join(parts))


def join(children: Iterable[str | None], separator: str = "") -> Html:
    """Several pieces in a row, each escaped unless it is `Html`; None is left out."""
    return Html(separator.join(escape(child) for child in children if child is not None))


def escape(text: str) -> Html:
    """Text that a browser shows as it is; `Html` is returned unchanged."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text)))


def printable(text: str) -> str:
    """The text with control, direction-changing and unpaired surrogate characters made visible."""
    return "".join(character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
                   for character in text)  # fmt: skip


def breakable(text: str) -> Html:
    """A long name that may be wrapped behind its dots, slashes, underscores and dashes."""
    wrapped = escape(text)
    for mark in (".", "/", "_", "-"):
        wrapped = Html(wrapped.replace(mark, f"{mark}<wbr>"))
    return wrapped
