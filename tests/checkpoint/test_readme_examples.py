"""The README's examples do what they say; `<!-- example: NAME -->` marks them."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import quantlab
from quantlab.cli.app import invoke

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"<!-- example: (\w+) -->\n```(python|bash)\n(.*?)```", README.read_text(), re.S)
SMALL = ["calibration.num_samples=2", "calibration.sequence_length=64", "evaluation.perplexity=[]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs that the examples start from, made in a hurry."""
    folder = tmp_path_factory.mktemp("readme")
    quantlab.run("rtn_w4", overrides=SMALL, output_dir=folder / "runs" / "rtn_w4-demo")
    shutil.copytree(folder / "runs" / "rtn_w4-demo", folder / "runs" / "ganq_w4-demo")
    return folder


def test_the_readme_shows_how_to_load_generate_evaluate_and_export():
    assert [name for name, _, _ in BLOCKS] == ["load", "generate", "evaluate", "export"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's own
def test_the_examples_run_one_after_the_other(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    namespace = {}
    for name, language, source in BLOCKS:
        if name == "evaluate":
            pytest.importorskip("lm_eval")
        if language == "python":
            exec(compile(source, f"README example {name}", "exec"), namespace)
        else:
            for line in source.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "quantlab"
                assert invoke(arguments) == 0, line
    assert (runs / "my-model" / "config.json").is_file()
    assert (runs / "runs" / "rtn_w4-demo-compressed-tensors" / "config.json").is_file()
    assert "def main():" in capsys.readouterr().out
