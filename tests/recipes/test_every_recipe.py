import re

import pytest

from quantlab.recipe import builtin_recipes, check_method, load_recipe

RECIPES = [name for name in builtin_recipes() if "/" not in name]


def test_all_recipes_are_found():
    folder = builtin_recipes()[RECIPES[0]].parent
    files = {path.stem for path in folder.iterdir() if path.suffix in (".yaml", ".yml")}
    assert sorted(RECIPES) == sorted(files)
    assert len(files) >= 5


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_and_its_method_accepts_it(name):
    quantizer = check_method(load_recipe(name))
    assert name.startswith(quantizer.info.name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_name_states_its_bits(name):
    assert re.fullmatch(r"[a-z0-9]+_w([2-8])(_\w+)?", name)[1] == str(load_recipe(name).recipe.method.bits)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_opens_with_command_hardware_time_and_expectation(name):
    header = load_recipe(name).text.split("version:")[0]
    assert all(line.startswith("#") or not line for line in header.splitlines())
    for item in (f"quantlab run {name}\n", "Hardware:", "Time:", "Expected:"):
        assert item in header
    assert "<" not in header, "a placeholder was left for a measured number"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_without_network(name):
    recipe = load_recipe(name).recipe
    assert recipe.model.path == "demo"
    assert recipe.calibration.name == "stdlib"
    assert set(recipe.evaluation.perplexity) <= {"stdlib"}
