"""Every example of every help text is run, or stands here with the reason why not."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from quantlab.cli.app import cli, invoke

DEMO = Path(__file__).parents[2] / "quantlab" / "demo" / "model"

NETWORK = "needs the network"
MINUTES = "takes minutes; the same command is tested on a smaller scale"
NOT_RUN = {
    "quantlab run ganq_w4": MINUTES,
    "quantlab run ganq_w4 --model facebook/opt-125m --set model.dtype=auto": NETWORK,
    "quantlab compare rtn gptq ganq --bits 4,3": MINUTES,
    "quantlab compare ganq ganq@paper gptq --model llama-7b --bits 4 --calibration c4 --perplexity wikitext2": NETWORK,
    "quantlab compare ganq lnq ./my_method.yaml --bits 3 --seeds 3 --set ganq.iterations=20": MINUTES,
    "quantlab compare rtn ganq --tasks stdlib_continuation --limit 100 --profile": MINUTES,
    "quantlab eval ./my-model --perplexity wikitext2 --perplexity c4-new --tasks ganq-zeroshot": NETWORK,
    "quantlab eval runs/ganq_w4-demo/model --against demo --perplexity stdlib --sequence-length 512": MINUTES,
    "quantlab eval runs/ganq_w4-demo --memory-budget 4GiB": MINUTES,
    "quantlab data prepare wikitext2": NETWORK,
    "quantlab check my_method --json": "is the reader's own method; test_new_method.py checks a generated one",
    "quantlab doctor": "says broken where the tests run without an installation; test_doctor.py",
    "quantlab doctor --json": "as above",
}
SECONDS = frozenset({"check", "eval", "export", "profile", "report"})
"""Commands whose examples take seconds, so that only the slow suite runs them."""
ALSO_SLOW = frozenset({"quantlab plan ganq_w4 --model llama-7b --set engine.memory_budget=12GiB"})


def examples_of(command):
    for line in (command.epilog or "").splitlines():
        if line.startswith("  quantlab "):
            yield re.split(r"\s{2,}", line.strip())[0]  # what follows is a remark
    for subcommand in getattr(command, "commands", {}).values():
        yield from examples_of(subcommand)


EXAMPLES = list(dict.fromkeys(examples_of(cli)))


def case(example):
    is_slow = shlex.split(example)[1] in SECONDS or example in ALSO_SLOW
    return pytest.param(example, id=example.removeprefix("quantlab "), marks=[pytest.mark.slow] if is_slow else [])


def pretend_ganq(path):
    """Times are scaled only from a run of the same method."""
    manifest = json.loads(path.read_text())
    manifest["method"]["name"] = "ganq"
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with everything that the examples name, small."""
    folder = tmp_path_factory.mktemp("examples")
    settings = ["calibration.num_samples=1", "calibration.sequence_length=32"]
    settings += ["evaluation.num_windows=2", "evaluation.sequence_length=64"]
    tiny = [f"--set={setting}" for setting in settings]
    run = folder / "runs" / "rtn_w4-demo"
    assert invoke(["run", "rtn_w4", *tiny, "--output-dir", str(run), "-q"]) == 0
    for name in ("ganq_w4-demo", "ganq_w3-demo", "gptq_w4-demo"):
        shutil.copytree(run, run.with_name(name))
    pretend_ganq(run.with_name("ganq_w3-demo") / "manifest.json")
    for name in ("path/to/checkpoint", "my-checkpoint"):
        shutil.copytree(run / "model", folder / name)
    shutil.copytree(DEMO, folder / "float-model")
    shutil.copy(run / "recipe.resolved.yaml", folder / "my_recipe.yaml")
    (folder / "recipes").mkdir()
    for name in ("one", "two"):
        shutil.copy(folder / "my_recipe.yaml", folder / "recipes" / f"{name}.yaml")
    (folder / "texts.jsonl").write_text(json.dumps({"title": "a title", "body": "and some text"}) + "\n")
    (folder / "downloads" / "c4").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "downloads" / "c4" / f"c4-{split}.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """A copy of it, and caches that are not the user's."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path / "data"))
    return folder


def arguments_of(example, folder):
    """As a shell would hand them over: patterns expanded, and no redirection."""
    for word in shlex.split(example.partition(" > ")[0])[1:]:
        yield from sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]


@pytest.mark.parametrize("example", [case(example) for example in EXAMPLES if example not in NOT_RUN])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's own
def test_every_example_works(example, workplace, tmp_path, monkeypatch, capsys):
    if example.startswith("quantlab cp "):
        (workplace / "my_recipe.yaml").unlink()
    if "--kernels" in example and "clean" in example:  # of this test, not of this machine
        monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    code = invoke(list(arguments_of(example, workplace)))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out


def test_the_examples_that_are_not_run_exist():
    assert set(NOT_RUN) | ALSO_SLOW <= set(EXAMPLES)
