"""Where the memory and the time went."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from quantlab.report.html.markup import Html
from quantlab.report.html.parts import Part, figure, figures
from quantlab.report.html.runs import Run
from quantlab.report.html.svg import axes, color, inline, label, styled
from quantlab.report.units import format_bytes, format_duration

BYTE_STEPS = [factor * 10.0**power for power in range(3, 15) for factor in (1, 2, 5)]
SECOND_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600, 7200, 18000, 36000, 86400]
MOST_TICKS = 4

Amount = tuple[str, float]
"""What it is, and how much."""


def resources(run: Run, prefix: str) -> Part:
    """Memory and time of a run, as far as its manifest has them."""
    pictures = [_time(run, f"{prefix}time")]
    if "memory" in run.manifest:
        pictures.insert(0, _memory(run, f"{prefix}memory"))
    return Part(key="resources", title="Memory and time", content=figures(pictures))


def _memory(run: Run, name: str) -> Html:
    memory = run.manifest["memory"]
    parts = [(part, float(size)) for part, size in memory["parts"].items() if size > 0]
    marks = [("measured while quantizing", float(memory["quantize_peak_rss_bytes"]))]
    if memory["budget_bytes"] is not None:
        marks.append(("budget", float(memory["budget_bytes"])))
    expected = format_bytes(memory["expected_peak_bytes"])
    facts = [f"expected peak {expected}", *(f"{mark} {format_bytes(size)}" for mark, size in marks)]
    facts.append(f"whole run {format_bytes(run.manifest['peak_rss_bytes'])}")
    svg = _waterfall(name, "Memory at the expected peak", parts, marks, format_bytes, BYTE_STEPS)
    return figure("Memory at the expected peak", _sentence(facts), svg)


def _time(run: Run, name: str) -> Html:
    stages = run.manifest["stages_s"]
    engine: Mapping[str, float] = run.manifest.get("engine_s", {})
    parts: list[Amount] = []
    for stage, seconds in stages.items():
        if stage == "quantize" and engine:
            parts += [(f"quantize: {part}", own) for part, own in engine.items() if own > 0]
            parts.append(("quantize: other", max(0.0, seconds - sum(engine.values()))))
        else:
            parts.append((stage.replace("_", " "), seconds))
    svg = _waterfall(name, "Time by stage", parts, [], format_duration, SECOND_STEPS)
    return figure("Time by stage", _sentence([f"{format_duration(run.manifest['wall_s'])} in all"]), svg)


def _waterfall(
    name: str,
    title: str,
    parts: Sequence[Amount],
    marks: Sequence[Amount],
    show: Callable[[float], str],
    steps: Sequence[float],
) -> Html:
    """Each part as a bar that begins where the one before it ended, with marks as vertical lines."""
    total = sum(amount for _, amount in parts)
    end = max([total, *(amount for _, amount in marks)]) or 1.0
    with styled():
        picture, plot = axes(height=0.75 + 0.27 * len(parts) + 0.2 * len(marks))
        start = 0.0
        for place, (_, amount) in enumerate(parts):
            plot.barh(place, max(amount, 0.004 * end), 0.66, left=start, color=color("accent"), gid=f"bar-{place}")
            _write_amount(plot, show(amount), place, start, start + amount, end)
            start += amount
        for mark, amount in marks:
            role = "alert" if mark == "budget" else "muted"
            plot.axvline(
                amount, color=color(role), linewidth=1.4, linestyle=(0, (4, 2)), label=f"{mark} {show(amount)}"
            )
        plot.set_yticks(range(len(parts)), [label(part, 28) for part, _ in parts])
        plot.set(ylim=(len(parts) - 0.4, -0.6), xlim=(0, 1.04 * end))
        plot.tick_params(axis="y", length=0)
        plot.xaxis.set_major_locator(MultipleLocator(_step(end, steps)))
        plot.xaxis.set_major_formatter(lambda amount, _: show(amount).replace(" 00 s", "") if amount else "0")
        plot.grid(False, axis="y")
        plot.spines["left"].set_visible(False)
        if marks:
            picture.legend(loc="outside lower left", fontsize=8.5)
        listed = "; ".join(f"{part} {show(amount)}" for part, amount in [*parts, *marks])
        notes = {f"bar-{place}": f"{part}: {show(amount)}" for place, (part, amount) in enumerate(parts)}
        return inline(picture, name, title, f"{listed}.", notes)


def _write_amount(plot: Axes, text: str, place: int, start: float, stop: float, end: float) -> None:
    """Right of the bar, or left of it, or in it, wherever there is room."""
    inside = False
    at, side = stop, 1
    if stop > 0.72 * end:
        inside = start < 0.28 * end
        at, side = (stop, -1) if inside else (start, -1)
    plot.annotate(
        text,
        (at, place),
        xytext=(5 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=8.5,
        color=color("page" if inside else "ink"),
    )


def _step(end: float, steps: Sequence[float]) -> float:
    """Distance of the ticks, so that there are few of them."""
    return next((step for step in steps if end <= MOST_TICKS * step), end)


def _sentence(facts: Sequence[str]) -> str:
    text = "; ".join(facts)
    return f"{text[:1].upper()}{text[1:]}."
