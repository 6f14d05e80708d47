"""Recipes: one YAML file describes one run, completely.

Reading a recipe imports neither torch nor a method; only `check_method` does, because a method's own class says
which options, bit widths and groups it accepts.
"""

from quantlab.recipe.dump import annotate_recipe, dump_recipe
from quantlab.recipe.load import LoadedRecipe, builtin_recipes, lay_over, load_recipe
from quantlab.recipe.method import check_method
from quantlab.recipe.schema import (
    CalibrationSection,
    EvaluationSection,
    LayerRule,
    MethodSection,
    ModelSection,
    Recipe,
)

__all__ = [
    "CalibrationSection",
    "EvaluationSection",
    "LayerRule",
    "LoadedRecipe",
    "MethodSection",
    "ModelSection",
    "Recipe",
    "annotate_recipe",
    "builtin_recipes",
    "check_method",
    "dump_recipe",
    "lay_over",
    "load_recipe",
]
