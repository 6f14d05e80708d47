"""`quantlab inspect`: what is in a checkpoint?"""

import json
import typing
from collections import Counter
from pathlib import Path

import click

from quantlab.cli.options import common_options, examples, json_option

if typing.TYPE_CHECKING:
    from quantlab.checkpoint.inspect import LayerSummary, Summary


@click.command(
    short_help="Show what is in a checkpoint.",
    epilog=examples("quantlab inspect runs/ganq_w4-demo", "quantlab inspect path/to/checkpoint --json"),
)
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@common_options
def inspect(path: Path, as_json: bool) -> None:
    """Show what the checkpoint or run folder PATH holds: method, sizes, and every layer's bits and loss."""
    from quantlab.checkpoint.inspect import inspect as summarise

    summary = summarise(path)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        _print(summary)


def _print(summary: "Summary") -> None:
    kinds = Counter(f"{layer.bits}-bit {layer.codebook}" for layer in summary.layers)
    rows = [
        ("architecture", summary.model_type),
        ("method", f"{summary.method['name']} {json.dumps(summary.method['options'])}"),
        ("written by", f"{summary.producer['name']} {summary.producer['version']}"),
        ("quantized layers", f"{len(summary.layers)} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"),
        ("bits per weight", f"{summary.bits_per_weight:.3f}"),
        ("stored", f"{summary.stored_bytes / 2**20:.1f} MiB in {summary.shards} shards"),
    ]
    for what, value in rows:
        click.echo(f"{what:<16}  {value}")
    click.echo()
    head = ("layer", "shape", "bits", "group", "codebook", "outliers", "bits/weight", "relative loss")
    table = [head, *(_row(layer) for layer in summary.layers)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(layer: "LayerSummary") -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]}x{layer.shape[1]}",
        str(layer.bits),
        "row" if layer.group_size is None else str(layer.group_size),
        layer.codebook,
        str(layer.outliers),
        f"{layer.bits_per_weight:.3f}",
        "" if layer.relative_loss is None else f"{layer.relative_loss:.2e}",
    )
