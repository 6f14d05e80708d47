import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantlab.cli.app import invoke
from quantlab.errors import UsageError
from quantlab.executors import LocalExecutor
from quantlab.progress import NoProgress


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """Stands in for the pipeline and the model folder; remembers its calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantlab.models.resolve_model", lambda name: tmp_path / "model" / name)
    calls = SimpleNamespace(free=[], executed=None)

    def execute(assignment, model_folder, output_dir, progress, command, stop, *, executor):
        calls.executed = SimpleNamespace(**locals())
        output_dir.mkdir(parents=True)
        (output_dir / "manifest.json").write_text(json.dumps(MANIFEST))
        (output_dir / "eval.json").write_text('{"perplexity": {}}')
        return output_dir

    def default_output_dir(loaded):
        return Path("runs/default")

    stub = SimpleNamespace(default_output_dir=default_output_dir, execute=execute)
    monkeypatch.setitem(sys.modules, "quantlab.pipeline", stub)
    monkeypatch.setitem(sys.modules, "quantlab.workspace", SimpleNamespace(require_free=calls.free.append))
    calls.stub = stub
    return calls


MANIFEST = {
    "model": {"parameters": 1000},
    "method": {"name": "ganq"},
    "bits": 3,
    "group_size": None,
    "bits_per_weight": 3.25,
    "checkpoint_bytes": 900,
    "source_bytes": 2000,
    "peak_rss_bytes": 5000,
    "stages_s": {"quantize": 1.5},
}


def test_run_executes_the_recipe_and_prints_the_result(pipeline, capsys, tmp_path):
    arguments = ["run", "ganq_w4", "--set", "method.bits=3", "--output_dir", "out", "-q"]
    assert invoke(arguments) == 0
    executed = pipeline.executed
    assert executed.assignment.loaded.recipe.method.bits == 3
    assert executed.assignment.default.quantizer.info.name == "ganq"
    assert executed.model_folder == tmp_path / "model" / "demo"
    assert isinstance(executed.progress, NoProgress)
    assert isinstance(executed.executor, LocalExecutor)
    assert executed.command == "quantlab run ganq_w4 --set method.bits=3 --output_dir out -q"
    output = capsys.readouterr().out
    assert "ganq 3-bit" in output
    assert "3.250" in output
    assert "run folder: out" in output


def test_the_output_folder_has_a_default(pipeline):
    assert invoke(["run", "ganq_w4", "--model", "facebook/opt-125m", "-q"]) == 0
    assert str(pipeline.executed.output_dir) == "runs/default"
    assert pipeline.executed.assignment.loaded.origins["model.path"] == "--model"


def test_occupied_output_folder_is_refused_before_any_work(pipeline, monkeypatch, capsys):
    def refuse(folder):
        raise UsageError(f"{folder} is not empty")

    monkeypatch.setattr(sys.modules["quantlab.workspace"], "require_free", refuse)
    monkeypatch.setattr("quantlab.models.resolve_model", lambda name: pytest.fail("work was done"))
    assert invoke(["run", "ganq_w4", "--output-dir", "full"]) == 2
    assert "full is not empty" in capsys.readouterr().err
    assert pipeline.executed is None


def test_progress_goes_to_stderr_so_that_stdout_is_the_result(pipeline, capsys):
    execute = pipeline.stub.execute

    def execute_with_progress(*arguments, **options):
        progress = arguments[3]
        progress.begin("quantizing", 1, "layers")
        progress.advance(detail="block 1/1")
        return execute(*arguments, **options)

    pipeline.stub.execute = execute_with_progress
    assert invoke(["run", "ganq_w4"]) == 0
    captured = capsys.readouterr()
    assert "quantizing: 1 layers" in captured.err
    assert "block 1/1" in captured.err
    assert "quantizing" not in captured.out


def test_arguments_with_spaces_are_quoted_in_the_recorded_command(pipeline):
    assert invoke(["run", "ganq_w4", "-q", "--output-dir", "my runs"]) == 0
    assert pipeline.executed.command == "quantlab run ganq_w4 -q --output-dir 'my runs'"
