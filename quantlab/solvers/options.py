"""Checks of option values that several methods make; a frozen dataclass calls them when it is constructed."""

import math
from typing import Any, get_args


def check_choice(option: str, value: str, choices: Any) -> None:
    """Refuse a value that is not among the choices of a Literal type.

    Raises:
        ValueError: naming the option, its value and the choices.
    """
    if value not in get_args(choices):
        raise ValueError(f"{option}={value!r} must be one of {', '.join(get_args(choices))}")


def check_at_least_one(option: str, value: int) -> None:
    """Refuse a count below one.

    Raises:
        ValueError: naming the option and its value.
    """
    if value < 1:
        raise ValueError(f"{option}={value} must be at least 1")


def check_not_negative(option: str, value: int) -> None:
    """Refuse a count below zero.

    Raises:
        ValueError: naming the option and its value.
    """
    if value < 0:
        raise ValueError(f"{option}={value} must not be negative")


def check_finite_and_not_negative(option: str, value: float) -> None:
    """Refuse a number that is negative, infinite or not a number.

    Raises:
        ValueError: naming the option and its value.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{option}={value} must be finite and not negative")


def check_fraction(option: str, value: float) -> None:
    """Refuse a share that is not between 0 and 1.

    Raises:
        ValueError: naming the option and its value.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{option}={value} must be between 0 and 1")
