import errno

import pytest
import torch

from quantlab.errors import MemoryShortageError, ModelError, NumericalError, ResumableError, UsageError
from quantlab.workspace import memory_shortage_explained, require_free, working_in


def finish_rest(workspace):
    workspace.journal.append({"kind": "rest"})
    workspace.work.mkdir(exist_ok=True)
    (workspace.work / "state").touch()


def fail_behind_some_work(folder, error):
    with working_in(folder) as workspace:
        finish_rest(workspace)
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_completed_run_leaves_neither_journal_nor_work(tmp_path):
    with working_in(tmp_path / "run") as workspace:
        finish_rest(workspace)
        (workspace.folder / "result").touch()
    assert names(tmp_path / "run") == ["result"]


@pytest.mark.parametrize("error", [ResumableError("disk full"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_interrupted_run_keeps_its_work_and_says_so(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        fail_behind_some_work(tmp_path / "run", error)
    assert caught.value.__notes__ == [
        f"{tmp_path / 'run'} keeps what is finished (0 blocks); the same command continues the run"
    ]
    with working_in(tmp_path / "run") as workspace:
        assert workspace.continued
        assert (workspace.work / "state").exists()


def test_an_interruption_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), working_in(tmp_path / "deep" / "run"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_run_that_cannot_succeed_leaves_an_existing_folder_empty(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(NumericalError):
        fail_behind_some_work(tmp_path / "run", NumericalError("singular"))
    assert names(tmp_path / "run") == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for name in ("file", "full"):
        with pytest.raises(UsageError, match="exists and is not empty"):
            require_free(tmp_path / name)
    require_free(tmp_path / "new")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA")]
)
def test_shortages_of_memory_are_recognised(error):
    with pytest.raises(MemoryShortageError, match=r"engine\.memory_budget") as caught, memory_shortage_explained():
        raise error
    assert caught.value.exit_code == 4


def test_a_shortage_is_recognised_behind_another_error():
    error = ModelError("cannot load")
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as refused:
        error.__cause__ = refused
    with pytest.raises(MemoryShortageError), memory_shortage_explained():
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), memory_shortage_explained():
        raise RuntimeError("shape mismatch")
