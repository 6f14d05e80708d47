"""What the documents tell people to type must be what works."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantlab.testing import Status, check_quantizer

ROOT = Path(__file__).parents[2]


def test_the_methods_of_the_tutorial_pass_the_contract():
    blocks = re.findall(
        r"<!-- tutorial: (\w+)\.py -->\n```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert len(blocks) == 1
    name, source = blocks[0]
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, f"{name}.py", "exec"), vars(module))
        results = check_quantizer(module.ClippedQuantizer())
    finally:
        del sys.modules[name]
    assert [result for result in results if result.status is Status.FAILED] == []


@pytest.mark.parametrize("name", ["main job", "tests"])
def test_the_readme_has_the_commands_that_continuous_integration_runs(name):
    match = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert match is not None
    assert "pip install -c constraints.txt" in match[1]
    assert match[1].count("\n") == 1, "one command, one line"


def test_the_readme_tells_what_the_full_table_of_architectures_tells():
    full, short = (ROOT / "tests/engine/architectures.md").read_text(), (ROOT / "README.md").read_text()
    refused = re.findall(r"^\| refused: .*? \| (.*?) \|", full, re.M)
    told = re.findall(r"^\| \d+ \| refused: .*? \| (.*?) \|$", short, re.M)
    assert sorted(", ".join(told).split(", ")) == sorted(refused)
    exact = re.findall(r"^\| exact\b.*? (\d+) \|$", full, re.M)[:2]
    assert re.findall(r"^\| (\d+) \| exact", short, re.M) == exact
