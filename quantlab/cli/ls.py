"""`quantlab ls`: what is there to use."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from quantlab.cli.options import common_options, examples, json_option


@click.group(
    short_help="List methods, recipes, models, data sets or kernels.",
    epilog=examples("quantlab ls methods", "quantlab ls recipes --json"),
)
@common_options
def ls() -> None:
    """List what can be used."""


@ls.command(
    short_help="Installed quantization methods.",
    epilog=examples("quantlab ls methods", "quantlab ls methods --options"),
)
@click.option("--options", "with_options", is_flag=True, help="Load each method, and list its abilities and options.")
@json_option
@common_options
def methods(with_options: bool, as_json: bool) -> None:
    """List the installed methods and the distributions they come from."""
    from quantlab import registry

    rows = [dataclasses.asdict(entry) for entry in registry.available().values()]
    if with_options:
        rows = [{**row, **_abilities(row["name"])} for row in rows]
    _print(rows, as_json)


@ls.command(short_help="Built-in recipes.", epilog=examples("quantlab ls recipes"))
@json_option
@common_options
def recipes(as_json: bool) -> None:
    """List the built-in recipes; `quantlab run NAME` runs one, `quantlab show NAME` prints it."""
    from quantlab.recipe import builtin_recipes

    _print([{"name": name, "summary": _summary(path)} for name, path in builtin_recipes().items()], as_json)


@ls.command(short_help="Short names of models.", epilog=examples("quantlab ls models"))
@json_option
@common_options
def models(as_json: bool) -> None:
    """List the short names of models; any folder or hub id can be used as well."""
    from quantlab.models import ALIASES

    _print([{"name": name, **dataclasses.asdict(alias)} for name, alias in ALIASES.items()], as_json)


@ls.command(short_help="Text for calibration and evaluation.", epilog=examples("quantlab ls datasets"))
@json_option
@common_options
def datasets(as_json: bool) -> None:
    """List the text sources; `quantlab data prepare NAME` makes a corpus ready."""
    from quantlab.calibration.corpora import CORPORA
    from quantlab.calibration.prepared import prepared_corpora, prepared_splits

    rows = [{"name": "stdlib", "state": "ready", "note": "the standard library of the running Python"}]
    for name in dict.fromkeys([*CORPORA, *prepared_corpora()]):
        note = CORPORA[name].note if name in CORPORA else "your own"
        rows.append({"name": name, "state": ", ".join(prepared_splits(name)) or "not prepared", "note": note})
    _print([*rows, {"name": "file:PATH", "state": "ready", "note": "a UTF-8 text file"}], as_json)


@ls.command(short_help="Native kernels.", epilog=examples("quantlab ls kernels"))
@json_option
@common_options
def kernels(as_json: bool) -> None:
    """List the native kernels of this machine, compiled if they are not yet, or why there are none."""
    from quantlab.doctor import kernel_states

    _print([{"name": name, "state": state} for name, state in kernel_states().items()], as_json)


def _abilities(name: str) -> dict[str, str]:
    """What a method can do; a broken one says why instead, and does not keep the others from being listed."""
    from quantlab import registry
    from quantlab.errors import PluginError

    try:
        method_class = registry.load(name)
    except PluginError as error:
        return {"summary": f"broken: {error}"}
    info = method_class.info
    fields = dataclasses.fields(method_class)  # type: ignore[arg-type]  # the registry admits dataclasses only
    return {
        "summary": info.summary,
        "paper": info.paper,
        "bits": ", ".join(str(bits) for bits in sorted(info.bits)),
        "groups": "yes" if info.supports_groups else "no",
        "options": ", ".join(f"{field.name}={field.default}" for field in fields),
        "presets": ", ".join(info.presets),
    }


def _summary(path: Path) -> str:
    """A recipe's first line, without the comment mark."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip("# \n")


def _print(rows: Sequence[Mapping[str, str]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif any(len(row) > 4 for row in rows):  # too much for one line each
        for row in rows:
            click.echo(click.style(row["name"], bold=True))
            for key, value in row.items():
                if key != "name" and value:
                    click.echo(f"  {key}: {value}")
    else:
        widths = [max(len(row[key]) for row in rows) for key in rows[0]] if rows else []
        for row in rows:
            click.echo(
                "  ".join(f"{value:<{width}}" for value, width in zip(row.values(), widths, strict=True)).rstrip()
            )
