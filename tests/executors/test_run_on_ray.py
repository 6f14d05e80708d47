"""One run on a cluster: its calibration in shards, its layers in pieces of rows; the same files as in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed: pip install 'quantlab-ptq[ray]'")

from quantlab.cli.app import invoke

sys.path.append(str(Path(__file__).parent))
from conftest import command, file_hashes, wait_for


@pytest.fixture(scope="module")
def recipe(tiny):
    """Three shards of one batch each, and layers of 32 and 64 rows in pieces of 24."""
    content = {
        "version": 1,
        "model": {"path": str(tiny / "model")},
        "calibration": {
            "name": f"file:{tiny / 'train.txt'}",
            "num_samples": 600,
            "sequence_length": 16,
            "target_alpha": 0.5,
        },
        "method": {"name": "ganq", "bits": 3, "iterations": 2, "polish_rounds": 1},
        "evaluation": {"perplexity": [f"file:{tiny / 'test.txt'}"], "sequence_length": 16, "num_windows": 2},
        "engine": {"deterministic": True, "rows_per_unit": 24, "calibration_shards": 3},
    }
    path = tiny / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def local(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    assert invoke(["run", str(recipe), "--output-dir", str(folder), "-q"]) == 0
    return folder


def test_three_nodes_write_what_one_process_writes(cluster, recipe, local, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--executor", "ray", "--address", cluster.address, "--output-dir", str(folder), "-q"]
    assert invoke(["run", str(recipe), *arguments]) == 0
    assert file_hashes(folder) == file_hashes(local)
    assert (folder / "eval.json").read_text() == (local / "eval.json").read_text()
    assert not (folder / "work").exists()


@pytest.mark.parametrize(
    "budget", [None, pytest.param("2GiB", marks=pytest.mark.slow)], ids=["in memory", "block by block"]
)
def test_an_evaluation_is_spread_with_the_same_figures(cluster, tiny, local, budget, tmp_path, monkeypatch):
    monkeypatch.setattr("quantlab.evaluate.perplexity.TOKENS_PER_BATCH", 32)  # several batches
    arguments = ["eval", str(local), "--perplexity", f"file:{tiny / 'test.txt'}", "--sequence-length", "16", "-q"]
    arguments += ["--memory-budget", budget] if budget else []
    outputs = [tmp_path / "here.json", tmp_path / "there.json"]
    assert invoke([*arguments, "--output", str(outputs[0])]) == 0
    remote = ["--executor", "ray", "--address", cluster.address, "--cpus-per-task", "1"]
    assert invoke([*arguments, *remote, "--output", str(outputs[1])]) == 0
    assert outputs[0].read_text() == outputs[1].read_text()


@pytest.mark.slow
def test_a_run_survives_a_node_and_resumes_after_its_head(own_cluster, recipe, local, tmp_path):
    doomed, folder = own_cluster(3), tmp_path / "run"
    arguments = command("run", recipe, "--executor", "ray", "--address", doomed.address, "--output-dir", folder, "-q")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        journal = folder / "journal.jsonl"
        wait_for(lambda: journal.is_file() and '"rest"' in journal.read_text(), process)
        doomed.remove_node(doomed.worker_nodes.copy().pop(), allow_graceful=False)
        wait_for(lambda: '"block"' in journal.read_text(), process)
        doomed.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        message = process.communicate(timeout=55)[1]
    assert process.returncode == 75, message
    assert "the same command continues the run" in message
    assert invoke(["run", str(recipe), "--output-dir", str(folder), "-q"]) == 0
    assert file_hashes(folder) == file_hashes(local)
