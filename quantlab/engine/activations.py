"""The hidden states between two decoder blocks, one file per batch, optionally kept in memory as well.

Every generation is written, also when it is kept in memory: a run that is killed continues from the hidden
states themselves. Computing them again on another path would be close to them but not equal.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.serialize import write_safetensors
from quantlab.errors import CheckpointError

_NAME = "hidden"


class Activations:
    """One generation: what enters one decoder block, batch by batch.

    Args:
        folder: where the files are written; created if it does not exist.
        in_memory: whether tensors that were put are kept, so that they need not be read again.
    """

    def __init__(self, folder: Path, *, in_memory: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._in_memory = in_memory
        self._kept: dict[int, Tensor] = {}
        self._hashes: dict[str, str] = {}

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep the hidden states of a batch, (sequences, tokens, hidden_size), in their own dtype.

        Raises:
            ResumableError: they cannot be written.
        """
        path = self._path(batch)
        self._hashes[path.name] = write_safetensors(path, {_NAME: hidden})
        if self._in_memory:
            self._kept[batch] = hidden

    def get(self, batch: int) -> Tensor:
        """The hidden states of a batch."""
        return self._kept[batch] if batch in self._kept else load_file(self._path(batch))[_NAME]

    def hashes(self) -> dict[str, str]:
        """SHA-256 by file name of everything that was put."""
        return dict(self._hashes)

    def restore(self, hashes: Mapping[str, str]) -> None:
        """Take over the files of a former process.

        Args:
            hashes: what `hashes` said when they were complete.

        Raises:
            CheckpointError: a file is missing or has changed.
        """
        for name, expected in hashes.items():
            path = self._folder / name
            if not path.is_file() or _sha256(path) != expected:
                raise CheckpointError(
                    f"{path} is missing or not as it was written, so the run cannot be continued; remove its folder"
                )
        self._hashes = dict(hashes)
        if self._in_memory:
            self._kept = {batch: self.get(batch).clone() for batch in range(len(hashes))}

    def remove(self) -> None:
        """Forget everything and delete the files."""
        self._kept.clear()
        shutil.rmtree(self._folder)

    def _path(self, batch: int) -> Path:
        return self._folder / f"batch-{batch:05d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
