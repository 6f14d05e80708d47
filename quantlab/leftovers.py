"""What may be removed: unfinished runs, and compiled kernels. Finished results are never touched."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.names import (
    EVALUATION_NAME,
    LOG_NAME,
    MANIFEST_NAME,
    MODEL_FOLDER,
    RECIPE_NAME,
    RESOLVED_RECIPE_NAME,
)
from quantlab.engine.finished import BLOCK
from quantlab.engine.journal import JOURNAL_NAME, Journal
from quantlab.errors import UsageError
from quantlab.workspace import COMPLETE, WORK_FOLDER

_OF_A_RUN = (MODEL_FOLDER, RECIPE_NAME, RESOLVED_RECIPE_NAME, EVALUATION_NAME, "report.md", LOG_NAME)


@dataclass(frozen=True, kw_only=True, eq=False)
class Leftover:
    """An unfinished run that this process has to itself.

    Attributes:
        folder: of the run.
        paths: what is to be removed in it, the journal last: until it is gone, the removal can be repeated.
        blocks: how many decoder blocks are finished.
        seconds: what they took.
        size_bytes: what they occupy.
        is_complete: whether the results are finished, so that only work files are removed.
    """

    folder: Path
    paths: tuple[Path, ...]
    blocks: int
    seconds: float
    size_bytes: int
    is_complete: bool

    def remove(self) -> None:
        """Remove the run, and its folder if nothing else is in it."""
        _remove(self.paths)
        with suppress(OSError):  # somebody's own files, or finished results
            self.folder.rmdir()


def find_unfinished(folders: Iterable[Path]) -> list[Path]:
    """The folders of unfinished runs in or below some folders; links are not followed."""
    return sorted({Path(place) for folder in folders for place, _, files in os.walk(folder) if JOURNAL_NAME in files})


@contextmanager
def taken(folder: Path) -> Iterator[Leftover]:
    """Take an unfinished run, so that no process can continue it meanwhile.

    Raises:
        UsageError: a process works in it, it only has to be closed, or its journal is damaged.
    """
    with Journal.opened(folder) as journal:
        is_complete = bool(journal.of_kind(COMPLETE))
        if (folder / MANIFEST_NAME).exists() and not is_complete:
            raise UsageError(f"{folder} has its results; repeat its command, which only has to close the run")
        names = (WORK_FOLDER, JOURNAL_NAME) if is_complete else (*_OF_A_RUN, WORK_FOLDER, JOURNAL_NAME)
        paths = tuple(folder / name for name in names if (folder / name).exists())
        blocks = journal.of_kind(BLOCK)
        yield Leftover(
            folder=folder,
            paths=paths,
            blocks=len(blocks),
            seconds=sum(sum(entry["seconds"].values()) for entry in blocks),
            size_bytes=sum(map(_size_bytes, paths)),
            is_complete=is_complete,
        )


def compiled_kernels() -> list[Path]:
    """The compiled libraries in the cache; they are compiled again when they are needed."""
    from quantlab_kernels.build import cache_folders

    return sorted({path for folder in cache_folders() for path in folder.glob("*.so")})


def remove_kernels(libraries: Iterable[Path]) -> None:
    """Remove compiled libraries; processes that have loaded them keep them."""
    for library in libraries:
        library.unlink(missing_ok=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
