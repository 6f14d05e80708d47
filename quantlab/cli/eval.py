"""`quantlab eval`: perplexity, divergence from the float model, and tasks."""

import json
from pathlib import Path
from typing import Any, Literal

import click

from quantlab.cli.options import (
    Session,
    common_options,
    device_option,
    examples,
    executor_options,
    json_option,
    open_console,
    opened_executor,
    tasks_option,
)
from quantlab.recipe.size import parse_size, size_error


def parse_budget(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Bytes of a size such as 12GiB."""
    if value is None:
        return None
    if problem := size_error(value):
        raise click.BadParameter(problem)
    return parse_size(value)


@click.command(
    "eval",
    short_help="Evaluate a model: perplexity, divergence, tasks.",
    epilog=examples(
        "quantlab eval runs/ganq_w4-demo --num-windows 32",
        "quantlab eval runs/ganq_w4-demo/model --against demo --perplexity stdlib --sequence-length 512",
        "quantlab eval runs/ganq_w4-demo --memory-budget 4GiB",
        "quantlab eval runs/ganq_w4-demo --layers --num-windows 32",
        "quantlab eval demo --tasks stdlib_continuation --limit 40",
        "quantlab eval ./my-model --perplexity wikitext2 --perplexity c4-new --tasks ganq-zeroshot",
    ),
)
@click.argument("model")
@click.option(
    "--against", metavar="MODEL", help="The float model to compare with.  [default: the one that the run started from]"
)
@click.option(
    "--perplexity",
    "protocols",
    multiple=True,
    metavar="TEXT",
    help="Protocol or text source, see `quantlab ls datasets`. May be repeated.  [default: stdlib without --tasks]",
)
@click.option(
    "--sequence-length", type=click.IntRange(min=2), help="Tokens per window.  [default: 2048, or the context]"
)
@click.option("--stride", type=click.IntRange(min=1), help="Tokens between windows.  [default: no overlap]")
@click.option("--bos", type=click.Choice(["none", "tokenizer", "each_window"]), help="[default: as the protocol says]")
@click.option("--num-windows", type=click.IntRange(min=1), help="Windows per text, evenly spread.  [default: all]")
@click.option(
    "--layers",
    is_flag=True,
    help="Measure the error of every layer of a run, on its calibration text and on the first --perplexity text.",
)
@tasks_option
@click.option("--tasks-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Local task files.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Solved examples before a question.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions per task.  [default: all]")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Questions at a time.")
@click.option("--log-samples", type=click.Path(path_type=Path), help="Write every question and answer to this file.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as stored]")
@click.option(
    "--memory-budget",
    metavar="SIZE",
    callback=parse_budget,
    help="Keep one block in memory at a time, within this size, for example 12GiB.  [default: if they do not fit]",
)
@device_option
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON to this file.")
@executor_options
@json_option
@common_options
@click.pass_obj
def evaluate(
    session: Session,
    model: str,
    against: str | None,
    protocols: tuple[str, ...],
    sequence_length: int | None,
    stride: int | None,
    bos: Literal["none", "tokenizer", "each_window"] | None,
    num_windows: int | None,
    layers: bool,
    tasks: tuple[str, ...],
    tasks_dir: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    log_samples: Path | None,
    dtype: str | None,
    memory_budget: int | None,
    device: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Evaluate MODEL: the folder of a run or of a checkpoint, or any float model.

    With a float model to compare with, perplexities come with the divergence (KL) from it and the share of tokens for
    which both models find the same token likeliest. Layer errors are also kept in the folder of the run (eval.json),
    where `quantlab report` finds them.
    """
    from quantlab.cli.progress import choose_progress
    from quantlab.evaluate.evaluation import EvaluationOptions, evaluate_subject
    from quantlab.evaluate.harness import TaskOptions
    from quantlab.evaluate.subject import find_subject

    subject = find_subject(model, device)
    origin = against or subject.source
    reference = find_subject(origin, device) if origin else None
    options = EvaluationOptions(
        protocols=protocols or (() if tasks and not layers else ("stdlib",)),
        sequence_length=sequence_length,
        stride=stride,
        bos=bos,
        num_windows=num_windows,
        layers=layers,
        tasks=TaskOptions(
            tasks=tasks, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, tasks_dir=tasks_dir
        ),
        samples_file=log_samples,
        dtype=dtype,
        memory_budget_bytes=memory_budget,
    )
    with opened_executor() as executor, choose_progress(quiet=session.quiet or as_json) as progress:
        results = evaluate_subject(subject, reference, options, progress, executor)
    if layers:
        keep_layer_errors(subject.folder.parent, results["layers"])
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        _print(results)


def keep_layer_errors(run_folder: Path, errors: dict[str, Any]) -> None:
    """Put layer errors beside what the run's own evaluation found."""
    from quantlab.checkpoint.atomic import replacing
    from quantlab.checkpoint.names import EVALUATION_NAME

    path = run_folder / EVALUATION_NAME
    content = json.loads(path.read_text(encoding="utf-8")) | {"layers": errors}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _print(results: dict[str, Any]) -> None:
    for protocol, values in results["perplexity"].items():
        where = f"{values['windows']} windows of {values['sequence_length']} tokens, bos {values['bos']}"
        click.echo(click.style(f"perplexity on {protocol}", bold=True) + f"  ({where})")
        if "kl" not in values:
            click.echo(f"  {values['perplexity']:.3f} ± {values['standard_error']:.3f}")
            continue
        click.echo(f"  float      {values['float']:.3f} ± {values['float_standard_error']:.3f}")
        click.echo(
            f"  quantized  {values['quantized']:.3f} ± {values['quantized_standard_error']:.3f}"
            f"  ({values['quantized'] / values['float'] - 1:+.2%})"
        )
        click.echo(f"  KL to float {values['kl']:.5f} ± {values['kl_standard_error']:.5f} nats per token")
        click.echo(f"  same likeliest token {values['top1_agreement']:.2%}")
    if "layers" in results:
        _print_layers(results["layers"])
    for name, task in results.get("tasks", {}).items():
        few = f"{task['num_fewshot']}-shot" if task["num_fewshot"] is not None else ""
        click.echo(
            click.style(f"task {name}", bold=True)
            + f"  ({task['samples']} questions, {few}, version {task['version']})"
        )
        for metric, value in task["metrics"].items():
            spread = "" if value["standard_error"] is None else f" ± {value['standard_error']:.4f}"
            click.echo(f"  {metric:<10} {value['value']:.4f}{spread}")


def _print_layers(errors: dict[str, Any]) -> None:
    from rich.table import Table

    from quantlab.report.layer_errors import TEXTS, by_role

    what = ", ".join(
        f"{text['windows']} windows of {text['sequence_length']} tokens of {text['source']} ({TEXTS[name]})"
        for name, text in errors["texts"].items()
    )
    click.echo(click.style("layer errors", bold=True) + f"  ({what})")
    table = Table(header_style="bold")
    table.add_column("layers", no_wrap=True)
    for title in ("count", "calibration", "held-out", "× rtn, held-out", "accumulated, held-out"):
        table.add_column(title, justify="right")
    for row in by_role(errors["layers"]):
        table.add_row(row.name, str(row.count), *row.cells())
    console = open_console()
    console.print(table)
    console.print(
        "share of the layer's output, geometric means over blocks; inputs of the float model, and for accumulated "
        "errors those behind the quantized layers before it",
        style="dim",
    )
