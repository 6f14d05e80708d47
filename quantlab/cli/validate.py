"""`quantlab validate`: check recipes without running them."""

import click

from quantlab.cli.options import common_options, examples
from quantlab.errors import QuantlabError, RecipeError


@click.command(
    short_help="Check recipes without running them.",
    epilog=examples("quantlab validate my_recipe.yaml", "quantlab validate recipes/*.yaml"),
)
@click.argument("recipes", nargs=-1, required=True)
@common_options
def validate(recipes: tuple[str, ...]) -> None:
    """Check RECIPES, including the methods they name, and report every problem; run nothing.

    Exits 78 if any recipe has a problem.
    """
    from quantlab.recipe import load_recipe
    from quantlab.recipe.layers import assign_methods

    failed = 0
    for recipe in recipes:
        try:
            assign_methods(load_recipe(recipe))
        except QuantlabError as error:
            failed += 1
            click.echo(str(error), err=True)
        else:
            click.echo(f"{recipe}: ok")
    if failed:
        raise RecipeError(f"{failed} of {len(recipes)} recipes cannot be run")
