"""The part of a recipe that only the method's own class can judge: name, preset, options, bits and groups."""

import typing

from quantlab import registry
from quantlab.errors import PluginError, RecipeError, did_you_mean
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.problems import Problem, recipe_error

if typing.TYPE_CHECKING:  # imports torch, which reading a recipe must not
    from quantlab.api import LayerQuantizer, QuantizerInfo


def check_method(loaded: LoadedRecipe) -> "LayerQuantizer":
    """Import the recipe's method and configure it.

    Raises:
        RecipeError: the method cannot be loaded, or does not accept what the recipe asks; all problems at once.
    """
    method = loaded.recipe.method
    try:
        method_class = registry.load(method.name)
    except PluginError as error:
        raise recipe_error(loaded.path, [Problem(loaded.origins["method.name"], str(error))]) from error
    problems = _budget_problems(loaded, method_class.info)
    for option, message in registry.option_errors(method_class, method.options).items():
        key = did_you_mean(option, registry.RESERVED_OPTIONS)  # a misspelt `group_size` arrives here as an option
        problems.append(Problem(loaded.origins[f"method.{option}"], f"method.{option}: {message}{key}"))
    presets = method_class.info.presets
    if method.preset is not None and method.preset not in presets:
        hint = did_you_mean(method.preset, presets)
        message = f"{method.name} has no preset {method.preset!r}{hint}; presets: {', '.join(presets) or 'none'}"
        problems.append(Problem(loaded.origins["method.preset"], message))
    if problems:
        raise recipe_error(loaded.path, problems)
    try:
        return registry.configure(method.name, preset=method.preset, options=method.options)
    except RecipeError as error:  # values of the right types that the method itself refuses
        raise recipe_error(loaded.path, [Problem(loaded.origins["method.name"], str(error))]) from error


def _budget_problems(loaded: LoadedRecipe, info: "QuantizerInfo") -> list[Problem]:
    method = loaded.recipe.method
    problems = []
    if method.bits not in info.bits:
        supported = ", ".join(str(bits) for bits in sorted(info.bits))
        message = f"method.bits is {method.bits}, but {info.name} supports {supported}"
        problems.append(Problem(loaded.origins["method.bits"], message))
    if method.group_size is not None and not info.supports_groups:
        message = f"method.group_size is {method.group_size}, but {info.name} has one codebook per row; remove the line"
        problems.append(Problem(loaded.origins["method.group_size"], message))
    return problems
