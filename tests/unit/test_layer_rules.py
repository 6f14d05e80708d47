import pytest

from quantlab.errors import RecipeError
from quantlab.recipe import LayerRule, dump_recipe, load_recipe
from quantlab.recipe.layers import assign_methods

RECIPE = "version: 1\nmethod: {name: gptq, bits: 4, group_size: 64, damping: 0.02}\nlayers:\n"
LAYERS = [f"model.layers.{index}.mlp.{name}" for index in range(2) for name in ("up_proj", "down_proj")]


@pytest.fixture
def assign(tmp_path):
    def from_text(rules, overrides=()):
        path = tmp_path / "mixed.yaml"
        path.write_text(RECIPE + rules)
        return assign_methods(load_recipe(path, overrides))

    return from_text


def test_a_rule_changes_only_what_it_names(assign):
    assignment = assign('  - {match: "*.down_proj", bits: 5, damping: 0.1}\n')
    plain, changed = (assignment.of(name) for name in LAYERS[:2])
    assert (plain.spec.bits, plain.spec.group_size, plain.quantizer.damping) == (4, 64, 0.02)
    assert (changed.spec.bits, changed.spec.group_size, changed.quantizer.damping) == (5, 64, 0.1)


def test_of_several_matching_rules_the_last_one_applies_alone(assign):
    rules = '  - {match: "*.down_proj", bits: 5}\n  - {match: "model.layers.1.*", group_size: 32}\n'
    assignment = assign(rules)
    assert [assignment.of(name).spec.bits for name in LAYERS] == [4, 5, 4, 4]
    assert [assignment.of(name).spec.group_size for name in LAYERS] == [64, 64, 32, 32]


def test_skipped_layers_have_no_method(assign):
    assignment = assign('  - {match: "model.layers.0.*", skip: true}\n')
    assert [assignment.of(name) is None for name in LAYERS] == [True, True, False, False]


def test_a_rule_that_matches_no_layer_is_refused_with_its_line_and_a_name_that_exists(assign):
    assignment = assign('  - {match: "*.gate_proj", bits: 5}\n')
    with pytest.raises(RecipeError, match=r"mixed.yaml:4: layers\[0\].match '\*.gate_proj' matches no layer.*up_proj"):
        assignment.require_use(LAYERS)


def test_a_rule_that_later_rules_overrule_everywhere_is_refused(assign):
    assignment = assign('  - {match: "*.up_proj", bits: 5}\n  - {match: "*", bits: 3}\n')
    with pytest.raises(RecipeError, match=r"layers\[0\].match '\*.up_proj' is overruled everywhere"):
        assignment.require_use(LAYERS)


def test_rules_that_all_apply_are_accepted(assign):
    assign('  - {match: "*", bits: 3}\n  - {match: "*.up_proj", bits: 5}\n').require_use(LAYERS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ('{match: "*", bits: 9}', r"layers\[0\].bits is 9, but must be between 2 and 8"),
        ('{match: "*", dampng: 0.1}', r"layers\[0\].dampng: .*did you mean damping"),
        ('{match: "*", damping: high}', r"layers\[0\].damping: "),
        ('{match: "*", skip: true, bits: 5}', r"layers\[0\] keeps its layers in floating point"),
        ('{match: "*"}', r"layers\[0\] changes nothing"),
        ("{bits: 5}", r"layers\[0\].match is missing"),
        ('{match: "", bits: 5}', r"layers\[0\].match is empty"),
        ("down_proj", r"layers\[0\] must be a section with keys"),
    ],
)
def test_a_wrong_rule_is_named_with_its_line(assign, rule, message):
    with pytest.raises(RecipeError, match=rf"mixed.yaml:4: {message}"):
        assign(f"  - {rule}\n")


def test_rules_survive_the_way_to_yaml_and_back(assign, tmp_path):
    rules = '  - {match: "*.down_proj", bits: 5, damping: 0.1}\n  - {match: "model.layers.0.*", skip: true}\n'
    recipe = assign(rules).loaded.recipe
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path).recipe == recipe
    assert recipe.layers[0] == LayerRule(match="*.down_proj", bits=5, options={"damping": 0.1})


def test_rules_can_be_given_on_the_command_line(assign):
    assignment = assign("  []\n", ['layers=[{match: "*.up_proj", bits: 8}]'])
    assert [assignment.of(name).spec.bits for name in LAYERS] == [8, 4, 8, 4]
