"""Files that are either complete or not there, also after a crash or a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the name of `path` when the block ends well.

    The data reaches the disk before the name does. If the block raises, the temporary file is removed and a
    previous `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch()
    permissions = temporary.stat().st_mode  # those of the user's umask; safetensors would make the file private
    try:
        yield temporary
        temporary.chmod(permissions)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened, and its entries need no flush of their own
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
