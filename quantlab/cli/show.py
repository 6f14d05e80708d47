"""`quantlab show`: the resolved recipe, and where each value comes from."""

import dataclasses
import typing

import click

from quantlab.cli.options import common_options, examples, recipe_options

if typing.TYPE_CHECKING:
    from quantlab.api import LayerQuantizer
    from quantlab.recipe import LoadedRecipe


@click.command(
    short_help="Print a recipe in full, with the origin of each value.",
    epilog=examples("quantlab show ganq_w4", "quantlab show ganq_w4 --set method.preset=paper > my_recipe.yaml"),
)
@recipe_options
@common_options
def show(recipe: str, model: str | None, overrides: tuple[str, ...]) -> None:
    """Print RECIPE with every default filled in; a comment behind each value says where it comes from.

    What is printed is itself a recipe.
    """
    from quantlab.recipe import annotate_recipe, check_method, load_recipe

    loaded = load_recipe(recipe, overrides, model=model)
    options, origins = _effective_options(loaded, check_method(loaded))
    method = dataclasses.replace(loaded.recipe.method, options=options)
    resolved = dataclasses.replace(loaded.recipe, method=method)
    inherited = {
        f"layers[{index}].{key}": "as in method"
        for index, rule in enumerate(resolved.layers)
        for key in ("bits", "group_size")
        if getattr(rule, key) is None and not rule.skip
    }
    click.echo(annotate_recipe(resolved, {**loaded.origins, **origins, **inherited}), nl=False)


def _effective_options(loaded: "LoadedRecipe", quantizer: "LayerQuantizer") -> tuple[dict[str, object], dict[str, str]]:
    """All options of the configured method, and the origins of those that the recipe does not set."""
    method, presets = loaded.recipe.method, quantizer.info.presets
    preset = presets[method.preset] if method.preset is not None else {}
    options, origins = {}, {}
    for field in dataclasses.fields(quantizer):  # type: ignore[arg-type]  # the registry admits dataclasses only
        options[field.name] = getattr(quantizer, field.name)
        if field.name not in method.options:
            origins[f"method.{field.name}"] = f"preset {method.preset}" if field.name in preset else "default"
    return options, origins
