"""The pages about machines: their scripts can be parsed, and their options of Ray exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PAGES = Path(__file__).parents[2] / "quantlab" / "executors" / "docs"


def blocks(language):
    """Every fenced block in a language, with the page that it is on."""
    for page in sorted(PAGES.glob("*.md")):
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S):
            yield pytest.param(block, id=f"{page.stem}: {block.splitlines()[0][:30]}")


@pytest.mark.parametrize("script", list(blocks("bash")))
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("document", list(blocks("yaml")))
def test_configurations_are_valid(document):
    assert yaml.safe_load(document)


def test_every_option_of_ray_start_exists():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'quantlab-ptq[ray]'")
    code = "from ray.scripts.scripts import cli; cli(['start', '--help'])"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    text = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    lines = re.findall(r"ray start (.*)", text) + re.findall(r'limits="(.*)"', text)
    used = {option for line in lines for option in re.findall(r"--[a-z-]+", line)}
    assert {"--head", "--address", "--object-spilling-directory", "--num-cpus"} <= used
    assert [option for option in sorted(used) if option not in known] == []


def test_every_page_says_what_was_checked():
    pages = [page for page in PAGES.glob("*.md") if page.name != "README.md"]
    assert len(pages) == 4
    for page in pages:
        assert "**Checked**" in page.read_text()
        assert "**Not checked**" in page.read_text()
        assert f"({page.name})" in (PAGES / "README.md").read_text()
