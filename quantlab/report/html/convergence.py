"""How the loss fell, for methods that report it after each of their steps."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlab.report.html.markup import Html
from quantlab.report.html.parts import Part, figure, figures
from quantlab.report.html.runs import Layer, Run
from quantlab.report.html.svg import SERIES, axes, color, inline, label, styled

_STEP = re.compile(r"loss_(\d{1,6})")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss of layers that were solved together, after each step of the method.

    Attributes:
        losses: at least two, the first positive.
        ratio: the layers' loss in the end as a multiple of round-to-nearest's; NaN if that is not known.
    """

    losses: tuple[float, ...]
    ratio: float


def convergence(run: Run, prefix: str) -> Part | None:
    """One curve for all layers that were solved together, and the median; None if there is none."""
    shares = [[loss / curve.losses[0] for loss in curve.losses] for curve in curves(run.layers)]
    if not shares:
        return None
    median = _median(shares)
    ends = [share[-1] for share in shares]
    with styled():
        picture, plot = axes(height=2.8)
        for share in shares:
            plot.plot(range(len(share)), share, color=color("soft"), linewidth=1.1)
        plot.plot(range(len(median)), median, color=color("accent"), linewidth=2.2)
        plot.set(xlabel="step of the method", ylabel="loss, share of the first", ylim=(0, None))
        plot.locator_params(axis="x", integer=True)
        description = (
            f"{len(shares)} curves end at {min(ends):.3f} to {max(ends):.3f} of their first loss, "
            f"the median at {median[-1]:.3f}."
        )
        svg = inline(picture, f"{prefix}convergence", "Loss by step", description)
    explanation = (
        "What the method minimises after each of its steps, as a share of the value after the first: a line for every "
        "group of layers that was solved together, and the median."
    )
    return Part(key="convergence", title="Convergence", content=figure("Loss by step", explanation, svg))


def convergence_of_methods(runs: Sequence[Run]) -> Part | None:
    """The medians of several runs side by side, one plot per model and code width; None if fewer than two have any."""
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for run in runs:
        scaled = [
            [curve.ratio * loss / curve.losses[-1] for loss in curve.losses]
            for curve in curves(run.layers)
            if curve.ratio > 0 and curve.losses[-1] > 0
        ]
        if scaled:
            groups.setdefault((run.model, run.manifest["bits"]), {}).setdefault(run.variant, _median(scaled))
    pictures: list[Html] = []
    for (model, bits), own in groups.items():
        if len(own) > 1:
            variants = list(dict.fromkeys(run.variant for run in runs if run.model == model))
            where = f"{bits} bits" if all(run.model == model for run in runs) else f"{bits} bits, {model}"
            pictures.append(_of_methods(own, variants, where, f"convergence-{len(pictures)}"))
    return Part(key="convergence", title="Convergence", content=figures(pictures)) if pictures else None


def curves(layers: Sequence[Layer]) -> list[Curve]:
    """One for every group of layers with the same "loss_0", "loss_1" and so on among their diagnostics."""
    groups: dict[tuple[float, ...], list[float]] = {}
    for layer in layers:
        losses = _losses(layer.diagnostics)
        if len(losses) > 1 and losses[0] > 0:
            groups.setdefault(losses, []).append(layer.ratio)
    return [Curve(losses=losses, ratio=statistics.fmean(ratios)) for losses, ratios in groups.items()]


def _of_methods(medians: Mapping[str, Sequence[float]], variants: Sequence[str], where: str, name: str) -> Html:
    """The medians by variant, each in the colour that it has in the other plots, where `variants` are numbered."""
    title = f"Loss by step, {where}"
    with styled():
        picture, plot = axes(height=3.0)
        for variant, median in medians.items():
            shade = color(f"series-{variants.index(variant) % SERIES}")
            plot.plot(range(len(median)), median, color=shade, linewidth=2, label=label(variant, 24))
        plot.set(xlabel="step of the method", ylabel="loss / round-to-nearest", ylim=(0, None))
        plot.locator_params(axis="x", integer=True)
        picture.legend(loc="outside lower left", ncols=3, fontsize=8.5, handlelength=1.2, columnspacing=1.2)
        listed = "; ".join(f"{variant} from {m[0]:.3f} to {m[-1]:.3f}" for variant, m in medians.items())
        svg = inline(picture, name, title, f"{listed}.")
    explanation = (
        "The median over the layers, for methods that report their steps, scaled to end at the loss as a multiple of "
        "round-to-nearest's. A step is whatever the method repeats, and takes a different time in each."
    )
    return figure(title, explanation, svg)


def _losses(diagnostics: Mapping[str, float]) -> tuple[float, ...]:
    losses = {int(match[1]): value for name, value in diagnostics.items() if (match := _STEP.fullmatch(name))}
    return tuple(losses[step] for step in sorted(losses))


def _median(losses: Sequence[Sequence[float]]) -> list[float]:
    """Step by step, as far as every curve goes."""
    return [statistics.median(of_step) for of_step in zip(*losses, strict=False)]
