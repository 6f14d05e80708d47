"""`quantlab profile`: speed and memory of generation."""

import json
from pathlib import Path
from typing import Any

import click

from quantlab.cli.options import Session, common_options, device_option, examples, json_option, open_console


@click.command(
    short_help="Measure generation: speed, memory, size.",
    epilog=examples(
        "quantlab profile runs/ganq_w4-demo --new-tokens 64",
        "quantlab profile runs/ganq_w4-demo --kernels --dtype bfloat16",
        "quantlab profile ./my-checkpoint --against ./float-model --dtype bfloat16",
    ),
)
@click.argument("model")
@click.option(
    "--against", metavar="MODEL", help="The float model to compare with.  [default: the one that the run started from]"
)
@click.option("--prompt", default="import os\n", show_default=True, help="Text to start from.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens to generate.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as stored]")
@device_option
@click.option("--kernels", is_flag=True, help="Instead, measure the product of one layer of every shape, beside dense.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the results as JSON to this file.  [default: profile.json in the folder of a run, without --kernels]",
)
@json_option
@common_options
@click.pass_obj
def profile(
    session: Session,
    model: str,
    against: str | None,
    prompt: str,
    new_tokens: int,
    repeats: int,
    dtype: str | None,
    device: str,
    kernels: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Generate from MODEL greedily, one sequence token by token, in turns with the float model.

    MODEL is the folder of a run or of a checkpoint, or any float model. Ratios are taken turn by turn. The folder of a
    run keeps the results as profile.json, which `quantlab report` reads.
    """
    from quantlab.checkpoint.atomic import replacing
    from quantlab.checkpoint.names import PROFILE_FILE
    from quantlab.cli.progress import choose_progress
    from quantlab.evaluate.kernels import KernelOptions, profile_kernels
    from quantlab.evaluate.profile import ProfileOptions, profile_subjects
    from quantlab.evaluate.subject import find_subject

    subject = find_subject(model, device)
    with choose_progress(quiet=session.quiet or as_json) as progress:
        if kernels:
            results = profile_kernels(subject, KernelOptions(repeats=repeats, dtype=dtype), progress)
        else:
            reference = against or subject.source
            subjects = [*([find_subject(reference, device)] if reference else []), subject]
            options = ProfileOptions(prompt=prompt, new_tokens=new_tokens, repeats=repeats, dtype=dtype)
            results = profile_subjects(subjects, options, progress)
    if output is None and subject.source is not None and not kernels:
        output = subject.folder.parent / PROFILE_FILE
    if as_json:
        click.echo(json.dumps(results, indent=2))
    elif kernels:
        _print_kernels(results)
    else:
        _print_generation(results)
    if output is not None:  # after the results are shown, which are not lost if they cannot be written
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _print_generation(results: dict[str, Any]) -> None:
    from rich.table import Table

    from quantlab.report.units import format_bytes, format_duration

    table = Table(header_style="bold")
    table.add_column("model")
    for name in ("tokens/s", "speed-up", "ms/token p50 p90 p99", "prefill tokens/s", "load", "on disk", "weights"):
        table.add_column(name, justify="right")
    for name, values in results["models"].items():
        low, high = values["speedup_range"]
        table.add_row(
            name,
            f"{values['tokens_per_s']:.1f}",
            f"{values['speedup']:.2f} ({low:.2f} to {high:.2f})",
            " ".join(f"{value:.2f}" for value in values["ms_per_token"].values()),
            f"{values['prefill_tokens_per_s']:.0f}",
            format_duration(values["load_s"]),
            format_bytes(values["bytes_on_disk"]),
            format_bytes(values["weight_bytes"]),
        )
    console = open_console()
    console.print(table)
    console.print(
        f"peak memory of the process: {format_bytes(results['peak_rss_bytes'])}; {results['threads']} threads"
    )
    for name, values in results["models"].items():
        if "cuda_s" in values:
            peak = format_bytes(values["device_peak_bytes"])
            console.print(f"{name}: {values['cuda_s']:.2f} s in kernels of one generation, peak memory {peak}")
    for name, values in results["models"].items():
        console.print(f"\n[bold]{name}[/bold]")
        console.print(values["text"], markup=False, highlight=False)


def _print_kernels(results: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("layer", no_wrap=True)
    for name in ("count", "inputs", "ms", "dense ms", "ratio", "spread"):
        table.add_column(name, justify="right")
    for layer in results["layers"]:
        group = "" if layer["group_size"] is None else f" g{layer['group_size']}"
        kind = f"{layer['out_features']}x{layer['in_features']} {layer['codebook']} {layer['bits']}-bit{group}"
        if layer["outliers"]:
            kind += " with outliers"
        for index, (inputs, values) in enumerate(layer["batches"].items()):
            low, high = values["speedup_range"]
            table.add_row(
                "" if index else kind,
                "" if index else str(layer["count"]),
                inputs,
                f"{values['ms']:.4f}",
                f"{values['dense_ms']:.4f}",
                f"{values['speedup']:.2f}",
                f"{low:.2f}–{high:.2f}",
            )
    console = open_console()
    console.print(table)
    console.print(f"{results['dtype']} on {results['device']}, {results['threads']} threads, torch {results['torch']}")
