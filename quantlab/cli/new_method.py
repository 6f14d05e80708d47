"""`quantlab new-method`: the project of a method of your own."""

from pathlib import Path

import click

from quantlab.cli.options import common_options, examples


@click.command(
    "new-method",
    short_help="Begin a method of your own.",
    epilog=examples("quantlab new-method my_method", "quantlab new-method my_method --output-dir work/my-method"),
)
@click.argument("name")
@click.option(
    "--output-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to create.  [default: quantlab-NAME]",
)
@common_options
def new_method(name: str, output_dir: Path | None) -> None:
    """Write a plugin project with the method NAME: one file that works, its contract test, and the packaging."""
    from quantlab.scaffold import create_project

    folder = create_project(name, output_dir)
    click.echo(
        f"{folder}: change quantlab_{name}.py, then\n"
        f"  pip install -e {folder}\n"
        f"  quantlab check {name}\n"
        f"  quantlab run ganq_w4 --set method.name={name} --output-dir runs/{name}"
    )
