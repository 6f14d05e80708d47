"""`quantlab data`: text corpora in the local format that calibration and evaluation read."""

from pathlib import Path

import click

from quantlab.calibration.corpora import Split
from quantlab.cli.options import common_options, examples, json_option


@click.group(
    short_help="Prepare text corpora for calibration and evaluation.",
    epilog=examples("quantlab data prepare wikitext2"),
)
@common_options
def data() -> None:
    """Text corpora in one local, hashed format, so that results do not depend on where the text came from.

    The standard library (`stdlib`) and text files (`file:PATH`) need no preparation.
    """


@data.command(
    "prepare",
    short_help="Turn a hub data set or local files into a local corpus.",
    epilog=examples(
        "quantlab data prepare wikitext2",
        "quantlab data prepare c4 --from downloads/c4",
        "quantlab data prepare ours --from texts.jsonl --split train --column title --column body",
    ),
)
@click.argument("name")
@click.option(
    "--from",
    "source",
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="A text, JSON, JSONL or parquet file, or a folder of them.  [default: the hub]",
)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    help="Which split PATH is.  [default: by the names of the files]",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="FIELD",
    help="Field of the documents that holds the text; several are joined.  [default: text]",
)
@json_option
@common_options
def prepare(name: str, source: Path | None, split: Split | None, columns: tuple[str, ...], as_json: bool) -> None:
    """Prepare the corpus NAME: one of the literature (wikitext2, c4, ptb), or a name of your own.

    Recipes then use the name, for example `--set calibration.name=ours`.
    """
    import dataclasses
    import json

    from quantlab.calibration.prepare import prepare as prepare_corpus
    from quantlab.calibration.prepared import data_home

    prepared = prepare_corpus(name, source, split=split, columns=columns)
    if as_json:
        click.echo(json.dumps({part: dataclasses.asdict(values) for part, values in prepared.items()}, indent=2))
        return
    for part, values in prepared.items():
        click.echo(f"{part:<10}  {values.documents:,} documents, {values.characters:,} characters from {values.origin}")
    click.echo(f"in {data_home() / name}")
