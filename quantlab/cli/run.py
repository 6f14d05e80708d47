"""`quantlab run`: carry out a recipe."""

import shlex
from pathlib import Path

import click

from quantlab.cli.options import (
    Session,
    common_options,
    examples,
    executor_options,
    open_console,
    opened_executor,
    recipe_options,
)
from quantlab.cli.stopping import StopSignals

_FILE_WIDTH = 120  # rich assumes 80 columns where there is no terminal, which would wrap the table


@click.command(
    short_help="Quantize a model as a recipe says, and evaluate it.",
    epilog=examples(
        "quantlab run ganq_w4",
        "quantlab run ganq_w4 --model facebook/opt-125m --set model.dtype=auto",
        "quantlab run my_recipe.yaml --set method.bits=3 --output-dir runs/three-bits",
    ),
)
@recipe_options
@click.option(
    "--output-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to create, or to continue in.  [default: runs/RECIPE-MODEL]",
)
@executor_options
@common_options
@click.pass_obj
def run(
    session: Session,
    recipe: str,
    model: str | None,
    overrides: tuple[str, ...],
    output_dir: Path | None,
) -> None:
    """Quantize a model as RECIPE says, evaluate it, and write a run folder.

    RECIPE is a file or the name of a built-in recipe. The run folder holds the quantized model, the recipe,
    all measurements and report.md.

    A run that is stopped (Ctrl-C, SIGTERM), killed, or out of disk space or memory keeps its finished blocks: the
    same command continues it, with the same result.
    """
    from quantlab.cli.progress import choose_progress
    from quantlab.models import resolve_model
    from quantlab.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, model=model)

    # Imports torch: not before the recipe is known good.
    from quantlab.pipeline import default_output_dir, execute
    from quantlab.plan import engine_options
    from quantlab.recipe.layers import assign_methods
    from quantlab.workspace import require_free

    folder = output_dir or default_output_dir(loaded)
    require_free(folder)
    assignment = assign_methods(loaded)
    model_folder = resolve_model(loaded.recipe.model.path)
    budget_bytes = engine_options(loaded.recipe).memory_budget_bytes
    command = shlex.join(["quantlab", *session.arguments])
    with (
        opened_executor() as executor,
        choose_progress(quiet=session.quiet, budget_bytes=budget_bytes) as progress,
        StopSignals() as stop,
    ):
        finished = execute(assignment, model_folder, folder, progress, command, stop, executor=executor)
    _print_result(finished)


def _print_result(folder: Path) -> None:
    from quantlab.report.record import read_record
    from quantlab.report.summary import profile_line, summary_table
    from quantlab.report.units import format_duration

    console = open_console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    record = read_record(folder)
    console.print(summary_table(record))
    duration = format_duration(record.manifest["stages_s"]["quantize"])
    click.echo(f"time:       {duration} to quantize ({profile_line(record)})")
    click.echo(f"run folder: {folder}")
    click.echo(f"report:     {folder / 'report.md'}; `quantlab report {folder}` makes a page of it")
