"""Where the memory and the time went."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from quantlab.report.html.markup import Html
from quantlab.report.html.parts import Part, figure, figures
from quantlab.report.html.runs import Run
from quantlab.report.html.svg import axes, color, inline, label, styled
from quantlab.report.units import format_bytes, format_duration

BYTE_STEPS = [factor * 10.0**power for power in range(3, 15) for factor in (1, 2, 5)]
SECOND_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600, 7200, 18000, 36000, 86400]
MOST_TICKS = 4
CHARACTER_WIDTH = 0.018
"""Of small text, as a share of a plot."""

Amount = tuple[str, float]
"""What it is, and how much."""


def resources(run: Run, prefix: str) -> Part:
    """Memory and time of a run, as far as its manifest has them."""
    pictures = [_time(run, f"{prefix}time")]
    if "memory" in run.manifest:
        pictures.insert(0, _memory(run, f"{prefix}memory"))
        if run.manifest["memory"].get("timeline", {}).get("bytes"):
            pictures.insert(0, _timeline(run, f"{prefix}timeline"))
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


def _timeline(run: Run, name: str) -> Html:
    """Memory over time, the stages side by side, with the budget as a line."""
    memory = run.manifest["memory"]
    timeline, budget = memory["timeline"], memory["budget_bytes"]
    interval_s, sizes = timeline["interval_s"], timeline["bytes"]
    end_s = interval_s * len(sizes)
    edges = [interval_s * index for index in range(len(sizes) + 1)]
    begins = {stage: min(start_s, end_s) for stage, start_s in timeline["stages"].items()}
    most = max([*sizes, budget or 0])
    top = 1.15 * most
    with styled():
        picture, plot = axes(height=2.3)
        plot.stairs(sizes, edges, fill=True, color=color("soft"))
        plot.stairs(sizes, edges, baseline=None, color=color("accent"), linewidth=1.6)
        for (stage, start_s), stop_s in zip(begins.items(), [*begins.values(), end_s][1:], strict=True):
            plot.axvline(start_s, color=color("muted"), linewidth=0.8, linestyle=(0, (1, 2)))
            name_of_stage = _words(stage, 16)
            if stop_s - start_s > CHARACTER_WIDTH * len(name_of_stage) * end_s:
                centre = (start_s + stop_s) / 2
                plot.text(centre, 0.04 * top, name_of_stage, ha="center", va="bottom", size=8.5, color=color("muted"))
        if budget is not None:
            plot.axhline(budget, color=color("alert"), linewidth=1.4, linestyle=(0, (4, 2)))
            plot.annotate(
                f"budget {format_bytes(budget)}", (end_s, budget), xytext=(0, 3), textcoords="offset points",
                ha="right", va="bottom", fontsize=8.5, color=color("alert"),
            )  # fmt: skip
        plot.set(xlim=(0, end_s), ylim=(0, top))
        plot.xaxis.set_major_locator(MultipleLocator(_step(end_s, SECOND_STEPS)))
        plot.xaxis.set_major_formatter(lambda seconds, _: _tick(format_duration(seconds)) if seconds else "0")
        plot.yaxis.set_major_locator(MultipleLocator(_step(most, BYTE_STEPS)))
        plot.yaxis.set_major_formatter(lambda size, _: format_bytes(size) if size else "0")
        peaks = [
            f"{_words(stage, 28)} up to {format_bytes(max(_between(sizes, interval_s, start_s, stop_s)))}"
            for (stage, start_s), stop_s in zip(begins.items(), [*begins.values(), end_s][1:], strict=True)
        ]
        limit = "no budget" if budget is None else f"budget {format_bytes(budget)}"
        svg = inline(picture, name, "Memory over time", f"{'; '.join([*peaks, limit])}.")
    explanation = "Resident memory of the process."
    if budget is None:
        explanation += " No budget was set (engine.memory_budget)."
    return figure("Memory over time", explanation, svg, class_="across")


def _between(sizes: Sequence[float], interval_s: float, start_s: float, stop_s: float) -> Sequence[float]:
    first = min(int(start_s / interval_s), len(sizes) - 1)
    return sizes[first : max(first + 1, math.ceil(stop_s / interval_s))]


def _words(stage: str, length: int) -> str:
    return label(stage.replace("_", " "), length)


def _tick(duration: str) -> str:
    return duration.replace(" 00 s", "").replace(".0 s", " s")


def _time(run: Run, name: str) -> Html:
    stages = run.manifest["stages_s"]
    parts: list[Amount] = []
    for stage, seconds in stages.items():
        if stage == "quantize" and run.manifest.get("engine_s"):
            own = run.record.quantizing_s
            parts += [(f"quantize: {part}", own_s) for part, own_s in own.items() if own_s > 0 or part == "other"]
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
        plot.xaxis.set_major_formatter(lambda amount, _: _tick(show(amount)) if amount else "0")
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
