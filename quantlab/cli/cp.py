"""`quantlab cp`: a copy of a built-in recipe, to be changed."""

from pathlib import Path

import click

from quantlab.cli.options import common_options, examples
from quantlab.errors import RecipeError, UsageError, did_you_mean


@click.command(
    short_help="Copy a built-in recipe, to change it.",
    epilog=examples("quantlab cp ganq_w4 my_recipe.yaml", "quantlab cp rtn_w4 ."),
)
@click.argument("name")
@click.argument("target", metavar="DEST", type=click.Path(path_type=Path))
@common_options
def cp(name: str, target: Path) -> None:
    """Copy the built-in recipe NAME to DEST, a new file or a folder. `quantlab ls recipes` lists the names."""
    from quantlab.recipe import builtin_recipes

    builtin = builtin_recipes()
    if name not in builtin:
        raise RecipeError(f"no built-in recipe {name}{did_you_mean(name, builtin)}; there are {', '.join(builtin)}")
    path = target / builtin[name].name if target.is_dir() else target
    try:
        with path.open("xb") as copy:
            copy.write(builtin[name].read_bytes())
    except FileExistsError as error:
        raise UsageError(f"{path} exists and is not replaced; choose another name") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"{path}: run it with `quantlab run {path}`")
