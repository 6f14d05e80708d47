import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from quantlab import registry
from quantlab.cli import app
from quantlab.cli.app import cli, invoke
from quantlab.errors import ModelError
from quantlab.recipe import builtin_recipes, load_recipe


def commands(group=cli, path=()):
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=lambda path: "-".join(path) or "root")
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_help_has_an_example_that_is_a_command_of_ours(path, flag, capsys):
    assert invoke([*path, flag]) == 0
    help_text = capsys.readouterr().out
    assert f"  quantlab {' '.join(path)}".rstrip() in help_text.split("Options:")[1]


def test_help_and_listings_do_not_import_torch():
    script = (
        "import sys; from quantlab.cli.app import invoke; "
        "light = ('--help', 'run -h', 'ls methods', 'ls recipes', 'ls models', 'run nothing'); "
        "codes = [invoke(arguments.split()) for arguments in light]; "
        "assert codes == [0, 0, 0, 0, 0, 78], codes; "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_version_is_printed(capsys):
    assert invoke(["--version"]) == 0
    assert capsys.readouterr().out.startswith("quantlab, version ")


def test_no_command_prints_the_help(capsys):
    assert invoke([]) == 2
    assert "Start here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["rum"], "No such command 'rum'"), (["run"], "'RECIPE'"), (["run", "x", "--sett", "a"], "--set")],
)
def test_wrong_usage_exits_2_with_the_reason(arguments, message, capsys):
    assert invoke(arguments) == 2
    assert message in capsys.readouterr().err


def test_known_errors_are_one_message_without_traceback(capsys):
    assert invoke(["show", "ganq_w4", "--set", "method.bits=99"]) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: recipe" in captured.err
    assert "--set: method.bits is 99, but must be between 2 and 8" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["-v", "show", "no"], ["show", "no", "-v"]])
def test_verbose_shows_the_traceback(arguments, capsys):
    assert invoke(arguments) == 78
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("x"), 1, "unexpected KeyError: 'x'"),
        (MemoryError(), 4, "out of memory: the system refused an allocation; try"),
        (torch.OutOfMemoryError("need 9 GiB"), 4, "out of memory: need 9 GiB; try"),
        (ModelError("no model"), 78, "error: no model"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_has_its_exit_code(error, code, message, monkeypatch, capsys):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("quantlab.recipe.load_recipe", fail)
    assert invoke(["show", "ganq_w4"]) == code
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr


def test_main_leaves_with_the_exit_code(monkeypatch):
    monkeypatch.setattr(app, "invoke", lambda arguments: 3)
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 3


def test_methods_are_listed_with_their_distribution(capsys):
    assert invoke(["ls", "methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(registry.available())
    assert rows["rtn"]["target"] == "quantlab_rtn:RtnQuantizer"


def test_methods_are_listed_with_options_on_request(capsys):
    assert invoke(["ls", "methods", "--options"]) == 0
    listing = capsys.readouterr().out
    assert "arXiv:2501.12956" in listing
    assert "presets: paper" in listing


def test_a_broken_method_does_not_hide_the_others(monkeypatch, capsys):
    entry = registry.PluginEntry(name="broken", target="quantlab_no_such:X", distribution="elsewhere", version="1")
    claims = {"broken": [entry], "rtn": [registry.available()["rtn"]]}
    monkeypatch.setattr(registry, "_all_claims", lambda: claims)
    assert invoke(["ls", "methods", "--options", "--json"]) == 0
    broken, rtn = json.loads(capsys.readouterr().out)
    assert "broken: " in broken["summary"]
    assert "quantlab_no_such" in broken["summary"]
    assert rtn["groups"] == "yes"


def test_recipes_are_listed_with_their_first_line(capsys):
    assert invoke(["ls", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(builtin_recipes())
    assert all(line.endswith(".") for line in lines)


def test_models_are_listed(capsys):
    assert invoke(["ls", "models"]) == 0
    assert "facebook/opt-125m" in capsys.readouterr().out


def test_show_prints_a_recipe_with_the_origin_of_every_value(tmp_path, capsys):
    arguments = ["show", "ganq_w4", "--set", "method.preset=paper", "--set", "method.iterations=3", "--model", "gpt2"]
    assert invoke(arguments) == 0
    text = capsys.readouterr().out
    values = [line for line in text.splitlines() if not line.endswith(":")]
    assert all("  # " in line for line in values)
    origins = {line.split("#")[0].strip(): line.split("# ")[1] for line in values}
    assert origins["column_order: natural"] == "preset paper"
    assert origins["iterations: 3"] == "--set"
    assert origins["path: gpt2"] == "--model"
    assert origins["group_size: null"] == "default"
    assert origins["bits: 4"].startswith("ganq_w4.yaml:")
    (tmp_path / "shown.yaml").write_text(text)
    assert load_recipe(tmp_path / "shown.yaml").recipe.method.options["column_order"] == "natural"


def test_validate_reports_every_recipe(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nmethod: {name: ganq, bits: 4, group_size: 8}\n")
    assert invoke(["validate", "ganq_w4", str(bad), "rtn_w4"]) == 78
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["ganq_w4: ok", "rtn_w4: ok"]
    assert "bad.yaml:2: method.group_size is 8" in captured.err
    assert "1 of 3 recipes cannot be run" in captured.err


@pytest.fixture
def checks(monkeypatch):
    """Replaces the contract's checks, which take seconds, by three results."""
    from quantlab import testing

    def result(name, status, message=""):
        return testing.CheckResult(name=name, promise="it holds", status=status, message=message)

    results = [
        result("holds", testing.Status.PASSED),
        result("breaks", testing.Status.FAILED, "1 is not 2"),
        result("is_void", testing.Status.SKIPPED, "does not apply"),
    ]
    monkeypatch.setattr(testing, "check_quantizer", lambda quantizer: results)
    return results


def test_check_exits_3_and_names_the_broken_promises(checks, capsys):
    assert invoke(["check", "rtn"]) == 3
    captured = capsys.readouterr()
    assert "failed   breaks: 1 is not 2" in captured.out
    assert "1 passed, 1 failed, 1 skipped" in captured.out
    assert "rtn breaks 1 of 3 promises: breaks" in captured.err


def test_check_exits_0_if_every_promise_is_kept(checks):
    del checks[1]
    assert invoke(["check", "rtn"]) == 0


def test_check_prints_json(checks, capsys):
    assert invoke(["check", "rtn", "--json"]) == 3
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"name": "breaks", "promise": "it holds", "status": "failed", "message": "1 is not 2"}


def test_check_of_an_unknown_method_suggests_one(capsys):
    assert invoke(["check", "gang"]) == 78
    assert "did you mean ganq?" in capsys.readouterr().err


def test_python_dash_m_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "quantlab", "run", "no_such_recipe"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 78
    assert "no_such_recipe" in finished.stderr
    assert list(Path(tmp_path).iterdir()) == []


def test_show_knows_layer_rules_the_engine_and_the_target(tmp_path, capsys):
    recipe = tmp_path / "rules.yaml"
    recipe.write_text(
        "version: 1\nmethod: {name: ganq, bits: 4}\ncalibration: {target_alpha: 0.5}\nengine: {memory_budget: 12GiB}\n"
        'layers:\n  - {match: "*.down_proj", bits: 3, iterations: 5}\n  - {match: "*.layers.0.*", skip: true}\n'
    )
    assert invoke(["show", str(recipe), "--set", "engine.deterministic=true"]) == 0
    text = capsys.readouterr().out
    origins = [tuple(part.strip(" -") for part in line.split("#")) for line in text.splitlines() if "  # " in line]
    assert ("target_alpha: 0.5", "rules.yaml:3") in origins
    assert ("memory_budget: 12GiB", "rules.yaml:4") in origins
    assert ("deterministic: true", "set") in origins
    first, second = (origins[start : start + 5] for start in range(len(origins)) if origins[start][0][:6] == "match:")
    assert first[2:] == [
        ("bits: 3", "rules.yaml:6"),
        ("group_size: null", "as in method"),
        ("iterations: 5", "rules.yaml:6"),
    ]
    assert second[1:4] == [("skip: true", "rules.yaml:7"), ("bits: null", "default"), ("group_size: null", "default")]
    (tmp_path / "shown.yaml").write_text(text)
    assert load_recipe(tmp_path / "shown.yaml").recipe.layers == load_recipe(recipe).recipe.layers


@pytest.mark.parametrize("path", list(commands()), ids=lambda path: "-".join(path) or "root")
def test_every_command_can_be_quiet_verbose_and_without_color(path, capsys):
    assert invoke([*path, "-h"]) == 0
    help_text = capsys.readouterr().out
    assert all(flag in help_text for flag in ("-q, --quiet", "-v, --verbose", "--no-color"))


@pytest.mark.parametrize(
    ("arguments", "variable", "colored"),
    [([], "", True), (["--no-color"], "", False), ([], "1", False)],
    ids=["default", "option", "NO_COLOR"],
)
def test_colors_can_be_turned_off(arguments, variable, colored, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda stream, color: color is False)  # as on a terminal
    assert invoke(["show", "no-such-recipe", *arguments]) == 78
    assert ("\x1b[" in capsys.readouterr().err) is colored


def test_tables_without_color_have_none(monkeypatch):
    from quantlab.cli.options import CONTEXT, open_console

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not open_console().no_color
    with click.Context(cli, color=False, **CONTEXT):
        assert open_console().no_color
