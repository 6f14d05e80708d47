import dataclasses
import random
from pathlib import Path

import pytest

from quantlab import registry
from quantlab.errors import RecipeError
from quantlab.recipe import (
    MethodSection,
    ModelSection,
    Recipe,
    annotate_recipe,
    builtin_recipes,
    check_method,
    dump_recipe,
    load_recipe,
)

SMALLEST = "version: 1\nmethod:\n  name: rtn\n  bits: 4\n"


@pytest.fixture
def load(tmp_path):
    def load_text(text, overrides=(), **keywords):
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides, **keywords)

    return load_text


def test_smallest_recipe_gets_the_documented_defaults(load):
    recipe = load(SMALLEST).recipe
    assert recipe == Recipe(version=1, method=MethodSection(name="rtn", bits=4))
    assert (recipe.model.path, recipe.model.dtype, recipe.seed) == ("demo", "auto", 0)
    assert recipe.calibration.num_samples == 128
    assert recipe.evaluation.perplexity == ("stdlib",)


def test_every_value_knows_where_it_was_written(load):
    loaded = load(SMALLEST + "  damping: 1e-3\nevaluation: {sequence_length: 64}\n", ["seed=7"], model="gpt2")
    assert loaded.origins["method.bits"] == "my.yaml:4"
    assert loaded.origins["method.damping"] == "my.yaml:5"
    assert loaded.origins["evaluation.sequence_length"] == "my.yaml:6"
    assert loaded.origins["evaluation.perplexity"] == "default"
    assert loaded.origins["seed"] == "--set"
    assert loaded.origins["model.path"] == "--model"


def test_text_and_path_are_kept_as_given(load, tmp_path):
    text = "# my comment\n" + SMALLEST
    loaded = load(text)
    assert loaded.text == text
    assert loaded.path == tmp_path / "my.yaml"


def test_keys_that_are_not_of_the_schema_become_options_of_the_method(load):
    options = load(SMALLEST + "  damping: 1e-3\n  order: natural\n  deep: true\n  limit: null\n").recipe.method.options
    assert options == {"damping": 0.001, "order": "natural", "deep": True, "limit": None}
    assert type(options["damping"]) is float


def test_all_problems_are_reported_at_once_with_their_lines(load):
    text = "version: 2\nsead: 1\nmodel: {dtype: float23}\ncalibration:\n  num_samples: -1\nmethod:\n  name: rtn\n"
    with pytest.raises(RecipeError) as caught:
        load(text, ["evaluation.num_windows=many"])
    header, *problems = str(caught.value).splitlines()
    assert header.endswith("my.yaml has 6 problems")
    expected = [
        "my.yaml:1: version is 2, but must be 1",
        "my.yaml:2: sead is not a key of recipes; did you mean seed?",
        "my.yaml:3: model.dtype is 'float23', but must be one of auto, float32, bfloat16, float16; "
        "did you mean float32?",
        "my.yaml:5: calibration.num_samples is -1, but must be at least 1",
        "my.yaml:6: method.bits is missing; give the code width, for example `bits: 4`",
        "--set: evaluation.num_windows is 'many', but must be a whole number",
    ]
    assert [line.strip() for line in problems] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe must be a mapping of sections, not empty"),
        ("- 1\n", "a recipe must be a mapping of sections, not a list"),
        ("version: 1\n", "method is missing; add a section"),
        ("version: 1\nmethod:\n", r"my.yaml:2: method must be a section with keys, not empty"),
        ("version: 1\nmethod: {name: rtn, bit: 4}\n", "method.bits is missing.*or is `bit` meant to be it?"),
        ("version: 1\nmethod: {name: rtn, bits: 9}\n", "method.bits is 9, but must be between 2 and 8"),
        ("version: 1\nmethod: {name: rtn, bits: 1}\n", "method.bits is 1, but must be between 2 and 8"),
        ("version: 1\nmethod: {name: rtn, bits: 4.0}\n", "method.bits is 4.0, but must be a whole number"),
        ("version: 1\nmethod: {name: rtn, bits: true}\n", "method.bits is true, but must be a whole number"),
        ("version: 1\nmethod: {name: rtn, bits: '4'}\n", "method.bits is '4', but must be a whole number"),
        ("version: 1\nmethod: {name: 4, bits: 4}\n", "method.name is 4, but must be text; put it in quotes"),
        ("version: true\nmethod: {name: rtn, bits: 4}\n", "version is true, but must be 1"),
        ("version: 1.0\nmethod: {name: rtn, bits: 4}\n", "version is 1.0, but must be 1"),
        ("method: {name: rtn, bits: 4}\n", "begin the recipe with `version: 1`"),
        (SMALLEST + "  group_size: 0\n", "method.group_size is 0, but must be at least 1"),
        (SMALLEST + "  levels: [1, 2]\n", "method.levels must be a single value, not a list"),
        (SMALLEST + "seed: -1\n", "seed is -1, but must be at least 0"),
        (SMALLEST + "model: {path: ''}\n", "model.path is empty"),
        (
            SMALLEST + "calibration: {name: wikitext}\n",
            r"calibration.name is 'wikitext'; did you mean wikitext2\?",
        ),
        (SMALLEST + "calibration: {name: 'file:'}\n", "calibration.name is 'file:'"),
        (SMALLEST + "calibration: {nsamples: 1}\n", "calibration.nsamples is not a key.*did you mean num_samples"),
        (SMALLEST + "evaluation: {perplexity: stdlib}\n", r"must be a list, not 'stdlib'; write \['stdlib'\]"),
        (
            SMALLEST + "evaluation: {perplexity: [c4-old]}\n",
            r"evaluation.perplexity\[0\] is 'c4-old'.* also knows wikitext2",
        ),
        (SMALLEST + "evaluation: {perplexity: [stdlib, stdlib]}\n", "lists 'stdlib' twice"),
        (SMALLEST + "evaluation: {sequence_length: 1}\n", "sequence_length is 1, but must be at least 2"),
        (SMALLEST + "? [a]\n: 1\n", "a key must be a word"),
        (SMALLEST + "seed: 1\nseed: 2\n", "my.yaml:6: the key seed appears twice, first at my.yaml:5"),
        (SMALLEST + "seed: &a 1\n", "my.yaml:5: the anchor &a is not allowed"),
        ("version: 1\nmethod: &m {name: rtn, bits: 4}\nmodel: *m\n", r"my.yaml:3: the alias \*m is not allowed"),
        (SMALLEST + "seed: !!int '1'\n", "the tag tag:yaml.org,2002:int is not allowed"),
        (SMALLEST + "seed: !!python/object/apply:os.system [ls]\n", "the tag tag:yaml.org,2002:python/object"),
        (SMALLEST + "model: [\n", "my.yaml:6: not valid YAML"),
        (SMALLEST + "---\n" + SMALLEST, "not valid YAML: but found another document"),
        (SMALLEST + "a: \x07\n", "not valid YAML.*special characters"),
        (SMALLEST + "a: " + "[" * 5000, "nested deeper than 16 levels"),
        (b"version: \xff\n", r"not UTF-8 text \(byte 9\)"),
        (b"#" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_reason(load, text, message):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        load(text)


@pytest.mark.parametrize(
    "word", ["yes", "no", "on", "off", "True", "1:30", "010", "0x10", "1_000", ".inf", ".nan", "1e999"]
)
def test_ambiguous_words_are_text(load, word):
    assert load(SMALLEST + f"  option: {word}\n").recipe.method.options["option"] == word


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("-2.5", -2.5), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("~", None), ("'4'", "4")],
)
def test_scalars_follow_yaml_1_2(load, text, value):
    option = load(SMALLEST + f"  option: {text}\n").recipe.method.options["option"]
    assert option == value
    assert type(option) is type(value)


def test_damaged_recipes_raise_nothing_but_recipe_errors(load):
    generator = random.Random(0)
    text = builtin_recipes()["ganq_w4"].read_text()
    accepted = 0
    for _ in range(150):
        characters = list(text)
        for _ in range(generator.randint(1, 4)):
            characters[generator.randrange(len(characters))] = generator.choice("\n:{}[]&*!'\"#-?|>%@`\t 0e\x00é")
        try:
            load("".join(characters))
            accepted += 1
        except RecipeError:
            pass
    assert 0 < accepted < 150  # most damage hits the comment header; some must not


def test_later_overrides_win_and_dashes_are_accepted(load):
    recipe = load(SMALLEST, ["method.bits=3", "method.group-size = 64", "method.bits=2"]).recipe
    assert (recipe.method.bits, recipe.method.group_size) == (2, 64)


def test_an_override_can_clear_a_value_and_replace_a_list_or_a_section(load):
    text = SMALLEST + "  group_size: 64\n"
    recipe = load(text, ["method.group_size=null", "evaluation.perplexity=[stdlib, file:a.txt]"]).recipe
    assert recipe.method.group_size is None
    assert recipe.evaluation.perplexity == ("stdlib", "file:a.txt")
    assert load(text, ["method={name: ganq, bits: 3}"]).recipe.method == MethodSection(name="ganq", bits=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.bits", "'method.bits' is not of the form section.key=value"),
        ("method.bits=", "'method.bits=' is not of the form section.key=value"),
        ("=3", "is not of the form"),
        ("metod.bits=3", "metod is not a key of recipes; did you mean method?"),
        ("seed.value=3", "seed.value: seed is not a section"),
        ("seed.value.deep=3", "seed.value.deep: seed is not a section"),
        ("method.bits=12", "--set: method.bits is 12"),
        ("model.path=*x", r"the alias \*x is not allowed"),
        ("model.path=[", "not valid YAML"),
    ],
)
def test_a_bad_override_is_refused_with_the_reason(load, override, message):
    with pytest.raises(RecipeError, match=message):
        load(SMALLEST + "seed: 1\n", [override])


def test_model_names_are_taken_literally(load):
    assert load(SMALLEST, model="*strange: [name]").recipe.model.path == "*strange: [name]"


def test_a_model_cannot_be_put_where_there_is_no_section(load):
    with pytest.raises(RecipeError, match=r"--model: model.path: model is not a section"):
        load(SMALLEST + "model: 3\n", model="gpt2")


def test_builtin_recipes_are_found_by_name_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("ganq_w4").path == load_recipe("ganq_w4.yaml").path == builtin_recipes()["ganq_w4"]


def test_a_file_is_preferred_to_a_builtin_recipe_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("ganq_w4.yaml").write_text(SMALLEST)
    assert load_recipe("ganq_w4.yaml").recipe.method.name == "rtn"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gang_w4", "did you mean ganq_w4.*quantlab ls recipes"),
        ("elsewhere/ganq_w4.yaml", "for the built-in recipe of that name, write just ganq_w4"),
        (".", "is a folder, not a recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_explained(monkeypatch, tmp_path, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_recipe(source)


@pytest.mark.parametrize(
    "text",
    [
        *("demo", "a b", "1e-3", "04", "no", "null", "", "~", "file:x.txt", "x: y", "x #y", "- x", "trailing:", "[a]"),
        *("*a", "@x", '"', "\\n", "C:\\models", "a\nb\t", " padded ", "é", "😀", "\u2028", "\x7f", "\ufeff"),
    ],
)
def test_dumped_recipes_read_back_the_same(load, text):
    recipe = Recipe(
        version=1,
        model=ModelSection(path=f"x{text}"),
        method=MethodSection(
            name="m",
            bits=3,
            options={"text": text, "tiny": 1e-12, "large": 1e16, "flag": True, "count": -3, "none": None},
        ),
    )
    assert load(dump_recipe(recipe)).recipe == recipe


def test_dumped_lists_read_back_the_same(load):
    recipe = load(SMALLEST).recipe
    evaluation = dataclasses.replace(recipe.evaluation, perplexity=("stdlib", "file:a, b].txt"))
    recipe = dataclasses.replace(recipe, evaluation=evaluation)
    assert load(dump_recipe(recipe)).recipe == recipe


def test_annotated_recipes_name_origins_and_read_back_the_same(load):
    loaded = load(SMALLEST + "  damping: 0.5\n", ["seed=3"])
    text = annotate_recipe(loaded.recipe, loaded.origins)
    assert load(text).recipe == loaded.recipe
    lines = {line.split("#")[0].strip(): line.split("# ")[-1] for line in text.splitlines() if "#" in line}
    assert lines["bits: 4"] == "my.yaml:4"
    assert lines["seed: 3"] == "--set"
    assert lines["path: demo"] == "default"


def test_method_is_configured_from_preset_and_options(load):
    text = "version: 1\nmethod: {name: ganq, bits: 4, preset: paper, iterations: 3}\n"
    quantizer = check_method(load(text))
    assert quantizer.info.name == "ganq"
    assert quantizer.column_order == "natural"
    assert quantizer.iterations == 3


def test_everything_the_method_refuses_is_reported_at_once_with_lines(load):
    text = (
        "version: 1\nmethod:\n  name: ganq\n  bits: 4\n  group_size: 64\n  preset: papr\n  damping: high\n  iters: 3\n"
    )
    with pytest.raises(RecipeError, match="4 problems") as caught:
        check_method(load(text))
    message = str(caught.value)
    assert "my.yaml:5: method.group_size is 64, but ganq has one codebook per row" in message
    assert "my.yaml:6: ganq has no preset 'papr'; did you mean paper?; presets: best, paper, published_code" in message
    assert "my.yaml:7: method.damping: expected a finite float, got str 'high'" in message
    assert "my.yaml:8: method.iters: unknown option" in message


def test_a_misspelt_key_of_the_method_section_is_recognised(load):
    with pytest.raises(RecipeError, match=r"method.groupsize: unknown option.*did you mean group_size\?"):
        check_method(load(SMALLEST + "  groupsize: 64\n"))


def test_an_unknown_method_is_reported_with_its_line(load):
    with pytest.raises(RecipeError, match=r"my.yaml:3: method 'gang' is not installed; did you mean ganq\?"):
        check_method(load("version: 1\nmethod:\n  name: gang\n  bits: 4\n"))


def test_values_that_only_the_method_itself_can_judge_are_reported(load):
    with pytest.raises(RecipeError, match=r"(?s)my.yaml:3: method 'ganq' does not accept its options.*iterations"):
        check_method(load("version: 1\nmethod:\n  name: ganq\n  bits: 4\n  iterations: -1\n"))


def test_bits_that_the_method_does_not_support_are_refused(load, monkeypatch):
    only_three = dataclasses.replace(registry.load("rtn").info, bits=frozenset({3}))
    monkeypatch.setattr(registry.load("rtn"), "info", only_three)
    with pytest.raises(RecipeError, match=r"my.yaml:4: method.bits is 4, but rtn supports 3"):
        check_method(load(SMALLEST))
