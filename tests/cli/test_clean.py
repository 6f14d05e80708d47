import json
import sys

import click
import pytest

from quantlab.cli.app import invoke
from quantlab.engine.journal import Journal

BLOCK = {"kind": "block", "seconds": {"solve": 60.0, "load": 5.0}}


def unfinished(folder, *entries):
    """A run folder as a killed run leaves it."""
    (folder / "work").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "work" / "hidden").write_bytes(bytes(1000))
    (folder / "model" / "shard").write_bytes(bytes(500))
    for name in ("recipe.yaml", "recipe.resolved.yaml", "log.txt"):
        (folder / name).touch()
    (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def finished(folder):
    (folder / "model").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "runs" / "done")
    return tmp_path / "runs"


def test_unfinished_runs_are_removed_at_any_depth_and_finished_ones_kept(runs, capsys):
    unfinished(runs / "killed", {"kind": "run"}, BLOCK, BLOCK)
    unfinished(runs / "comparison" / "cell")
    assert invoke(["clean", "--yes"]) == 0
    assert "runs/killed: 2 finished blocks, 2 min 10 s of work, 1.6" in capsys.readouterr().out
    assert sorted(path.name for path in runs.iterdir()) == ["comparison", "done"]
    assert list((runs / "comparison").iterdir()) == []
    assert (runs / "done" / "manifest.json").exists()


def test_a_dry_run_removes_nothing(runs, capsys):
    folder = unfinished(runs / "killed", BLOCK)
    assert invoke(["clean", str(runs), "--dry-run"]) == 0
    assert "1 finished blocks" in capsys.readouterr().out
    assert (folder / "work" / "hidden").exists()


def test_without_a_terminal_nothing_is_removed_unless_agreed(runs, capsys):
    folder = unfinished(runs / "killed")
    assert invoke(["clean"]) == 2
    assert "agree with --yes" in capsys.readouterr().err
    assert (folder / "journal.jsonl").exists()


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_the_user_is_asked(runs, monkeypatch, answer):
    folder = unfinished(runs / "killed")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda question: answer)
    assert invoke(["clean"]) == 0
    assert folder.exists() is not answer


def test_a_run_in_progress_is_kept(runs, capsys):
    folder = unfinished(runs / "running")
    with Journal.opened(folder):
        assert invoke(["clean", "--yes"]) == 0
    captured = capsys.readouterr()
    assert "kept: another process is working in runs/running" in captured.err
    assert captured.out == "nothing to remove\n"
    assert (folder / "work" / "hidden").exists()


def test_of_a_complete_run_only_the_work_files_go(runs, capsys):
    folder = unfinished(finished(runs / "complete").parent / "complete2", {"kind": "complete"})
    (folder / "manifest.json").write_text("{}")
    assert invoke(["clean", "--yes"]) == 0
    assert "runs/complete2: finished; only its work files" in capsys.readouterr().out
    assert not (folder / "work").exists()
    assert not (folder / "journal.jsonl").exists()
    assert (folder / "model" / "shard").exists()


def test_a_run_with_results_that_is_not_closed_is_kept(runs, capsys):
    folder = unfinished(runs / "almost", BLOCK)
    (folder / "manifest.json").write_text("{}")
    assert invoke(["clean", "--yes"]) == 0
    assert "has its results; repeat its command" in capsys.readouterr().err
    assert (folder / "model" / "shard").exists()


def test_files_that_no_run_writes_are_kept(runs):
    folder = unfinished(runs / "killed")
    (folder / "notes.txt").write_text("mine")
    finished(folder / "other")
    assert invoke(["clean", "--yes"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "other"]


def test_links_are_not_followed(runs, tmp_path):
    elsewhere = unfinished(tmp_path / "elsewhere" / "run")
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    assert invoke(["clean", "--yes"]) == 0
    assert (elsewhere / "journal.jsonl").exists()


def test_compiled_kernels_go_only_when_asked(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    library = tmp_path / "cache" / "kernels" / "lut-1.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(2000))
    folder = unfinished(runs / "killed")
    assert invoke(["clean", "--kernels", "--yes"]) == 0
    assert "1 compiled kernels, 2 kB" in capsys.readouterr().out
    assert not library.exists()
    assert folder.exists()


def test_no_runs_are_nothing_to_remove(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["clean"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
