"""How many calibration tokens reached each expert."""

from collections.abc import Sequence

from quantlab.report.html.markup import Html, breakable, join, tag
from quantlab.report.html.parts import Part, figure
from quantlab.report.html.runs import Layer, Run
from quantlab.report.html.svg import axes, color, inline, styled
from quantlab.report.html.tables import Cell, Column, table

LISTED = 10


def experts(run: Run, prefix: str) -> Part | None:
    """The coverage of experts; None for a model without any."""
    layers = [layer for layer in run.layers if "*" in layer.linear and layer.num_tokens is not None]
    if not layers:
        return None
    by_block: dict[int, list[int]] = {}
    for layer in layers:
        by_block.setdefault(layer.block or 0, []).append(layer.num_tokens or 0)
    explanation = (
        "Tokens behind the Hessian of each expert's layers: the least and the most covered expert, the middle half, "
        "and the median. With fewer tokens than inputs (dashed) a Hessian is singular."
    )
    inputs = max(layer.in_features or 0 for layer in layers)
    picture = figure("Calibration tokens per expert", explanation, _plot(by_block, inputs, f"{prefix}experts"))
    fewest = sorted(layers, key=lambda layer: layer.num_tokens or 0)[:LISTED]
    return Part(key="experts", title="Coverage of experts", content=join([picture, _table(fewest)]))


def _plot(by_block: dict[int, list[int]], inputs: int, name: str) -> Html:
    blocks = sorted(by_block)
    quantiles = [[_quantile(by_block[block], share) for block in blocks] for share in (0, 0.25, 0.5, 0.75, 1)]
    with styled():
        picture, plot = axes(height=2.6)
        if len(blocks) == 1:  # a band needs two ends
            blocks, quantiles = [blocks[0], blocks[0] + 1], [[*row, *row] for row in quantiles]
        plot.fill_between(blocks, quantiles[0], quantiles[4], color=color("soft"), linewidth=0, alpha=0.55)
        plot.fill_between(blocks, quantiles[1], quantiles[3], color=color("soft"), linewidth=0)
        plot.plot(blocks, quantiles[2], color=color("accent"), linewidth=1.8)
        if inputs:
            plot.axhline(inputs, color=color("alert"), linewidth=1.2, linestyle=(0, (4, 2)))
        plot.set_yscale("symlog", linthresh=1)
        plot.set(xlabel="block", ylabel="tokens", ylim=(0, None))
        plot.locator_params(axis="x", integer=True, nbins=8)
        fewest, most = min(quantiles[0]), max(quantiles[4])
        description = f"From {fewest:.0f} to {most:.0f} tokens per expert in {len(by_block)} blocks; {inputs} inputs."
        return inline(picture, name, "Calibration tokens per expert", description)


def _quantile(values: Sequence[int], share: float) -> float:
    return float(sorted(values)[round(share * (len(values) - 1))])


def _table(layers: Sequence[Layer]) -> Html:
    columns = [Column(title="Layer", numeric=False), Column(title="Tokens"), Column(title="Inputs")]
    rows = [
        [
            Cell(content=breakable(layer.name)),
            Cell(content=f"{layer.num_tokens:,}", value=layer.num_tokens),
            Cell(content=f"{layer.in_features or 0:,}", value=layer.in_features),
        ]
        for layer in layers
    ]
    return tag("div", table("The layers of experts with the fewest tokens", columns, rows))
