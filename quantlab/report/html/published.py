"""Our figures beside those of the papers, for recipes and models that a paper has figures for."""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
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
from quantlab.report.record import damaged_profile

FIGURES = Path("paper") / "published.yaml"
"""Relative to the folder of the built-in recipes."""

FAMILIES = ("_opt", "_llama")
"""Ends of recipe names that only say which models they are for."""

GENERATED_TOKENS = 1024
"""That every published figure of a generation is about."""

_NOT_RECIPES = {"paper", "metric", "protocol", "sequence_length", "models", "tasks"}


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """One published figure and what it is compared with.

    Attributes:
        paper: where it stands.
        metric: "perplexity", "accuracy" or "generation".
        name: of the text and protocol, of the task, or of what was measured of a generation.
        sequence_length: tokens per window of a perplexity; None for another metric.
        recipe: the recipe's name without a family.
        quantized: figure of the quantized model.
        reference: that of the float model, if the table has it.
    """

    paper: str
    metric: str
    name: str
    sequence_length: int | None
    recipe: str
    quantized: float
    reference: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run has beside a published figure.

    Attributes:
        quantized: figure of the quantized model.
        reference: that of the float model; NaN if it was not measured.
        note: how it was measured.
    """

    quantized: float
    reference: float
    note: str


@dataclass(frozen=True, kw_only=True)
class _Metric:
    """A table of the section: what its rows are called, what is to be said, and how to find our figure."""

    caption: str
    subject: str
    note: str
    measure: Callable[[Run, PublishedFigure], Measured | None]


def published(runs: Sequence[Run]) -> Part | None:
    """The runs for which a paper has a figure that they have measured, too; None if there is none."""
    entries = read_published()
    tables = []
    for name, metric in _METRICS.items():
        figures = ((run, figure) for run in runs for figure in find_published(recipe_of(run), run.model, entries))
        pairs = [
            (run, figure, ours)
            for run, figure in figures
            if figure.metric == name and (ours := metric.measure(run, figure)) is not None
        ]
        if pairs:
            rows = [_row(*pair) for pair in pairs]
            tables += [tag("p", metric.note), table(metric.caption, _columns(metric.subject), rows)]
    return Part(key="published", title="Beside the published figures", content=join(tables)) if tables else None


def read_published(path: Path | None = None) -> list[dict[str, Any]]:
    """The tables of published figures; none if the recipes come without them."""
    if path is None:
        recipes = next(iter(builtin_recipes().values()), None)
        path = FIGURES if recipes is None else recipes.parent / FIGURES
    if not path.is_file():
        return []
    tables: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tables


def find_published(recipe: str, model: str, tables: Sequence[dict[str, Any]]) -> Iterator[PublishedFigure]:
    """The published figures of a recipe on a model.

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
        if alias is None or alias not in entry["models"] or not known:
            continue
        references = _by_name(entry, "float", alias)
        for name, quantized in _by_name(entry, recipe, alias).items():
            yield PublishedFigure(
                paper=entry["paper"],
                metric=entry["metric"],
                name=name,
                sequence_length=entry.get("sequence_length"),
                recipe=recipe,
                quantized=quantized,
                reference=references.get(name),
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


def _by_name(entry: dict[str, Any], recipe: str, model: str) -> dict[str, float]:
    """The figures of one recipe on one model of a table by `PublishedFigure.name`; none if it lacks the recipe."""
    if recipe not in entry:
        return {}
    figures = entry[recipe][entry["models"].index(model)]
    if entry["metric"] == "perplexity":
        return {entry["protocol"]: figures}
    return dict(zip(entry["tasks"], figures, strict=True)) if entry["metric"] == "accuracy" else figures


def _perplexity(run: Run, figure: PublishedFigure) -> Measured | None:
    measured = run.record.perplexity.get(figure.name)
    if measured is None or measured["sequence_length"] != figure.sequence_length:
        return None
    quantized, reference = (value(run, figure.name, model) for model in ("quantized", "float"))
    return Measured(quantized=quantized, reference=reference, note=f"{measured['windows']} windows")


def _accuracy(run: Run, figure: PublishedFigure) -> Measured | None:
    task = run.record.tasks.get(figure.name)
    if task is None or task.get("num_fewshot") or "acc" not in task["quantized"]:
        return None
    quantized, reference = (100 * task[model]["acc"]["value"] for model in ("quantized", "float"))
    return Measured(quantized=quantized, reference=reference, note=f"{task.get('samples')} questions")


def _generation(run: Run, figure: PublishedFigure) -> Measured | None:
    profile = run.record.profile
    if profile is None:
        return None
    try:
        if not profile["device"].startswith("cuda") or profile["new_tokens"] != GENERATED_TOKENS:
            return None
        figures = {name: _of_generation(model, figure.name) for name, model in profile["models"].items()}
        reference = figures.get(run.model, math.nan)  # of another model, if the user compared with one
        return Measured(quantized=[*figures.values()][-1], reference=reference, note=str(profile["device_name"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged_profile(run.folder, error) from error


def _of_generation(model: dict[str, Any], name: str) -> float:
    # The papers' GB are 2**30 bytes: 13.06 is LLaMA-7B in 16 bits, 12.55, and the keys and values of 1024 tokens, 0.5.
    return float(model["cuda_s"] if name == "cuda_s" else model["device_peak_bytes"] / 2**30)


_METRICS = {
    "perplexity": _Metric(
        caption="Perplexity beside the papers'",
        subject="Text",
        note="Perplexities of the same recipe, model, text and window length. Where the two float columns differ, so "
        "do the text, the tokenizer or the weights, and the quantized columns cannot be compared to more digits than "
        "that.",
        measure=_perplexity,
    ),
    "accuracy": _Metric(
        caption="Accuracy beside the papers', in percent",
        subject="Task",
        note="Zero-shot accuracies of the same recipe, model and task, not normalized by the length of the answers. "
        "Fewer questions than the task has, or another version of lm-eval, change the float columns, too.",
        measure=_accuracy,
    ),
    "generation": _Metric(
        caption="Generation beside the papers'",
        subject="Measured",
        note=f"Generation of {GENERATED_TOKENS} tokens, one sequence: seconds of the kernels (cuda_s) and peak memory "
        "in GiB (peak_gb). Our device is named below what was measured, the paper's below the run.",
        measure=_generation,
    ),
}


def _columns(subject: str) -> list[Column]:
    numbers = ("Ours", "Published", "Difference", "Float, ours", "Float, published")
    return [*(Column(title=title, numeric=False) for title in ("Run", subject)), *(Column(title=t) for t in numbers)]


def _row(run: Run, figure: PublishedFigure, ours: Measured) -> list[Cell]:
    difference = ours.quantized - figure.quantized
    return [
        Cell(content=run.label, note=f"{run.model}; {figure.paper}"),
        Cell(content=figure.name, note=ours.note),
        Cell(content=f"{ours.quantized:.2f}", value=ours.quantized),
        Cell(content=f"{figure.quantized:g}", value=figure.quantized),
        Cell(content=f"{difference:+.2f}", value=difference),
        NOTHING if math.isnan(ours.reference) else Cell(content=f"{ours.reference:.2f}", value=ours.reference),
        NOTHING if figure.reference is None else Cell(content=f"{figure.reference:g}", value=figure.reference),
    ]
