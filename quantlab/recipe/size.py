"""Sizes of memory as text, such as "12GiB"."""

import re

_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def parse_size(text: str) -> int:
    """Bytes.

    Raises:
        ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size")
    return int(float(match[1]) * _UNITS[match[2]])


def size_error(text: str) -> str | None:
    """What is wrong with a size in a recipe."""
    try:
        parse_size(text)
    except ValueError:
        return f"is {text!r}, but must be a number with one of the units {', '.join(_UNITS)}, for example 12GiB"
    return None
