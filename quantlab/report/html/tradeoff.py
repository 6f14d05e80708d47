"""Size against perplexity, and against the divergence from the float model."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from quantlab.report.html.markup import Html
from quantlab.report.html.parts import Part, figure, figures
from quantlab.report.html.runs import Run
from quantlab.report.html.scores import texts, value
from quantlab.report.html.svg import MARKERS, SERIES, axes, color, inline, label, styled
from quantlab.report.units import format_bytes

LOGARITHMIC_FROM = 4
"""Values that differ by this factor are drawn on a logarithmic axis."""

LABEL_HEIGHT = 0.06
"""Of the name of a point, as a share of the plot."""

Point = tuple[Run, float, float]
"""A run with its size in bytes and its value."""


def tradeoff(runs: Sequence[Run]) -> Part | None:
    """One pair of plots per model and text; None if nothing was evaluated."""
    pictures: list[Html] = []
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        for text in texts(own):
            name = f"tradeoff-{len(pictures)}"
            pictures.append(_plot(own, text, "quantized", name, f"Size against perplexity on {text}"))
            if sum(value(run, text, "kl") >= 0 for run in own) > 1:
                title = f"Size against divergence from the float model on {text}"
                pictures.append(_plot(own, text, "kl", f"{name}-kl", title))
    return Part(key="tradeoff", title="Size against quality", content=figures(pictures)) if pictures else None


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both size and value, from the smallest to the largest."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: point[1:]):
        if not best or point[2] < best[-1][2]:
            best.append(point)
    return best


def _plot(runs: Sequence[Run], text: str, measure: str, name: str, title: str) -> Html:
    is_perplexity = measure == "quantized"
    measured = [run for run in runs if not math.isnan(value(run, text, measure))]
    points = [(run, float(run.manifest["checkpoint_bytes"]), value(run, text, measure)) for run in measured]
    reference = value(measured[0], text, "float")
    notes = {f"point-{index}": _note(point, is_perplexity) for index, point in enumerate(points)}
    description = _description(points, reference, is_perplexity)
    variants = list(dict.fromkeys(run.variant for run in measured))
    with styled():
        picture, plot = axes(height=3.1 + 0.2 * math.ceil(len(variants) / 3))
        plot.set_xlabel("checkpoint")
        plot.set_ylabel("perplexity" if is_perplexity else "KL, nats per token")
        plot.xaxis.set_major_locator(MaxNLocator(5))
        plot.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size) if size > 0 else "0"))
        if is_perplexity:
            points = _place_reference(plot, points, reference)
        _set_scale(plot, [height for _, _, height in points])
        _draw_points(plot, points, variants)
        if not is_perplexity:
            _draw_errors(plot, points, text, variants)
        if len(variants) > 1:
            picture.legend(loc="outside lower left", ncols=3, fontsize=8.5, handletextpad=0.3, columnspacing=1.2)
        svg = inline(picture, name, title, description, notes)
    explanation = "Lower and further left is better."
    if len(points) > 1:
        explanation += " The line joins the runs that no other beats in both."
    return figure(title, explanation, svg)


def _place_reference(plot: Axes, points: Sequence[Point], reference: float) -> list[Point]:
    """Show the float model; returns the points as they are to be drawn, which may be above it."""
    heights = [height for _, _, height in points]
    size = float(points[0][0].manifest["source_bytes"])
    if len(points) > 1 and min(heights) > reference:
        plot.set_ylabel(f"perplexity above float {reference:.3f}")
        plot.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"+{tick:g}"))
        return [(run, own_size, height - reference) for run, own_size, height in points]
    plot.axhline(reference, color=color("muted"), linewidth=1, linestyle=(0, (4, 3)))
    if len(points) == 1:  # a lone point says little without the one that it started from
        arrow = {"arrowstyle": "->", "color": color("muted"), "shrinkB": 6}
        plot.plot([size], [reference], "o", color=color("muted"), markersize=6)
        plot.annotate("", (points[0][1], heights[0]), (size, reference), arrowprops=arrow)
    plot.annotate(
        f"float {reference:.3f}, {format_bytes(size)}",
        (1, reference),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=color("muted"),
    )
    return list(points)


def _set_scale(plot: Axes, heights: Sequence[float]) -> None:
    plot.margins(x=0.12, y=0.15)
    if min(heights) > 0 and max(heights) > LOGARITHMIC_FROM * min(heights):
        formatter = plot.yaxis.get_major_formatter()
        plot.set_yscale("log")
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        is_own = isinstance(formatter, FuncFormatter)
        plot.yaxis.set_major_formatter(formatter if is_own else FuncFormatter(lambda tick, _: f"{tick:g}"))
        plot.minorticks_off()


def _draw_points(plot: Axes, points: Sequence[Point], variants: Sequence[str]) -> None:
    best = front(points)
    if len(best) > 1:
        plot.step(*zip(*(point[1:] for point in best), strict=True), where="post", color=color("soft"), linewidth=2)
    for index, (run, size, height) in enumerate(points):
        number = variants.index(run.variant)
        first = all(other.variant != run.variant for other, _, _ in points[:index])
        plot.plot(
            [size],
            [height],
            MARKERS[(number + number // SERIES) % len(MARKERS)],
            color=color(f"series-{number % SERIES}"),
            markersize=7,
            markeredgecolor=color("page"),
            markeredgewidth=0.8,
            gid=f"point-{index}",
            zorder=3 + 1 / (1 + index),  # the first runs, which are the best of a comparison, on top
            label=label(run.variant, 24) if first else None,
        )
    _label(plot, best)


def _draw_errors(plot: Axes, points: Sequence[Point], text: str, variants: Sequence[str]) -> None:
    for run, size, height in points:
        error = value(run, text, "kl_standard_error")
        if not math.isnan(error):
            shade = color(f"series-{variants.index(run.variant) % SERIES}")
            plot.errorbar([size], [height], yerr=[error], color=shade, linewidth=1)


def _label(plot: Axes, best: Sequence[Point]) -> None:
    """Names below and left of the points, where no other can be; those that would overlap are left out."""
    plot.autoscale_view()
    if len(best) > 1:
        left, right = plot.get_xlim()
        room = max(0.2, 0.018 * max(len(label(run.label, 26)) for run, _, _ in best))  # for the longest name
        plot.set_xlim(left - room * (right - left), right)
    placed: list[float] = []
    for run, size, height in best:
        _, up = plot.transLimits.transform(plot.transScale.transform((size, height)))
        if all(abs(up - other) > LABEL_HEIGHT for other in placed):
            placed.append(up)
            plot.annotate(
                label(run.label, 26),
                (size, height),
                xytext=(-6, -5) if len(best) > 1 else (6, 5),
                textcoords="offset points",
                ha="right" if len(best) > 1 else "left",
                va="top" if len(best) > 1 else "bottom",
                fontsize=8,
                color=color("muted"),
            )


def _note(point: Point, is_perplexity: bool) -> str:
    run, size, height = point
    measured = f"perplexity {height:.3f}" if is_perplexity else f"KL {height:.4f}"
    return f"{run.label}: {format_bytes(size)}, {measured}"


def _description(points: Sequence[Point], reference: float, is_perplexity: bool) -> str:
    listed = "; ".join(_note(point, is_perplexity) for point in sorted(points, key=lambda point: point[1:]))
    return f"{listed}. The float model has perplexity {reference:.3f}." if is_perplexity else f"{listed}."
