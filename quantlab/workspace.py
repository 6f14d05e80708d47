"""The run folder while its run is unfinished: locked, continued by the next process, or removed."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.engine.finished import BLOCK, REST
from quantlab.engine.journal import JOURNAL_NAME, Journal
from quantlab.errors import MemoryShortageError, QuantlabError, ResumableError, UsageError

WORK_FOLDER = "work"
COMPLETE = "complete"
"""Kind of the journal's last entry: nothing is left to do but to remove the work folder and the journal."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workspace:
    """A run folder that this process has to itself.

    Attributes:
        folder: the run folder.
        journal: what is finished in it.
        continued: whether a former process has begun the run.
        earlier_s: seconds that former processes spent on finished blocks.
    """

    folder: Path
    journal: Journal
    continued: bool
    earlier_s: float

    @property
    def complete(self) -> bool:
        """Whether a former process had finished the run, but not tidied up."""
        return bool(self.journal.of_kind(COMPLETE))

    @property
    def work(self) -> Path:
        """For files that the finished run does not need."""
        return self.folder / WORK_FOLDER


def require_free(output_dir: Path) -> None:
    """Check that a run may use a folder: it does not exist, is empty, or holds an unfinished run.

    Raises:
        UsageError: something else is there.
    """
    if not output_dir.exists() or (output_dir / JOURNAL_NAME).is_file():
        return
    if not output_dir.is_dir() or any(output_dir.iterdir()):
        raise UsageError(
            f"the output folder {output_dir} exists and is not empty; choose another with --output-dir, or remove it"
        )


@contextmanager
def working_in(output_dir: Path) -> Iterator[Workspace]:
    """Take a run folder; on leaving without an error the run is complete.

    A run that ends early for a reason outside itself (a signal, a full disk, no memory, a bug) leaves its finished
    blocks behind for the next process. A run that cannot succeed leaves nothing, unless a former process began it.

    Args:
        output_dir: the run folder; see `require_free`.

    Raises:
        UsageError: the folder is occupied, or another process works in it.
    """
    require_free(output_dir)
    new_folders = [path for path in (output_dir, *output_dir.parents) if not path.exists()]  # the innermost first
    output_dir.mkdir(parents=True, exist_ok=True)
    with Journal.opened(output_dir) as journal:
        if not journal.entries and (output_dir / MANIFEST_NAME).exists():  # finished since the check
            journal.remove()
            raise UsageError(f"another process has just finished its run in {output_dir}; choose another --output-dir")
        workspace = Workspace(
            folder=output_dir,
            journal=journal,
            continued=bool(journal.entries),
            earlier_s=sum(sum(entry["seconds"].values()) for entry in journal.of_kind(BLOCK)),
        )
        try:
            yield workspace
        except BaseException as error:
            if workspace.continued or (_is_resumable(error) and journal.of_kind(REST)):
                blocks = len(journal.of_kind(BLOCK))
                error.add_note(
                    f"{output_dir} keeps what is finished ({blocks} blocks); the same command continues the run"
                )
            else:
                _clear(output_dir, new_folders)
            raise
        if not workspace.complete:
            journal.append({"kind": COMPLETE})
        shutil.rmtree(workspace.work, ignore_errors=True)
        journal.remove()


@contextmanager
def memory_shortage_explained() -> Iterator[None]:
    """Inside, an allocation that fails becomes an error that says what to do.

    Raises:
        MemoryShortageError: the system, or a limit on the process, refused memory.
    """
    try:
        yield
    except Exception as error:
        if not any(_is_shortage(cause) for cause in _causes(error)):
            raise
        raise MemoryShortageError(
            f"out of memory: {str(error) or 'the system refused an allocation'}\n"
            "  Close other programs and go on, or start anew with less: --set engine.memory_budget=8GiB (or what you "
            "have; on a GPU\n  engine.device_memory_budget) bounds the engine, --set model.dtype=bfloat16 halves the "
            "weights, a smaller\n  calibration.sequence_length the batches"
        ) from error


def _is_resumable(error: BaseException) -> bool:
    return isinstance(error, ResumableError) or not isinstance(error, QuantlabError)


def _clear(output_dir: Path, new_folders: list[Path]) -> None:
    for path in output_dir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # another run may have put its folder there by now
        for folder in new_folders:
            folder.rmdir()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch and safetensors have no exception of their own for this on the CPU.
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
        or "Cannot allocate memory" in text
    )
