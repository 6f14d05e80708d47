"""How the loss fell, for methods that report it after each of their steps."""

import re
import statistics
from collections.abc import Mapping, Sequence

from quantlab.report.html.parts import Part, figure
from quantlab.report.html.runs import Run
from quantlab.report.html.svg import axes, color, inline, styled

_STEP = re.compile(r"loss_(\d{1,6})")


def convergence(run: Run, prefix: str) -> Part | None:
    """One curve for all layers that were solved together, and the median; None if there is none.

    The diagnostics of such layers have the same "loss_0", "loss_1" and so on.
    """
    reported = (_curve(layer.diagnostics) for layer in run.layers)
    curves = [curve for curve in dict.fromkeys(reported) if len(curve) > 1 and curve[0] > 0]
    if not curves:
        return None
    shares = [[loss / curve[0] for loss in curve] for curve in curves]
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
            f"{len(curves)} curves end at {min(ends):.3f} to {max(ends):.3f} of their first loss, "
            f"the median at {median[-1]:.3f}."
        )
        svg = inline(picture, f"{prefix}convergence", "Loss by step", description)
    explanation = (
        "What the method minimises after each of its steps, as a share of the value after the first: a line for every "
        "group of layers that was solved together, and the median."
    )
    return Part(key="convergence", title="Convergence", content=figure("Loss by step", explanation, svg))


def _curve(diagnostics: Mapping[str, float]) -> tuple[float, ...]:
    losses = {int(match[1]): value for name, value in diagnostics.items() if (match := _STEP.fullmatch(name))}
    return tuple(losses[step] for step in sorted(losses))


def _median(curves: Sequence[Sequence[float]]) -> list[float]:
    """Step by step, as far as every curve goes."""
    return [statistics.median(losses) for losses in zip(*curves, strict=False)]
