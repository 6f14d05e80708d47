"""The journal of a run: what is finished, one JSON object per line, on disk before the run goes on.

The journal alone makes a piece of work done: files that it does not mention are leftovers and are written again.
It exists while a run is unfinished, and whoever has it open has the folder to himself.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from quantlab.checkpoint.atomic import flush
from quantlab.errors import ResumableError, UsageError

JOURNAL_NAME = "journal.jsonl"


class FolderBusyError(UsageError):
    """Another process has a run folder to itself."""


class Journal:
    """An open journal; use `Journal.opened`.

    Attributes:
        path: the file.
        entries: everything in it, oldest first.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self.entries = self._read()

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator["Journal"]:
        """Open the journal of a run folder, empty if it does not exist, and lock it.

        The lock belongs to the process: however it ends, the lock ends with it.

        Raises:
            UsageError: another process works in the folder, or the journal is damaged.
        """
        path = folder / JOURNAL_NAME
        with path.open("a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderBusyError(
                    f"another process is working in {folder}; wait for it, or choose another --output-dir"
                ) from error
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                raise UsageError(f"another process has just finished its run in {folder}; choose another --output-dir")
            flush(folder)
            yield cls(path, file)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry; it is on disk when this returns.

        Raises:
            ResumableError: it cannot be written; the journal is as before.
        """
        line = json.dumps(entry).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            raise ResumableError(f"cannot write {self.path}: {error}; free some space") from error
        self.entries.append(dict(entry))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The entries with this "kind", oldest first."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    def remove(self) -> None:
        """Delete the journal: the run is complete, or nothing of it is kept."""
        self.path.unlink()
        flush(self.path.parent)

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:  # the process was killed within `append`, so nothing relies on this line
            self._file.truncate(self._file.tell() - len(torn))
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise UsageError(
                f"{self.path} is damaged, so the run cannot be continued; remove {self.path.parent} and start again"
            ) from error
