"""The hidden states between two decoder blocks, one file per batch, optionally kept in memory as well.

Every generation is written, also when it is kept in memory: a run that is killed continues from the hidden
states themselves. Computing them again on another path would be close to them but not equal.
"""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.atomic import flush
from quantlab.checkpoint.serialize import file_sha256, write_safetensors
from quantlab.errors import CheckpointError

_NAME = "hidden"


class Activations:
    """One generation: what enters one decoder block, batch by batch.

    Args:
        folder: where the files are written; created if it does not exist.
        in_memory: whether tensors that were put are kept, so that they need not be read again.
        shared: whether another process may be about to write the same files: one that was given up for lost.
    """

    def __init__(self, folder: Path, *, in_memory: bool, shared: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._shared = shared
        self._folder = folder
        self._in_memory = in_memory
        self._kept: dict[int, Tensor] = {}
        self._hashes: dict[str, str] = {}

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep the hidden states of a batch, (sequences, tokens, hidden_size), in their own dtype.

        Raises:
            ResumableError: they cannot be written.
        """
        path = self._folder / self.file_name(batch)
        own = path.with_name(f"{uuid.uuid4().hex}.safetensors") if self._shared else path
        self._hashes[path.name] = write_safetensors(own, {_NAME: hidden})
        if self._shared:
            own.replace(path)
            flush(self._folder)
        if self._in_memory:
            self._kept[batch] = hidden

    def get(self, batch: int) -> Tensor:
        """The hidden states of a batch."""
        if batch in self._kept:
            return self._kept[batch]
        return load_file(self._folder / self.file_name(batch))[_NAME]

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
            if not path.is_file() or file_sha256(path) != expected:
                raise CheckpointError(
                    f"{path} is missing or not as it was written, so the run cannot be continued; remove its folder"
                )
        self._hashes = dict(hashes)
        if self._in_memory:
            self._kept = {batch: self.get(batch).clone() for batch in map(self._batch, hashes)}

    def remove(self) -> None:
        """Forget everything and delete the files."""
        self._kept.clear()
        shutil.rmtree(self._folder)

    @staticmethod
    def file_name(batch: int) -> str:
        """The file of a batch, by its number."""
        return f"batch-{batch:05d}.safetensors"

    @staticmethod
    def _batch(file_name: str) -> int:
        return int(file_name.removeprefix("batch-").removesuffix(".safetensors"))
