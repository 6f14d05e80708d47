"""Files and folders that are either complete or not there, also after a crash or a power cut."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantlab.errors import ResumableError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the name of `path` when the block ends well.

    The data reaches the disk before the name does. If the block raises, the temporary file is removed and a
    previous `path` is untouched.

    Raises:
        ResumableError: the system refuses to write, for example because the disk is full or the folder read-only.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with refusals_explained(path):
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode  # those of the user's umask; safetensors would make the file private
            yield temporary
            temporary.chmod(permissions)
            flush(temporary)
            temporary.replace(path)
            if os.name == "posix":  # elsewhere a folder cannot be opened, and its entries need no flush of their own
                flush(path.parent)
        finally:
            with suppress(OSError):  # what keeps the file from being removed has kept it from being written
                temporary.unlink(missing_ok=True)


@contextmanager
def refusals_explained(path: Path) -> Iterator[None]:
    """Inside, a system that refuses to write `path` becomes an error that says what to do.

    Raises:
        ResumableError: it refuses, for example because the disk is full or the folder read-only.
    """
    try:
        yield
    except OSError as error:
        raise ResumableError(
            f"cannot write {path}: {error}; free some space, or choose a folder that may be written to"
        ) from error


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Inside, no other process is inside for the same path: it waits. However a process ends, its turn ends with it.

    Args:
        path: what is written inside; a lock file beside it stays behind.
    """
    with path.with_name(f".{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which must not exist, that takes its name when the block ends well, and else vanishes.

    Raises:
        ResumableError: the system refuses to write.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ResumableError(f"cannot write {folder}: {error}; choose a folder that may be written to") from error
    try:
        yield staging
        staging.chmod(0o755)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flush(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
