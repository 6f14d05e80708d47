"""What is wrong with a recipe: collected first, reported all at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.errors import RecipeError


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        origin: where it was written, "ganq_w4.yaml:7" or "--set".
        message: what is wrong and what to do.
    """

    origin: str
    message: str


def recipe_error(source: object, problems: Sequence[Problem]) -> RecipeError:
    """The problems of one recipe as one error."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"  {problem.origin}: {problem.message}" for problem in sorted(problems, key=_line)]
    return RecipeError("\n".join([f"recipe {source} has {count}", *lines]))


def _line(problem: Problem) -> float:
    """The order of reading: lines of the file first, then overrides."""
    line = problem.origin.rpartition(":")[2]
    return int(line) if line.isdecimal() else math.inf
