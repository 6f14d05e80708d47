"""A generated plugin project, and third parties' plugins that are broken, as separate distributions."""

import json
import os
import re
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from quantlab import registry
from quantlab.cli.app import invoke
from quantlab.scaffold import project_files

ROOT = Path(__file__).parents[2]


def distribute(folder, name, entry_points):
    """What an installer leaves in a folder of the import path."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{entry_points}\n")


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """A generated project, installed for this process."""
    folder = tmp_path / "project"
    assert invoke(["new-method", "toy_rounding", "--output-dir", str(folder)]) == 0
    assert "quantlab check toy_rounding" in capsys.readouterr().out
    declared = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    points = declared["entry-points"][registry.ENTRY_POINT_GROUP]
    distribute(folder, declared["name"], "\n".join(f"{name} = {target}" for name, target in points.items()))
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("quantlab_toy_rounding", None)


def test_a_generated_method_is_listed_with_its_distribution(project, capsys):
    assert invoke(["ls", "methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toy_rounding"]["distribution"] == "quantlab-toy-rounding"
    assert {"ganq", "rtn"} <= set(rows)


def test_a_generated_method_keeps_the_contract(project, capsys):
    code = invoke(["check", "toy_rounding"])
    captured = capsys.readouterr()
    assert code == 0, captured.out
    assert " passed" in captured.out


def test_a_generated_method_works_in_a_recipe(project, capsys):
    assert invoke(["show", "rtn_w4", "--set", "method.name=toy_rounding", "--set", "method.candidates=7"]) == 0
    assert "candidates: 7" in capsys.readouterr().out


def test_the_tutorial_is_what_new_method_writes():
    [(module, source)] = re.findall(
        r"<!-- tutorial: (\w+)\.py -->\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert module == "quantlab_clipped"
    assert source == project_files("clipped")["quantlab_clipped.py"]
    assert len(source.splitlines()) < 40


@pytest.mark.parametrize("name", ["Toy", "2bit", "a-b", "a__b", "_a", "class", "x" * 33, "../x", ""])
def test_impossible_names_are_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["new-method", name]) == 2
    assert "a method cannot be called" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_an_installed_method_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["new-method", "ganq"]) == 2
    assert "a method ganq is installed already" in capsys.readouterr().err


def test_a_folder_with_files_is_not_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["new-method", "toy"]) == 0
    assert invoke(["new-method", "toy"]) == 2
    assert "quantlab-toy is not empty" in capsys.readouterr().err


BROKEN = {
    "raises": "raise RuntimeError('half installed')",
    "exits": "import sys; sys.exit(5)",
    "lacks_its_class": "",
    "is_no_method": "Method = 3",
    "does_not_parse": "def (",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Third parties' plugins, each broken in its own way."""
    for name, source in BROKEN.items():
        (tmp_path / f"third_party_{name}.py").write_text(source)
        distribute(tmp_path, f"third-party-{name.replace('_', '-')}", f"{name} = third_party_{name}:Method")
    distribute(tmp_path, "third-party-without-module", "without_module = no_such_module:Method")
    distribute(tmp_path, "third-party-malformed", "malformed = ???")
    distribute(tmp_path, "third-party-claims-a-name", "raises = third_party_raises:Other")
    distribute(tmp_path, "third-party-without-value", "no value in this line")
    distribute(tmp_path, "third-party-undecodable", "")
    (tmp_path / "third_party_undecodable-0.1.0.dist-info" / "entry_points.txt").write_bytes(b"[\xff\xfe\x00")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    ["--help", "ls methods", "ls methods --options", "show rtn_w4", "validate rtn_w4 ganq_w4", "ls recipes"],
)
def test_broken_plugins_of_third_parties_break_nothing_else(broken, arguments, capsys):
    assert invoke(arguments.split()) == 0
    if arguments == "ls methods --options":
        listing = capsys.readouterr().out
        assert listing.count("summary: broken: ") == len(BROKEN) - 1 + 2  # of two that claim one name, none is listed
        assert "half installed" not in listing


@pytest.mark.parametrize("name", ["exits", "lacks_its_class", "is_no_method", "does_not_parse", "without_module"])
def test_a_broken_plugin_that_is_asked_for_is_one_clear_error(broken, name, capsys):
    assert invoke(["check", name]) == 78
    captured = capsys.readouterr()
    assert f"third-party-{name.replace('_', '-')} 0.1.0" in captured.err
    assert "Traceback" not in captured.err


def test_a_name_with_two_claims_says_by_whom(broken, capsys):
    assert invoke(["check", "raises"]) == 78
    assert "is claimed by third-party-" in capsys.readouterr().err


def test_doctor_names_every_broken_plugin(broken):
    from quantlab import doctor

    levels = {finding.name: finding.level for finding in doctor._methods()}
    undiscovered = {"third-party-without-value", "third-party-undecodable"}
    broken_names = {*BROKEN, "without_module", "malformed", *undiscovered}
    assert {name for name, level in levels.items() if level == "broken"} == broken_names
    assert levels["ganq"] == levels["rtn"] == "ok"


@pytest.mark.slow
def test_a_generated_project_installs_into_a_fresh_environment(tmp_path):
    project, environment = tmp_path / "project", tmp_path / "environment"
    assert invoke(["new-method", "toy", "--output-dir", str(project)]) == 0
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"

    def call(*command):
        shown = subprocess.run([python, *command], cwd=project, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        return shown.stdout

    # What quantlab itself needs is taken from this environment, editable installations included.
    [own] = call("-c", "import site; print(site.getsitepackages()[0])").splitlines()
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (Path(own) / "this_environment.pth").write_text("\n".join(lines) + "\n")
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, *install, "-e", str(project)], check=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    rows = {row["name"]: row for row in json.loads(call("-m", "quantlab", "ls", "methods", "--json"))}
    assert rows["toy"]["distribution"] == "quantlab-toy"
    call("-m", "quantlab", "check", "toy")
    call("-m", "pytest", "-q")
    small = ["--num-samples=1", "--sequence-length=32", "--num-windows=2", "--output-dir=compared", "--json"]
    quick = ["--set=ganq.iterations=1", "--set=ganq.polish_rounds=0"]
    compared = json.loads(call("-m", "quantlab", "compare", "toy", "ganq", *small, *quick))
    assert [(row["variant"], row["seeds"], row["failure"]) for row in compared] == [("toy", 1, None), ("ganq", 1, None)]
