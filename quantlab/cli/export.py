"""`quantlab export`: a checkpoint in a format that other programs read."""

from pathlib import Path

import click

from quantlab.cli.options import common_options, examples, verbatim

_FORMATS = ("dequantized", "compressed-tensors", "gptq")  # as quantlab.checkpoint.export has them; that imports torch
_FORMATS_IN_WORDS = (
    "dequantized         ordinary weights in the model's own dtype",
    "compressed-tensors  pack-quantized, without outliers",
    "gptq                GPTQ layout, version 2, without outliers, one budget for all layers",
)


@click.command(
    short_help="Convert a checkpoint to a format that other programs read.",
    epilog="\n\n".join(
        [
            verbatim("Formats", _FORMATS_IN_WORDS),
            examples(
                "quantlab export runs/ganq_w4-demo --format dequantized",
                "quantlab export runs/rtn_w4-demo --format compressed-tensors --output-dir demo-w4",
            ),
        ]
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--format", "target", type=click.Choice(_FORMATS), required=True, help="The format to write.")
@click.option(
    "--output-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to create.  [default: PATH-FORMAT]",
)
@common_options
def export(path: Path, target: str, output_dir: Path | None) -> None:
    """Convert the checkpoint or run folder PATH.

    Look-up tables (ganq, lnq, kmeans, leanquant) have no standard format besides quantlab's own: only dequantized
    holds them. Uniform grids (rtn, gptq, quantease) fit into all formats.
    """
    from quantlab.checkpoint.export import export as convert

    folder = output_dir or path.with_name(f"{path.resolve().name}-{target}")
    convert(path, target, folder)
    click.echo(f"{target} model: {folder}")
