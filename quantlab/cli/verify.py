"""`quantlab verify`: is a checkpoint whole?"""

from pathlib import Path

import click

from quantlab.cli.options import common_options, examples


@click.command(
    short_help="Check every file of a checkpoint.",
    epilog=examples("quantlab verify runs/ganq_w4-demo", "quantlab verify path/to/checkpoint"),
)
@click.argument("path", type=click.Path(path_type=Path))
@common_options
def verify(path: Path) -> None:
    """Check the checkpoint or run folder PATH: hashes, names, shapes, codes and codebooks.

    Exits 78 with what is wrong if anything is. Nothing that a checkpoint holds is run.
    """
    from quantlab.checkpoint.verify import verify as check

    result = check(path)
    click.echo(
        f"{path}: ok ({result.shards} shards, {result.tensors} tensors, {result.layers} quantized layers, "
        f"{result.hashed} hashes)"
    )
