"""`quantlab compare`: several methods on one model under the same conditions, and the table."""

import json
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path

import click

from quantlab.cli.options import (
    Session,
    common_options,
    examples,
    executor_options,
    json_option,
    open_console,
    opened_executor,
    tasks_option,
)
from quantlab.errors import QualityError

if typing.TYPE_CHECKING:
    from quantlab.compare import Cell
    from quantlab.report.comparison import ComparisonRow


@click.command(
    short_help="Compare methods on one model, under the same conditions.",
    epilog=examples(
        "quantlab compare rtn gptq ganq --bits 4,3",
        "quantlab compare ganq ganq@paper gptq --model llama-7b --bits 4 --calibration c4 --perplexity wikitext2",
        "quantlab compare ganq lnq ./my_method.yaml --bits 3 --seeds 3 --set ganq.iterations=20",
        "quantlab compare rtn ganq --tasks stdlib_continuation --limit 100 --profile",
    ),
)
@click.argument("methods", nargs=-1, required=True)
@click.option("--model", default="demo", show_default=True, help="A folder, a hub id or an alias.")
@click.option("--bits", default="4", show_default=True, metavar="LIST", help="Code widths, such as 4,3.")
@click.option("--group-size", type=click.IntRange(min=1), help="Inputs per codebook.  [default: one codebook per row]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each, seeds 0, 1, ...")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True
)
@click.option("--calibration", default="stdlib", show_default=True, metavar="TEXT", help="Text that the methods see.")
@click.option("--num-samples", type=click.IntRange(min=1), default=128, show_default=True, help="Calibration windows.")
@click.option(
    "--sequence-length", type=click.IntRange(min=2), help="Tokens per window.  [default: 2048, or the context]"
)
@click.option(
    "--perplexity", "texts", multiple=True, metavar="TEXT", default=("stdlib",), show_default=True, help="Evaluation."
)
@click.option("--num-windows", type=click.IntRange(min=1), help="Evaluation windows per text.  [default: all]")
@tasks_option
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task.  [default: all]")
@click.option("--profile", is_flag=True, help="Generate from every model, in turns with the float model: tokens/s.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of a method (ganq.iterations=20), or a value of all recipes (calibration.target_alpha=0.5).",
)
@click.option("--output-dir", type=click.Path(file_okay=False, path_type=Path), help="[default: runs/compare-MODEL]")
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the values to this file, too."
)
@executor_options
@json_option
@common_options
@click.pass_obj
def compare(
    session: Session,
    methods: tuple[str, ...],
    model: str,
    bits: str,
    group_size: int | None,
    seeds: int,
    dtype: str,
    calibration: str,
    num_samples: int,
    sequence_length: int | None,
    texts: tuple[str, ...],
    num_windows: int | None,
    tasks: tuple[str, ...],
    limit: int | None,
    profile: bool,
    settings: tuple[str, ...],
    output_dir: Path | None,
    csv_file: Path | None,
    as_json: bool,
) -> None:
    """Compare METHODS: names, names with a preset (ganq@paper), or recipe files, of which the method is taken.

    All see the same calibration tokens and are measured on the same text. What the float model has to say is asked
    once: answers, gradients, and with --set calibration.inputs=float the statistics, if half of the free disk holds
    them. Finished runs are never computed again, so the same command continues a comparison that was stopped, and more
    methods or seeds can be added to it. A method that fails is a row with its reason; the exit code is then 3.
    """
    from quantlab import registry
    from quantlab.cli.progress import choose_progress
    from quantlab.cli.stopping import StopSignals
    from quantlab.compare import common_recipe, parse_variants, plan_cells, profile_cells, run_cells
    from quantlab.models import model_label
    from quantlab.plan import engine_options
    from quantlab.report.comparison import csv_table, json_rows, markdown_table
    from quantlab.report.html import FILE_NAME, write_report

    if csv_file is not None and not csv_file.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {csv_file.parent} does not exist", param_hint="--csv")
    quiet = session.quiet or as_json
    methods_known = registry.available().keys()
    folder = output_dir or Path("runs") / f"compare-{model_label(model)}"
    common = common_recipe(
        model=model,
        dtype=dtype,
        calibration=calibration,
        num_samples=num_samples,
        sequence_length=sequence_length,
        group_size=group_size,
        texts=texts,
        num_windows=num_windows,
        tasks=tasks,
        limit=limit,
    )
    cells = plan_cells(
        parse_variants(methods, [setting for setting in settings if setting.partition(".")[0] in methods_known]),
        _widths(bits),
        seeds,
        common,
        [setting for setting in settings if setting.partition(".")[0] not in methods_known],
        folder,
    )

    def announce(cell: "Cell", position: int) -> None:
        if not quiet:
            click.echo(f"[{position + 1}/{len(cells)}] {cell.name}", err=True)

    budget_bytes = engine_options(cells[0].assignment.loaded.recipe).memory_budget_bytes
    with (
        opened_executor() as executor,
        choose_progress(quiet=quiet, budget_bytes=budget_bytes) as progress,
        StopSignals() as stop,
    ):
        run_cells(cells, shlex.join(["quantlab", *session.arguments]), progress, stop, announce, executor)
        if profile:
            profile_cells(cells, progress)
    rows = _rows(cells)
    (folder / "compare.json").write_text(json.dumps(json_rows(rows), indent=2) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(markdown_table(rows), encoding="utf-8")
    if any(row.seeds for row in rows):
        write_report([folder], folder / FILE_NAME)
    if csv_file is not None:
        csv_file.write_text(csv_table(rows), encoding="utf-8")
    _print(rows, folder, as_json)
    failed = [cell for cell in cells if cell.failure is not None]
    if failed:
        raise QualityError(f"{len(failed)} of {len(cells)} runs failed; the first: {failed[0].failure}")


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 4,3", param_hint="--bits") from error


def _rows(cells: Sequence["Cell"]) -> list["ComparisonRow"]:
    from quantlab.report.comparison import comparison_row, mark_budgets
    from quantlab.report.record import read_record

    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.variant, cell.bits), []).append(cell)
    return mark_budgets(
        [
            comparison_row(
                variant,
                bits,
                [read_record(cell.folder) for cell in group if cell.finished],
                next((cell.failure for cell in group if cell.failure is not None), None),
            )
            for (variant, bits), group in groups.items()
        ]
    )


def _print(rows: Sequence["ComparisonRow"], folder: Path, as_json: bool) -> None:
    from quantlab.report.comparison import json_rows, rich_table
    from quantlab.report.html import FILE_NAME

    if as_json:
        click.echo(json.dumps(json_rows(rows), indent=2))
        return
    console = open_console()
    if not console.is_terminal:
        console.width = 160  # rich assumes 80 columns where there is no terminal, which would wrap the table
    console.print(rich_table(rows))
    click.echo(f"comparison: {folder}")
    if any(row.seeds for row in rows):
        click.echo(f"report:     {folder / FILE_NAME}")
