"""The part of a recipe that only the method's own class can judge: name, preset, options, bits and groups."""

import typing

from quantlab import registry
from quantlab.errors import PluginError, RecipeError, did_you_mean
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.problems import Problem, recipe_error
from quantlab.recipe.schema import MethodSection

if typing.TYPE_CHECKING:  # imports torch, which reading a recipe must not
    from quantlab.api import LayerQuantizer, QuantizerInfo


def check_method(loaded: LoadedRecipe) -> "LayerQuantizer":
    """Import the recipe's method and configure it.

    Raises:
        RecipeError: the method cannot be loaded, or does not accept what the recipe asks; all problems at once.
    """
    return configure_method(loaded, loaded.recipe.method, "method")


def configure_method(loaded: LoadedRecipe, method: MethodSection, path: str) -> "LayerQuantizer":
    """Import a method and configure it.

    Args:
        loaded: the recipe, for messages.
        method: its method, for some layers possibly with other values.
        path: where those values stand, "method" or "layers[0]".

    Raises:
        RecipeError: the method cannot be loaded, or does not accept what is asked; all problems at once.
    """

    def origin(key: str) -> str:
        own = loaded.origins.get(f"{path}.{key}", "default")
        return own if own != "default" else loaded.origins[f"method.{key}"]

    try:
        method_class = registry.load(method.name)
    except PluginError as error:
        raise recipe_error(loaded.path, [Problem(origin("name"), str(error))]) from error
    problems = [
        Problem(origin(key), f"{path}.{key} {message}") for key, message in _budget_errors(method, method_class.info)
    ]
    for option, message in registry.option_errors(method_class, method.options).items():
        key = did_you_mean(option, registry.RESERVED_OPTIONS)  # a misspelt `group_size` arrives here as an option
        problems.append(Problem(origin(option), f"{path}.{option}: {message}{key}"))
    presets = method_class.info.presets
    if method.preset is not None and method.preset not in presets:
        hint = did_you_mean(method.preset, presets)
        message = f"{method.name} has no preset {method.preset!r}{hint}; presets: {', '.join(presets) or 'none'}"
        problems.append(Problem(origin("preset"), message))
    if problems:
        raise recipe_error(loaded.path, problems)
    try:
        return registry.configure(method.name, preset=method.preset, options=method.options)
    except RecipeError as error:  # values of the right types that the method itself refuses
        place = loaded.origins.get(f"{path}.match", loaded.origins["method.name"])
        raise recipe_error(loaded.path, [Problem(place, str(error))]) from error


def _budget_errors(method: MethodSection, info: "QuantizerInfo") -> list[tuple[str, str]]:
    """What the method refuses of the storage budget, as (key, message)."""
    errors = []
    if method.bits not in info.bits:
        supported = ", ".join(str(bits) for bits in sorted(info.bits))
        errors.append(("bits", f"is {method.bits}, but {info.name} supports {supported}"))
    if method.group_size is not None and not info.supports_groups:
        errors.append(
            ("group_size", f"is {method.group_size}, but {info.name} has one codebook per row; remove the line")
        )
    return errors
