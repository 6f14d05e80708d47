"""The keys of a recipe that are about the engine and its statistics."""

import pytest

from quantlab.errors import RecipeError
from quantlab.recipe import dump_recipe, load_recipe
from quantlab.recipe.size import parse_size

SMALLEST = "version: 1\nmethod: {name: rtn, bits: 4}\n"


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        path = tmp_path / "my.yaml"
        path.write_text(SMALLEST + text)
        return load_recipe(path)

    return load_text


def test_the_defaults_limit_nothing_and_measure_plainly(load):
    recipe = load("").recipe
    assert (recipe.engine.memory_budget, recipe.engine.activations, recipe.engine.deterministic) == (
        None,
        "auto",
        False,
    )
    assert (recipe.engine.rows_per_unit, recipe.engine.calibration_shards) == (None, 1)
    section = recipe.calibration
    assert (section.inputs, section.target_alpha, section.saliency_groups) == ("quantized", 0.0, 0)


def test_the_keys_read_back_the_same(load, tmp_path):
    text = (
        "engine: {memory_budget: 1.5GiB, activations: disk, deterministic: true, rows_per_unit: 512, "
        "calibration_shards: 8}\n"
        "calibration: {inputs: float, target_alpha: 1, saliency_groups: 4}\n"
    )
    recipe = load(text).recipe
    assert recipe.engine.memory_budget == "1.5GiB"
    assert (recipe.engine.rows_per_unit, recipe.engine.calibration_shards) == (512, 8)
    assert type(recipe.calibration.target_alpha) is float
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path).recipe == recipe


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("1.5 GiB", 3 * 2**29), ("900MiB", 900 * 2**20), ("2TiB", 2**41)]
)
def test_sizes_are_in_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["12", "12GB", "12 gib", "-1GiB", "0GiB", "1e3MiB", "GiB", "nanGiB", "1 2GiB"])
def test_other_sizes_are_refused_with_an_example(load, text):
    with pytest.raises(RecipeError, match=r"engine\.memory_budget is '.*', but must be a number .* example 12GiB"):
        load(f'engine: {{memory_budget: "{text}"}}\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {activations: gpu}\n", "engine.activations is 'gpu', but must be one of auto, ram, disk"),
        ("engine: {rows_per_unit: 0}\n", "engine.rows_per_unit is 0, but must be at least 1"),
        ("engine: {calibration_shards: 0}\n", "engine.calibration_shards is 0, but must be at least 1"),
        ("engine: {deterministic: 1}\n", "engine.deterministic is 1, but must be true or false"),
        ("calibration: {target_alpha: 2}\n", "calibration.target_alpha is 2, but must be between 0 and 1"),
        ("calibration: {target_alpha: true}\n", "calibration.target_alpha is true, but must be a number"),
        ("calibration: {saliency_groups: -1}\n", "calibration.saliency_groups is -1, but must be at least 0"),
        ("calibration: {inputs: both}\n", "calibration.inputs is 'both', but must be one of quantized, float"),
    ],
)
def test_values_that_mean_nothing_are_refused(load, text, message):
    with pytest.raises(RecipeError, match=message):
        load(text)
