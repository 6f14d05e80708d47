"""The error of every layer beside that of round-to-nearest."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.patches import Rectangle

from quantlab.report.html.markup import Html, breakable, join, tag
from quantlab.report.html.parts import Part, figure
from quantlab.report.html.runs import Layer, Run
from quantlab.report.html.svg import HEAT_LEVELS, WIDTH, axes, color, inline, label, styled
from quantlab.report.html.tables import NOTHING, Cell, Column, table

BEST, WORST = 1 / 20, 4.0
"""Ratios at which the colours of the heat map end."""

OUTSIDE = "–"
"""The row of layers that are in no block."""

MAX_COLUMNS_WITH_NUMBERS = 12


def layers(run: Run, prefix: str) -> Part:
    """The heat map of a run, and the table behind it."""
    explanation = (
        "The squared error of each layer's output on the calibration text, as a multiple of what round-to-nearest "
        "leaves at the same bits. Of several experts the worst is shown."
    )
    key = tag(
        "div",
        tag("span", f"{BEST:g} × or less"),
        tag("span", class_="ramp", role="presentation"),
        tag("span", f"{WORST:g} × or more"),
        class_="key",
    )
    picture = figure(
        "Layer loss against round-to-nearest", explanation, _heat_map(run, f"{prefix}heat"), key, class_="wide"
    )
    details = tag("details", tag("summary", f"All {len(run.layers)} layers in a table"), _table(run.layers))
    return Part(key="layers", title="Layers", content=join([picture, details]))


def grid(layers: Sequence[Layer]) -> dict[tuple[str, str], Layer]:
    """The worst layer by block and name inside the block."""
    cells: dict[tuple[str, str], Layer] = {}
    for layer in layers:
        place = (OUTSIDE if layer.block is None else str(layer.block), layer.linear)
        if place not in cells or not layer.ratio <= cells[place].ratio:
            cells[place] = layer
    return cells


def heat_level(ratio: float) -> int:
    """The shade of a ratio: 0 at 1, negative if better."""
    if math.isnan(ratio):
        return 0
    end = WORST if ratio > 1 else 1 / BEST
    share = math.log(max(ratio, BEST)) / math.log(end)
    return round(max(-1.0, min(1.0, share)) * HEAT_LEVELS)


def _heat_map(run: Run, name: str) -> Html:
    cells = grid(run.layers)
    blocks = list(dict.fromkeys(block for block, _ in cells))
    linears = list(dict.fromkeys(linear for _, linear in cells))
    with styled():
        picture, plot = axes(height=0.9 + 0.27 * len(blocks), width=max(WIDTH, 0.3 * len(linears) + 1))
        for index, ((block, linear), layer) in enumerate(cells.items()):
            across, down, level = linears.index(linear), blocks.index(block), heat_level(layer.ratio)
            shade = color(f"heat-{level}")
            plot.add_patch(
                Rectangle((across + 0.03, down + 0.05), 0.94, 0.9, facecolor=shade, linewidth=0, gid=f"cell-{index}")
            )
            if len(linears) <= MAX_COLUMNS_WITH_NUMBERS:
                ink, text = color(_ink(level)), _short(layer.ratio)
                plot.text(across + 0.5, down + 0.52, text, ha="center", va="center", size=8, color=ink)
        plot.set(xlim=(0, len(linears)), ylim=(len(blocks), 0))
        slanted: dict[str, Any] = {"rotation": 35, "ha": "left"} if len(linears) > 4 else {}
        plot.set_xticks([at + 0.5 for at in range(len(linears))], _short_names(linears), fontsize=8.5, **slanted)
        plot.set_yticks([at + 0.5 for at in range(len(blocks))], [label(block) for block in blocks], fontsize=8.5)
        plot.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, pad=3)
        plot.set_ylabel("block")
        plot.grid(False)
        plot.spines[:].set_visible(False)
        notes = {f"cell-{index}": _note(layer) for index, layer in enumerate(cells.values())}
        return inline(picture, name, "Layer loss against round-to-nearest", _description(run), notes)


def _ink(level: int) -> str:
    """What can be read on a shade: the strongest differ most from the page, and the middle ones depend on it."""
    strength = abs(level) / HEAT_LEVELS
    return "ink" if strength < 0.6 else "on-middle" if strength < 0.8 else "page"


def _short_names(linears: Sequence[str]) -> list[str]:
    """The last part of each name where that tells them apart."""
    short = [linear.rpartition(".")[2] for linear in linears]
    return [label(name if short.count(name) == 1 else full, 30) for name, full in zip(short, linears, strict=True)]


def _short(ratio: float) -> str:
    if math.isnan(ratio):
        return OUTSIDE
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


def _note(layer: Layer) -> str:
    return (
        f"{layer.name}: relative loss {layer.relative_loss:.3e}, round-to-nearest {layer.rtn_relative_loss:.3e}, "
        f"ratio {_short(layer.ratio)}"
    )


def _description(run: Run) -> str:
    known = sorted((layer for layer in run.layers if not math.isnan(layer.ratio)), key=lambda layer: layer.ratio)
    if not known:
        return "No layer can be compared: round-to-nearest has no loss."
    better = sum(layer.ratio < 1 for layer in known)
    return (
        f"{better} of {len(known)} layers have a lower loss than round-to-nearest. The lowest ratio is "
        f"{_short(known[0].ratio)} at {known[0].name}, the highest {_short(known[-1].ratio)} at {known[-1].name}."
    )


def _table(layers: Sequence[Layer]) -> Html:
    columns = [
        Column(title="Layer", numeric=False),
        Column(title="Bits"),
        Column(title="Relative loss"),
        Column(title="Round-to-nearest"),
        Column(title="Ratio"),
        Column(title="Tokens"),
    ]
    caption = "Relative loss: tr(E H Eᵀ) / tr(W H Wᵀ) on the calibration text. Select a heading to sort."
    return table(caption, columns, [_row(layer) for layer in layers])


def _row(layer: Layer) -> list[Cell]:
    tokens = layer.num_tokens
    return [
        Cell(content=breakable(layer.name)),
        Cell(content=str(layer.bits), value=layer.bits),
        Cell(content=f"{layer.relative_loss:.3e}", value=layer.relative_loss),
        Cell(content=f"{layer.rtn_relative_loss:.3e}", value=layer.rtn_relative_loss),
        NOTHING if math.isnan(layer.ratio) else Cell(content=f"{layer.ratio:.3f}", value=layer.ratio),
        NOTHING if tokens is None else Cell(content=f"{tokens:,}", value=tokens),
    ]
