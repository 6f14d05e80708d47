import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantlab import compare as module
from quantlab import pipeline
from quantlab.cli.app import invoke
from quantlab.engine import stream
from quantlab.errors import NumericalError, ResumableError

SMALL = ("--num-samples", "1", "--sequence-length", "32", "--num-windows", "2")
GANQ = ("--set", "ganq.iterations=1", "--set", "ganq.polish_rounds=0")


@pytest.fixture
def compare(tmp_path):
    def run(*arguments):
        return invoke(["compare", *arguments, *SMALL, "--output-dir", str(tmp_path / "out")])

    return run


@pytest.fixture
def executed(monkeypatch):
    """Names of the cells that were really computed."""
    names = []
    execute = module.execute

    def remember(assignment, model_folder, folder, *rest):
        names.append(folder.name)
        return execute(assignment, model_folder, folder, *rest)

    monkeypatch.setattr(module, "execute", remember)
    return names


def rows(tmp_path):
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_methods_share_calibration_and_evaluation_and_end_in_a_table(compare, tmp_path, capsys):
    assert compare("rtn", "gptq", "--bits", "4,3", "-q") == 0
    output = capsys.readouterr().out
    assert "KL to float" in output
    table = rows(tmp_path)
    assert [(line["variant"], line["bits"]) for line in table] == [("rtn", 4), ("gptq", 4), ("rtn", 3), ("gptq", 3)]
    cells = sorted((tmp_path / "out" / "cells").glob("*/manifest.json"))
    manifests = [json.loads(path.read_text()) for path in cells]
    assert len({manifest["calibration"]["token_sha256"] for manifest in manifests}) == 1
    assert len({line["reference"]["perplexity"]["stdlib"] for line in table}) == 1
    assert "| rtn | 4 |" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's own
def test_tasks_and_speed_are_measured_on_demand_and_the_float_model_answers_once(compare, tmp_path, monkeypatch, capfd):
    answered = []
    evaluate = pipeline.evaluate_tasks

    def remember(model, tokenizer, options, progress, stage):
        answered.append(stage)
        return evaluate(model, tokenizer, options, progress, stage)

    monkeypatch.setattr(pipeline, "evaluate_tasks", remember)
    monkeypatch.setattr(module, "PROFILED_TOKENS", 4)
    assert compare("rtn", "kmeans", "--tasks", "stdlib_continuation", "--limit", "4", "--profile", "-q") == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert "not measured" not in output
    assert answered == ["tasks, float model", "tasks, quantized model", "tasks, quantized model"]
    for line in rows(tmp_path):
        assert 0 <= line["accuracy"]["mean"] <= 1
        assert line["tokens_per_s"] > 0 < line["reference"]["tokens_per_s"]
    profile = tmp_path / "out/cells/rtn-w4-s0/profile.json"
    before = profile.stat().st_mtime_ns
    assert compare("rtn", "kmeans", "--tasks", "stdlib_continuation", "--limit", "4", "--profile", "-q") == 0
    assert profile.stat().st_mtime_ns == before


def test_gradients_of_the_float_model_are_collected_once_and_count_for_every_run(compare, tmp_path, monkeypatch):
    collected = []
    collect = stream.collect_gradients

    def remember(source, ids, dtype, options, folder, *rest):
        found = folder.exists()
        collected.append((found, collect(source, ids, dtype, options, folder, *rest)))
        return collected[-1][1]

    monkeypatch.setattr(stream, "collect_gradients", remember)
    assert compare("kmeans@squeezellm", "--bits", "4,3", "-q") == 0
    assert [found for found, _ in collected] == [False, True]
    for path in (tmp_path / "out" / "cells").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        assert manifest["stages_s"]["quantize"] > manifest["engine_s"]["statistics"] >= collected[0][1] - 0.001
    shared = json.loads((tmp_path / "out/cells/kmeans-squeezellm-w3-s0/manifest.json").read_text())
    recipe = tmp_path / "out" / "cells" / "kmeans-squeezellm-w3-s0.yaml"
    assert invoke(["run", str(recipe), "--output-dir", str(tmp_path / "alone"), "-q"]) == 0
    assert json.loads((tmp_path / "alone" / "manifest.json").read_text())["files"] == shared["files"]


def test_statistics_of_float_inputs_are_collected_once_and_change_nothing(compare, tmp_path, monkeypatch):
    computed = []
    collect = stream.collect_in_float_model

    def remember(asked, folder, *rest):
        computed.append(not folder.exists())
        return collect(asked, folder, *rest)

    monkeypatch.setattr(stream, "collect_in_float_model", remember)
    assert compare("rtn", "gptq", "--bits", "4,3", "--set", "calibration.inputs=float", "-q") == 0
    assert computed == [True, False, False, False]
    for name in ("rtn-w4-s0", "gptq-w3-s0"):
        cell, alone = tmp_path / "out" / "cells" / name, tmp_path / "alone" / name
        assert invoke(["run", f"{cell}.yaml", "--output-dir", str(alone), "-q"]) == 0
        assert file_hashes(alone / "manifest.json") == file_hashes(cell / "manifest.json")
    assert len(computed) == 4
    assert not (tmp_path / "out/cells/reference").exists()


def test_statistics_that_would_fill_the_disk_are_not_shared(compare, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "DISK_SHARE", 1e-12)
    monkeypatch.setattr(stream, "collect_in_float_model", None)
    assert compare("rtn", "--set", "calibration.inputs=float", "-q") == 0
    log = (tmp_path / "out/cells/rtn-w4-s0/log.txt").read_text()
    assert "every run collects its statistics: to share them would take up to" in log


def test_the_recipe_of_a_cell_repeats_it(compare, tmp_path):
    assert compare("kmeans", "--set", "kmeans.iterations=2", "--set", "calibration.target_alpha=0.5", "-q") == 0
    cell = tmp_path / "out/cells/kmeans-w4-s0"
    command = json.loads((cell / "manifest.json").read_text())["command"].split()
    assert command[:2] == ["quantlab", "run"]
    assert invoke([*command[1:], "--output-dir", str(tmp_path / "again"), "-q"]) == 0
    assert file_hashes(tmp_path / "again" / "manifest.json") == file_hashes(cell / "manifest.json")


def test_a_comparison_of_which_every_run_fails_says_why(compare, tmp_path, capsys):
    assert compare("rtn", "--group-size", "7", "-q") == 3
    assert "in_features=192 is not a multiple of group_size=7" in capsys.readouterr().err
    assert rows(tmp_path)[0]["seeds"] == 0
    assert not (tmp_path / "out" / "report.html").exists()


def test_finished_cells_are_never_computed_again_and_more_can_be_added(compare, executed, tmp_path):
    assert compare("rtn", "-q") == 0
    assert compare("rtn", "ganq", "--bits", "4,2", *GANQ, "-q") == 0
    assert executed == ["rtn-w4-s0", "ganq-w4-s0", "rtn-w2-s0", "ganq-w2-s0"]
    commands = (tmp_path / "out" / "commands.txt").read_text().splitlines()
    assert [command.split()[2:4] for command in commands] == [["rtn", "-q"], ["rtn", "ganq"]]


def test_a_stopped_comparison_goes_on_where_it_was(compare, executed, monkeypatch):
    execute = module.execute

    def stop_at_second(assignment, model_folder, folder, *rest):
        if len(executed) == 1:
            executed.append("stopped")
            raise ResumableError("stopped")
        return execute(assignment, model_folder, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "execute", stop_at_second)
        assert compare("rtn", "kmeans", "-q") == 75
    assert compare("rtn", "kmeans", "-q") == 0
    assert executed == ["rtn-w4-s0", "stopped", "kmeans-w4-s0"]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_the_same(compare, executed, tmp_path):
    assert compare("rtn", "kmeans", "gptq", "-q") == 0
    undisturbed = [(line["variant"], line["perplexity"], line["kl"]) for line in rows(tmp_path)]
    hashes = {path.parent.name: file_hashes(path) for path in (tmp_path / "out/cells").glob("*/manifest.json")}
    shutil.rmtree(tmp_path / "out")
    command = [sys.executable, "-m", "quantlab", "compare", "rtn", "kmeans", "gptq", *SMALL, "-q"]
    with subprocess.Popen([*command, "--output-dir", str(tmp_path / "out")]) as process:
        while not list((tmp_path / "out").glob("cells/*/manifest.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    executed.clear()
    assert compare("rtn", "kmeans", "gptq", "-q") == 0
    assert "rtn-w4-s0" not in executed
    assert [(line["variant"], line["perplexity"], line["kl"]) for line in rows(tmp_path)] == undisturbed
    again = {path.parent.name: file_hashes(path) for path in (tmp_path / "out/cells").glob("*/manifest.json")}
    assert again == hashes
    assert not (tmp_path / "out/cells/reference").exists()


def file_hashes(manifest):
    return json.loads(manifest.read_text())["files"]


def test_a_failed_cell_is_a_row_with_its_reason_and_is_tried_again(compare, monkeypatch, tmp_path, capsys):
    execute = module.execute

    def fail(assignment, model_folder, folder, *rest):
        if "gptq" in folder.name:
            raise NumericalError("gptq cannot quantize layer 3")
        return execute(assignment, model_folder, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "execute", fail)
        assert compare("gptq", "rtn", "-q") == 3
    assert "1 of 2 runs failed; the first: gptq cannot quantize layer 3" in capsys.readouterr().err
    assert [line["failure"] for line in rows(tmp_path)] == ["gptq cannot quantize layer 3", None]
    assert compare("gptq", "rtn", "-q") == 0
    assert [line["failure"] for line in rows(tmp_path)] == [None, None]


def test_variants_are_presets_and_recipe_files_and_take_their_own_options(compare, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("version: 1\nmethod: {name: kmeans, bits: 4, iterations: 3}\n")
    assert compare("ganq@paper", str(recipe), "--bits", "3", *GANQ, "--csv", str(tmp_path / "t.csv"), "-q") == 0
    manifests = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out/cells").glob("*/manifest.json")
    }
    assert manifests["ganq-paper-w3-s0"]["method"]["options"]["iterations"] == 1
    assert manifests["ganq-paper-w3-s0"]["method"]["options"]["column_order"] == "natural"
    assert manifests["mine-w3-s0"]["method"]["options"]["iterations"] == 3
    assert Path(tmp_path / "t.csv").read_text().startswith("variant,bits,seeds")


def test_the_same_folder_with_another_setting_is_refused(compare, capsys):
    assert compare("rtn", "-q") == 0
    assert compare("rtn", "-q", "--set", "calibration.target_alpha=0.5") == 2
    assert "holds a finished run with another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gang"], 78, "did you mean ganq"),
        (["rtn", "--bits", "four"], 2, "is not a list of numbers"),
        (["rtn", "--bits", "9"], 78, "bits is 9"),
        (["rtn", "--set", "rtn.clip=1"], 78, "rtn"),
        (["rtn", "--set", "gptq.damping=1"], 2, "only rtn take part"),
        (["rtn", "--set", "calibratoin.name=c4"], 78, "calibratoin is not a key"),
        (["rtn", "--set", "rtn"], 2, "is not of the form METHOD.OPTION=VALUE"),
        (["rtn", "--set", "method.bits=3"], 2, "use --bits, --group-size, --seeds"),
        (["rtn", "--set", "seed=3"], 2, "use --bits, --group-size, --seeds"),
        (["rtn", "gptq", "rtn"], 2, "would be the same run rtn-w4-s0"),
        (["rtn", "--bits", "4,3,4"], 2, "would be the same run rtn-w4-s0"),
        (["rtn@nice"], 78, "rtn has no preset 'nice'"),
        (["no_such.yaml"], 78, "no file and no built-in recipe no_such.yaml"),
        (["rtn", "--seeds", "0"], 2, "--seeds"),
        (["rtn", "--model", "no/such/folder"], 78, "no/such/folder"),
        (["rtn", "--csv", "no_such_folder/table.csv"], 2, "the folder no_such_folder does not exist"),
    ],
)
def test_mistakes_are_found_before_any_work(compare, executed, arguments, code, message, capsys, tmp_path):
    assert compare(*arguments) == code
    assert message in capsys.readouterr().err
    assert executed == []
    assert not (tmp_path / "out").exists()


def test_a_refused_setting_leaves_the_recipes_as_they_are(compare, tmp_path):
    assert compare("rtn", "-q") == 0
    recipe = (tmp_path / "out/cells/rtn-w4-s0.yaml").read_bytes()
    assert compare("rtn", "--set", "rtn.clip_search=weight", "-q") == 2
    assert (tmp_path / "out/cells/rtn-w4-s0.yaml").read_bytes() == recipe
    assert len((tmp_path / "out/commands.txt").read_text().splitlines()) == 1


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert invoke(["compare", "rtn", *SMALL, "--output-dir", str(tmp_path / "file" / "out"), "-q"]) == 2
    assert "choose another --output-dir" in capsys.readouterr().err
