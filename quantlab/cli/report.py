"""`quantlab report`: one page about one or several runs."""

from pathlib import Path

import click

from quantlab.cli.options import common_options, examples


@click.command(
    short_help="Write a page about runs.",
    epilog=examples(
        "quantlab report runs/ganq_w4-demo",
        "quantlab report runs/ganq_w4-demo runs/gptq_w4-demo --output ganq-or-gptq.html",
    ),
)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.  [default: report.html in DIR; with several, in the current folder]",
)
@common_options
def report(folders: tuple[Path, ...], output: Path | None) -> None:
    """Write one self-contained HTML page about the runs or comparisons in DIR...

    The page needs no network and no other file: it can be sent to a colleague, read on a phone and printed.
    """
    from quantlab.report.html import FILE_NAME, write_report

    path = output or (folders[0] if len(folders) == 1 else Path()) / FILE_NAME
    click.echo(write_report(folders, path))
