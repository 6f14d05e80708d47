"""The recipes that reproduce published figures can be run as they are, given the models and texts."""

import re

import pytest
import yaml

from quantlab.cli.app import invoke
from quantlab.evaluate.protocols import PROTOCOLS
from quantlab.models import ALIASES, resolve_config
from quantlab.plan import plan_run
from quantlab.recipe import builtin_recipes, load_recipe
from quantlab.recipe.layers import assign_methods

RECIPES = [name for name in builtin_recipes() if "/" in name]
FOLDER = builtin_recipes()[RECIPES[0]].parent
PUBLISHED = yaml.safe_load((FOLDER / "published.yaml").read_text())
DESCRIPTION = {"paper", "metric", "protocol", "sequence_length", "models", "tasks", "float"}
SAMPLES = {"opt": 32, "llama": 128}


def published_by_key(key):
    return [table for table in PUBLISHED if key in table]


@pytest.mark.parametrize("name", RECIPES)
def test_a_paper_recipe_can_be_planned_without_its_model(name):
    loaded = load_recipe(name)
    plan = plan_run(assign_methods(loaded), resolve_config(loaded.recipe.model.path))
    assert plan.quantized == plan.layers
    assert plan.calibration_tokens == loaded.recipe.calibration.num_samples * 2048


@pytest.mark.parametrize("name", RECIPES)
def test_a_paper_recipe_states_bits_and_family_and_follows_its_paper(name):
    recipe = load_recipe(name).recipe
    method, bits, family = re.fullmatch(r"paper/([a-z]+)(?:_[a-z]+)?_w([2-8])(?:_g128)?_(opt|llama)", name).groups()
    assert (recipe.method.name, recipe.method.bits) == (method, int(bits))
    assert recipe.method.group_size == (128 if "_g128_" in name else None)
    assert recipe.model.path.startswith(family)
    samples = 128 if method == "quantease" else SAMPLES[family]
    assert (recipe.calibration.name, recipe.calibration.num_samples) == ("c4", samples)


@pytest.mark.parametrize("name", RECIPES)
def test_a_paper_recipe_says_what_it_reproduces_and_that_nothing_was_run(name):
    header = load_recipe(name).text.split("version:")[0]
    for item in (f"quantlab run {name}\n", "Reproduces: ", "Published:  perplexity of ", "Not run here"):
        assert item in header


@pytest.mark.parametrize("name", RECIPES)
def test_a_paper_recipe_measures_what_is_published_for_its_model(name):
    recipe = load_recipe(name)
    evaluation, model = recipe.recipe.evaluation, recipe.recipe.model.path
    key = re.sub("_(opt|llama)$", "", name.removeprefix("paper/"))
    tables = [table for table in published_by_key(key) if model in table["models"]]
    assert tables
    perplexities = {
        table["protocol"]: table[key][table["models"].index(model)]
        for table in tables
        if table["metric"] == "perplexity"
    }
    assert perplexities.keys() <= set(evaluation.perplexity)
    for protocol, figure in perplexities.items():
        assert f"{protocol} {figure:g}" in recipe.text
    assert bool(evaluation.tasks) == any(table["metric"] == "accuracy" for table in tables)


@pytest.mark.parametrize("table", PUBLISHED, ids=lambda table: table["paper"])
def test_published_figures_are_complete_and_belong_to_recipes(table):
    assert set(table["models"]) <= ALIASES.keys()
    keys = {re.sub("_(opt|llama)$", "", name.removeprefix("paper/")) for name in RECIPES}
    assert table.keys() - DESCRIPTION <= keys
    for key in table.keys() - (DESCRIPTION - {"float"}):
        assert len(table[key]) == len(table["models"])
        if table["metric"] == "accuracy":
            assert all(len(row) == len(table["tasks"]) for row in table[key])
    assert table.get("protocol", "wikitext2") in PROTOCOLS


def test_paper_recipes_are_named_with_their_folder_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert invoke(["validate", "paper/ganq_w4_opt", "paper/rtn_w3_llama.yaml"]) == 0
    assert invoke(["show", "paper/ganq_w4_opt"]) == 0
    assert "preset: published_code" in capsys.readouterr().out
    assert invoke(["plan", "paper/rtn_w4_opt"]) == 0
    assert "runs/rtn_w4_opt-opt-125m" in capsys.readouterr().out
    assert invoke(["validate", "paper/published"]) != 0
    assert invoke(["validate", "ganq_w4_opt"]) != 0
    assert "did you mean" in capsys.readouterr().err
