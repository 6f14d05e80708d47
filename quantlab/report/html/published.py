"""Our figures beside those of the papers, for recipes and models that a paper has figures for."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.models import ALIASES
from quantlab.recipe import builtin_recipes
from quantlab.report.html.markup import join, tag
from quantlab.report.html.parts import Part
from quantlab.report.html.runs import Run
from quantlab.report.html.scores import value
from quantlab.report.html.tables import NOTHING, Cell, Column, table

FIGURES = Path("paper") / "published.yaml"
"""Relative to the folder of the built-in recipes."""

FAMILIES = ("_opt", "_llama")
"""Ends of recipe names that only say which models they are for."""

_NOT_RECIPES = {"paper", "metric", "protocol", "sequence_length", "models", "tasks"}


@dataclass(frozen=True, kw_only=True)
class PublishedPerplexity:
    """One published figure and what it is compared with.

    Attributes:
        paper: where it stands.
        protocol: text and protocol.
        sequence_length: tokens per window.
        recipe: the recipe's name without a family.
        quantized: perplexity of the quantized model.
        reference: that of the float model, if the table has it.
    """

    paper: str
    protocol: str
    sequence_length: int
    recipe: str
    quantized: float
    reference: float | None


def published(runs: Sequence[Run]) -> Part | None:
    """The runs for which a paper has a perplexity on the same text; None if there is none."""
    entries = read_published()
    rows = [row for run in runs for row in _rows(run, entries)]
    if not rows:
        return None
    columns = [
        Column(title="Run", numeric=False),
        Column(title="Text", numeric=False),
        Column(title="Ours"),
        Column(title="Published"),
        Column(title="Difference"),
        Column(title="Float, ours"),
        Column(title="Float, published"),
    ]
    note = tag(
        "p",
        "Perplexities of the same recipe, model, text and window length. Where the two float columns differ, so do the "
        "text, the tokenizer or the weights, and the quantized columns cannot be compared to more digits than that.",
    )
    content = join([note, table("Perplexity beside the papers'", columns, rows)])
    return Part(key="published", title="Beside the published figures", content=content)


def read_published(path: Path | None = None) -> list[dict[str, Any]]:
    """The tables of published figures; none if the recipes come without them."""
    if path is None:
        recipes = next(iter(builtin_recipes().values()), None)
        path = FIGURES if recipes is None else recipes.parent / FIGURES
    if not path.is_file():
        return []
    tables: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tables


def find_published(recipe: str, model: str, tables: Sequence[dict[str, Any]]) -> Iterator[PublishedPerplexity]:
    """The published perplexities of a recipe on a model.

    Args:
        recipe: its name; an end that names a family does not count.
        model: an alias, or the hub id that one stands for.
        tables: see `read_published`.
    """
    for family in FAMILIES:
        recipe = recipe.removesuffix(family)
    alias = next((name for name, entry in ALIASES.items() if model in (name, entry.hub_id)), None)
    for entry in tables:
        known = recipe in entry.keys() - _NOT_RECIPES - {"float"}
        if entry["metric"] != "perplexity" or alias not in entry["models"] or not known:
            continue
        column = entry["models"].index(alias)
        yield PublishedPerplexity(
            paper=entry["paper"],
            protocol=entry["protocol"],
            sequence_length=entry["sequence_length"],
            recipe=recipe,
            quantized=entry[recipe][column],
            reference=entry["float"][column] if "float" in entry else None,
        )


def recipe_of(run: Run) -> str:
    """The name of the paper's recipe in the command of a run; empty if it names none."""
    try:
        words = shlex.split(run.manifest["command"])
    except ValueError:
        return ""
    if words[:2] != ["quantlab", "run"] or len(words) < 3 or Path(words[2]).parent.name != "paper":
        return ""
    return Path(words[2]).stem


def _rows(run: Run, tables: Sequence[dict[str, Any]]) -> Iterator[list[Cell]]:
    for figure in find_published(recipe_of(run), run.model, tables):
        measured = run.record.perplexity.get(figure.protocol)
        if measured is None or measured["sequence_length"] != figure.sequence_length:
            continue
        ours, reference = (value(run, figure.protocol, name) for name in ("quantized", "float"))
        difference = ours - figure.quantized
        yield [
            Cell(content=run.label, note=f"{run.model}; {figure.paper}"),
            Cell(content=figure.protocol, note=f"{measured['windows']} windows"),
            Cell(content=f"{ours:.2f}", value=ours),
            Cell(content=f"{figure.quantized:g}", value=figure.quantized),
            Cell(content=f"{difference:+.2f}", value=difference),
            Cell(content=f"{reference:.2f}", value=reference),
            NOTHING if figure.reference is None else Cell(content=f"{figure.reference:g}", value=figure.reference),
        ]
