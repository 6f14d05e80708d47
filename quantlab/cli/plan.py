"""`quantlab plan`: what a run would do and take, before anything heavy is done."""

import json
import typing
from pathlib import Path
from typing import Any

import click

from quantlab.cli.options import common_options, examples, json_option, recipe_options

if typing.TYPE_CHECKING:
    from quantlab.estimate import Estimate
    from quantlab.plan import Plan


@click.command(
    short_help="Say what a run would do, and what it would take.",
    epilog=examples(
        "quantlab plan ganq_w4",
        "quantlab plan ganq_w4 --model llama-7b --set engine.memory_budget=12GiB",
        "quantlab plan ganq_w3 --like runs/ganq_w3-demo",
    ),
)
@recipe_options
@click.option(
    "--like",
    metavar="RUN",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A finished run of the same method, from which times are scaled.",
)
@click.option("--layers", "with_layers", is_flag=True, help="List every layer.")
@json_option
@common_options
def plan(
    recipe: str, model: str | None, overrides: tuple[str, ...], like: Path | None, with_layers: bool, as_json: bool
) -> None:
    """Say what `quantlab run RECIPE` would do, how much memory, disk and time it would take, and what is wrong.

    Reads no weights: a model that is not on this machine is planned from its known dimensions. Exits 78 if the run
    cannot be made.
    """
    from quantlab.estimate import estimate_run
    from quantlab.models import resolve_config
    from quantlab.pipeline import default_output_dir
    from quantlab.plan import compute_dtype, engine_options, plan_run
    from quantlab.recipe import load_recipe
    from quantlab.recipe.layers import assign_methods

    loaded = load_recipe(recipe, overrides, model=model)
    config = resolve_config(loaded.recipe.model.path)
    planned = plan_run(assign_methods(loaded), config)
    device = engine_options(loaded.recipe).device
    estimate = estimate_run(planned, config, compute_dtype(loaded.recipe, config), like, device)
    if as_json:
        click.echo(json.dumps(_record(planned, estimate), indent=2))
        return
    rows = [
        *_plan_rows(planned),
        *_estimate_rows(planned, estimate, like),
        ("run folder", str(default_output_dir(loaded))),
    ]
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        click.echo(f"{what:<{width}}  {value}")
    if with_layers:
        _print_layers(planned, estimate)


def _plan_rows(planned: "Plan") -> list[tuple[str, str]]:
    from quantlab.report.units import format_bytes, format_count

    share = planned.quantized_parameters / planned.parameters
    return [
        ("architecture", planned.architecture),
        ("decoder blocks", str(planned.num_blocks)),
        ("layers to quantize", f"{len(planned.quantized)} of {len(planned.layers)}"),
        ("parameters", f"{format_count(planned.parameters)} ({share:.1%} quantized)"),
        ("calibration tokens", f"{planned.calibration_tokens:,}"),
        ("peak memory", format_bytes(planned.memory.peak_bytes)),
        *([("peak GPU memory", format_bytes(planned.memory.device_peak_bytes))] if planned.memory.on_device else []),
        *((f"  {name}", format_bytes(size)) for name, size in planned.memory.parts.items()),
    ]


def _estimate_rows(planned: "Plan", estimate: "Estimate", like: Path | None) -> list[tuple[str, str]]:
    from quantlab.report.units import format_bytes, format_duration

    basis = "from seconds of work on this machine" if like is None else f"scaled from {like}"
    duration = f"{format_duration(sum(estimate.seconds.values()))} ({basis})"
    if not estimate.seconds:
        duration = "not estimated: this machine does not have the device; --like RUN scales from a finished run"
    return [
        ("bits per weight", f"{estimate.bits_per_weight:.3f}"),
        ("checkpoint", format_bytes(estimate.checkpoint_bytes)),
        ("disk while running", format_bytes(estimate.checkpoint_bytes + planned.work_bytes)),
        ("time to quantize", duration),
        *((f"  {part}", format_duration(seconds)) for part, seconds in estimate.seconds.items()),
    ]


def _print_layers(planned: "Plan", estimate: "Estimate") -> None:
    click.echo()
    width = max(len(layer.name) for layer in planned.layers)
    for layer in planned.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        if layer.method is None:
            click.echo(f"{layer.name:<{width}}  {shape:>15}  kept")
            continue
        spec = layer.method.spec
        group = "per row" if spec.group_size is None else f"per {spec.group_size}"
        stored = 8 * estimate.layer_bytes[layer.name] / (layer.shape[0] * layer.shape[1])
        click.echo(f"{layer.name:<{width}}  {shape:>15}  {spec.bits} bits {group}  {stored:.3f} bits per weight")


def _record(planned: "Plan", estimate: "Estimate") -> dict[str, Any]:
    return {
        "architecture": planned.architecture,
        "num_blocks": planned.num_blocks,
        "parameters": planned.parameters,
        "quantized_parameters": planned.quantized_parameters,
        "calibration_tokens": planned.calibration_tokens,
        "memory": {
            "peak_bytes": planned.memory.peak_bytes,
            "device_peak_bytes": planned.memory.device_peak_bytes,
            "parts": planned.memory.parts,
        },
        "bits_per_weight": estimate.bits_per_weight,
        "checkpoint_bytes": estimate.checkpoint_bytes,
        "work_bytes": planned.work_bytes,
        "seconds": estimate.seconds,
        "layers": [
            {
                "name": layer.name,
                "shape": layer.shape,
                "bits": None if layer.method is None else layer.method.spec.bits,
                "group_size": None if layer.method is None else layer.method.spec.group_size,
                "bytes": estimate.layer_bytes.get(layer.name),
            }
            for layer in planned.layers
        ],
    }
