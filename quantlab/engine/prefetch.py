"""Reads the weights of the next block from the disk while the current block is solved.

The bytes are read and dropped: afterwards they are in the operating system's page cache, which gives way when
memory is short, so prefetching needs no part of the memory budget.
"""

import json
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path

PIECE_BYTES = 1 << 22


class Prefetch:
    """A reader in the background; a context manager that ends it on leaving.

    Args:
        tensors: file and name of every tensor that will be needed.
    """

    def __init__(self, tensors: Iterable[tuple[Path, str]]) -> None:
        names: dict[Path, list[str]] = {}
        for path, name in tensors:
            names.setdefault(path, []).append(name)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(names,), name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self, names: Mapping[Path, list[str]]) -> None:
        with suppress(OSError, ValueError, KeyError):  # whoever needs the weights will say what is wrong with them
            for path, wanted in names.items():
                with path.open("rb", buffering=0) as file:
                    self._read_tensors(file, wanted)

    def _read_tensors(self, file: FileIO, names: list[str]) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        for start, end in sorted(header[name]["data_offsets"] for name in names):
            file.seek(8 + header_bytes + start)
            remaining = end - start
            while remaining > 0 and not self._ended.is_set():
                remaining -= file.readinto(buffer[: min(PIECE_BYTES, remaining)]) or remaining
