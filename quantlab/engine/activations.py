"""The hidden states between two decoder blocks, one file per batch, optionally kept in memory as well.

A generation that a killed run would continue from is written, also when it is kept in memory: computing it again on
another path would be close to it but not equal. Waiting for the disk is left to a thread, since it takes longer than
writing and nothing but time.
"""

import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantlab.checkpoint.atomic import flush, refusals_explained
from quantlab.checkpoint.serialize import file_sha256, write_unsettled
from quantlab.errors import CheckpointError
from quantlab.skeleton import CPU

_NAME = "hidden"


class Activations:
    """One generation: what enters one decoder block, batch by batch.

    Args:
        folder: where the files are written; created if it does not exist.
        in_memory: whether tensors that were put are kept, so that they need not be read again.
        device: where tensors that are read come to; they are kept and written from main memory.
        lasting: whether another process may go on from here, so that files are needed in any case.
        shared: whether another process may be about to write the same files: one that was given up for lost.
    """

    def __init__(
        self, folder: Path, *, in_memory: bool, device: torch.device = CPU, lasting: bool = False, shared: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._in_memory, self._lasting, self._shared = in_memory, lasting, shared
        self._device = device
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushing: Future[None] | None = None
        self._kept: dict[int, Tensor] = {}
        self._hashes: dict[str, str] = {}

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep the hidden states of a batch, (sequences, tokens, hidden_size), in their own dtype.

        Raises:
            ResumableError: they cannot be written.
        """
        hidden = hidden.to(CPU)
        if self._in_memory:
            self._kept[batch] = hidden
        if self._lasting or not self._in_memory:
            self._write(self._folder / self.file_name(batch), hidden)

    def settle(self) -> None:
        """Return when what another process may go on from is on the disk.

        Raises:
            ResumableError: it cannot be written.
        """
        if self._lasting:
            with refusals_explained(self._folder):
                self._await_flush()
                flush(self._folder)

    def get(self, batch: int) -> Tensor:
        """The hidden states of a batch."""
        kept = self._kept.get(batch)
        return (self._read(self.file_name(batch)) if kept is None else kept).to(self._device)

    def hashes(self) -> dict[str, str]:
        """SHA-256 by file name of everything that was written."""
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
            self._kept = {self._batch(name): self._read(name).clone() for name in hashes}

    def remove(self) -> None:
        """Forget everything and delete the files."""
        self._kept.clear()
        shutil.rmtree(self._folder)

    @staticmethod
    def file_name(batch: int) -> str:
        """The file of a batch, by its number."""
        return f"batch-{batch:05d}.safetensors"

    def _read(self, file_name: str) -> Tensor:
        return load_file(self._folder / file_name)[_NAME]

    def _write(self, path: Path, hidden: Tensor) -> None:
        written = path.with_name(f"{uuid.uuid4().hex}.safetensors") if self._shared else path
        with refusals_explained(path):
            try:
                written.unlink(missing_ok=True)  # not overwritten: a tensor that was read from it may still be in use
                self._hashes[path.name] = write_unsettled(written, {_NAME: hidden})
                written.replace(path)
            except OSError:
                with suppress(OSError):
                    written.unlink(missing_ok=True)
                raise
            if self._lasting:
                self._await_flush()  # of the batch before, so that the system does not fall behind by much
                self._flushing = self._flusher.submit(flush, path)

    def _await_flush(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    @staticmethod
    def _batch(file_name: str) -> int:
        return int(file_name.removeprefix("batch-").removesuffix(".safetensors"))
