"""Pictures of codebooks over the weights that they stand for."""

import math

import torch

from quantlab.errors import CheckpointError
from quantlab.report.html.markup import Html, join, tag
from quantlab.report.html.parts import Part, figure, figures
from quantlab.report.html.runs import Layer, Run
from quantlab.report.html.svg import axes, color, inline, label, styled
from quantlab.report.html.weights import CodebookView, RunWeights

WORST_LAYERS = 4
BINS = 48


def codebooks(run: Run, prefix: str) -> Part:
    """The codebooks of the layers with the largest relative loss."""
    title = "Codebooks of the worst layers"
    try:
        weights = RunWeights(run.folder, run.model)
        worst = sorted(run.layers, key=lambda layer: -layer.relative_loss)[:WORST_LAYERS]
        views = [(layer, view) for layer in worst if (view := weights.view(layer.name)) is not None]
    except CheckpointError as error:
        return Part(key="codebooks", title=title, content=tag("p", f"They cannot be shown: {error}"))
    if not views:
        return Part(key="codebooks", title=title, content=tag("p", "The checkpoint holds none of them."))
    introduction = tag(
        "p",
        "The layers with the largest relative loss, each with the codebook that "
        f"{_choice(all(view.is_original for _, view in views))}. Solid lines are the levels in use, the ticks below "
        "the axis those of round-to-nearest for the same weights.",
    )
    pictures = [_picture(layer, view, f"{prefix}codebook-{index}") for index, (layer, view) in enumerate(views)]
    return Part(key="codebooks", title=title, content=join([introduction, figures(pictures)]))


def _choice(is_original: bool) -> str:
    if is_original:
        return "leaves the largest squared error. The histogram is of the float weights"
    return (
        "spans the widest distribution. The float weights are not on this machine or are stored in another layout, so "
        "that histograms are of the dequantized weights unless noted"
    )


def _picture(layer: Layer, view: CodebookView, name: str) -> Html:
    where = f"row {view.row}" + ("" if view.group is None else f", group {view.group}")
    kind = "float" if view.is_original else "dequantized"
    lowest, highest = view.weights.min().item(), view.weights.max().item()
    counts = torch.histc(view.weights, BINS, lowest, highest) if lowest < highest else torch.zeros(BINS)
    width = (highest - lowest) / BINS or 1.0
    with styled():
        picture, plot = axes(height=2.1)
        edges = [lowest + index * width for index in range(BINS + 1)]
        plot.stairs(counts.tolist(), edges, fill=True, color=color("soft"), linewidth=0)
        top = max(counts.max().item(), 1.0)
        plot.vlines(view.levels.tolist(), 0, top * 1.05, color=color("accent"), linewidth=1.4)
        plot.vlines(view.grid.tolist(), -0.12 * top, -0.03 * top, color=color("alert"), linewidth=1.4)
        plot.set(ylim=(-0.14 * top, top * 1.08), xlabel="weight")
        plot.set_yticks([])
        plot.grid(False)
        plot.spines["left"].set_visible(False)
        plot.locator_params(axis="x", nbins=6)
        svg = inline(picture, name, f"Codebook of {layer.name}", _description(view, where, kind))
    ratio = "" if math.isnan(layer.ratio) else f", {layer.ratio:.2f} × round-to-nearest"
    explanation = f"{where}; {len(view.weights):,} {kind} weights, relative loss {layer.relative_loss:.2e}{ratio}"
    return figure(label(layer.name, 60), explanation, svg)


def _description(view: CodebookView, where: str, kind: str) -> str:
    levels = ", ".join(f"{level:.3g}" for level in view.levels.tolist()[:32])
    more = "" if len(view.levels) <= 32 else " and more"
    return (
        f"Histogram of the {len(view.weights)} {kind} weights of {where}, from {view.weights.min().item():.3g} to "
        f"{view.weights.max().item():.3g}, with {len(view.levels)} levels at {levels}{more}."
    )
