"""How the loss fell, for methods that report it after every iteration."""

import re
from collections.abc import Mapping

from quantlab.report.html.parts import Part, figure
from quantlab.report.html.runs import Run
from quantlab.report.html.svg import axes, color, inline, styled

_ITERATION = re.compile(r"loss_(\d+)")


def convergence(run: Run, prefix: str) -> Part | None:
    """One curve per layer whose diagnostics have "loss_0", "loss_1" and so on; None if there is none."""
    curves = [curve for layer in run.layers if len(curve := _curve(layer.diagnostics)) > 1]
    if not curves:
        return None
    with styled():
        picture, plot = axes(height=2.8)
        for curve in curves:
            start = curve[0] or 1.0
            plot.plot(range(len(curve)), [loss / start for loss in curve], color=color("accent"), lw=1.2, alpha=0.5)
        plot.set(xlabel="iteration", ylabel="loss, share of the first")
        plot.locator_params(axis="x", integer=True)
        ends = [curve[-1] / (curve[0] or 1.0) for curve in curves]
        description = f"{len(curves)} layers end at {min(ends):.3f} to {max(ends):.3f} of their first loss."
        svg = inline(picture, f"{prefix}convergence", "Loss by iteration", description)
    explanation = "One line per layer, as a share of its loss before the first iteration."
    return Part(key="convergence", title="Convergence", content=figure("Loss by iteration", explanation, svg))


def _curve(diagnostics: Mapping[str, float]) -> list[float]:
    losses = {int(match[1]): value for name, value in diagnostics.items() if (match := _ITERATION.fullmatch(name))}
    return [losses[iteration] for iteration in sorted(losses)]
