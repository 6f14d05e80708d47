"""The runs of a comparison on a cluster: the same files as in one process, whatever is lost on the way."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'quantlab-ptq[ray]'")

from quantlab.cli.app import invoke

sys.path.append(str(Path(__file__).parent))
from conftest import cells, command, processes_with, wait_for

METHODS = ["compare", "rtn", "gptq", "lnq", "--bits", "3"]


@pytest.fixture(scope="module")
def local(on_tiny, tmp_path_factory):
    """The comparison in one process."""
    folder = tmp_path_factory.mktemp("local")
    assert invoke([*METHODS, *on_tiny, "--output-dir", str(folder), "-q"]) == 0
    return cells(folder)


def test_three_nodes_write_what_one_process_writes(cluster, on_tiny, local, tmp_path, capsys):
    arguments = ["--executor", "ray", "--address", cluster.address, "--output-dir", str(tmp_path)]
    assert invoke([*METHODS, *on_tiny, *arguments]) == 0
    assert cells(tmp_path) == local
    shown = capsys.readouterr().err
    assert "comparing: 3 runs" in shown
    assert "3/3 runs, done" in shown
    assert not (tmp_path / "cells/reference").exists()


def test_runs_side_by_side_share_the_statistics_of_the_float_model(cluster, on_tiny, tmp_path):
    arguments = [*METHODS, *on_tiny, "--set", "calibration.inputs=float", "-q", "--output-dir"]
    assert invoke([*arguments, str(tmp_path / "local")]) == 0
    assert invoke([*arguments, str(tmp_path / "ray"), "--executor", "ray", "--address", cluster.address]) == 0
    assert cells(tmp_path / "ray") == cells(tmp_path / "local")
    logs = [path.read_text() for path in tmp_path.glob("ray/cells/*/log.txt")]
    assert len(logs) == 3
    assert sum("statistics of the float model" in log for log in logs) == 1


def test_a_lost_node_is_made_up_for_and_a_lost_head_is_an_exit_to_resume_from(own_cluster, on_tiny, local, tmp_path):
    doomed = own_cluster(3)
    arguments = [*METHODS, *on_tiny, "--executor", "ray", "--address", doomed.address, "--output-dir"]
    with subprocess.Popen(command(*arguments, tmp_path / "node", "-q")) as process:
        wait_for(lambda: list(tmp_path.glob("node/cells/*/manifest.json")), process)
        doomed.remove_node(doomed.worker_nodes.copy().pop(), allow_graceful=False)
    assert process.returncode == 0
    assert cells(tmp_path / "node") == local

    with subprocess.Popen(command(*arguments, tmp_path / "head", "-q"), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(tmp_path.glob("head/cells/*/journal.jsonl")), process)
        doomed.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        message = process.communicate(timeout=55)[1]
    assert process.returncode == 75, message
    assert "does not answer" in message
    assert cells(tmp_path / "head") != local
    assert invoke([*METHODS, *on_tiny, "--output-dir", str(tmp_path / "head"), "-q"]) == 0
    assert cells(tmp_path / "head") == local


def test_one_node_of_its_own_ends_with_the_command_also_after_ctrl_c(on_tiny, local, tmp_path):
    mark = uuid.uuid4().hex
    environment = os.environ | {"QUANTLAB_TEST_MARK": mark}
    arguments = command(*METHODS, *on_tiny, "--executor", "ray", "--output-dir", tmp_path, "-q")
    with subprocess.Popen(arguments, env=environment) as process:
        wait_for(lambda: list(tmp_path.glob("cells/*/journal.jsonl")), process)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: process.poll() is not None)
    assert process.returncode == 75
    wait_for(lambda: not processes_with(mark))
    assert subprocess.run(arguments, env=environment, timeout=100).returncode == 0
    assert cells(tmp_path) == local
    wait_for(lambda: not processes_with(mark))
