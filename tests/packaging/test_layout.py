import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("folder", ["plugins", "kernels", "recipes", "tests"])
def test_source_roots_and_data_folders_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_plugin_folder_has_an_entry_point():
    targets = PROJECT["project"]["entry-points"]["quantlab.quantizers"].values()
    folders = {
        path.name for path in (ROOT / "plugins").iterdir() if path.is_dir() and path.name.startswith("quantlab_")
    }
    assert folders == {target.partition(":")[0] for target in targets}
    assert {entry.value for entry in entry_points(group="quantlab.quantizers")} >= set(targets)


def test_every_plugin_is_under_the_architecture_contracts():
    folders = {path.name for path in (ROOT / "plugins").iterdir() if path.name.startswith("quantlab_")}
    for contract in PROJECT["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "independence":
            assert set(contract["modules"]) == folders
        elif "quantlab_rtn" in contract["forbidden_modules"]:
            assert set(contract["forbidden_modules"]) >= folders


def core_modules():
    return {
        f"quantlab.{path.stem}"
        for path in (ROOT / "quantlab").iterdir()
        if not path.stem.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }


def contract(name):
    return next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["name"].startswith(name))


def test_every_core_module_is_either_open_to_plugins_or_forbidden_to_them():
    open_to_plugins = {"quantlab.api", "quantlab.solvers", "quantlab.errors"}
    forbidden = set(contract("Plugins see only")["forbidden_modules"])
    assert core_modules() == open_to_plugins | (forbidden - {"quantlab_kernels"})


def test_every_core_module_is_kept_from_the_command_line():
    assert set(contract("Nothing imports the command line")["source_modules"]) == core_modules() - {"quantlab.cli"}


def test_constraints_pin_every_dependency():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = PROJECT["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[>]", requirement)[0].lower() for requirement in requirements}
    assert names - pinned == set()


BLOCK_AND_REPORT = """
import builtins, sys
blocked = set(sys.argv[1].split(","))
real = builtins.__import__
def guarded(name, *args, **kwargs):
    if name.partition(".")[0] in blocked:
        raise ImportError(name)
    return real(name, *args, **kwargs)
builtins.__import__ = guarded
import quantlab
"""


@pytest.mark.parametrize("absent", ["torch", "transformers", "lm_eval,datasets"])
def test_import_quantlab_works_without(absent):
    subprocess.run([sys.executable, "-c", BLOCK_AND_REPORT, absent], check=True)


def test_no_source_file_names_a_machine_path():
    files = [
        path
        for pattern in ("**/*.py", "**/*.yaml", "**/*.md")
        for path in ROOT.glob(pattern)
        if ".venv" not in path.parts
    ]
    assert files
    own = Path(__file__)
    offenders = [
        path for path in files if path != own and ("/work/" in path.read_text() or "/root/" in path.read_text())
    ]
    assert offenders == []
