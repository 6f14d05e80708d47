"""Writes a quantized checkpoint, one shard at a time, so that no more than one shard is in memory."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantlab.checkpoint.atomic import replacing
from quantlab.checkpoint.format import CONFIG_NAME, INDEX_NAME, SHARD_PATTERN, QuantizationConfig
from quantlab.checkpoint.serialize import data_bytes, file_sha256, pieces, write_safetensors
from quantlab.errors import CheckpointError, ResumableError
from quantlab.finite import all_finite

SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
)


def side_files(source: Path) -> list[str]:
    """The names of the files that belong to a model besides its weights and its configuration."""
    return sorted({path.name for pattern in SIDE_FILES for path in source.glob(pattern) if path.is_file()})


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy the side files of a model byte for byte; returns their names."""
    names = side_files(source)
    for name in names:
        with replacing(folder / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return names


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object that is either complete or not there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class CheckpointWriter:
    """Writes shards as they arrive, and at the end what makes the folder a checkpoint.

    `config.json` is written last: a folder without it is not finished. No file is called `model.safetensors`,
    so that a program that does not know the format stops instead of running with random weights.

    Args:
        folder: created if it does not exist.

    Raises:
        ResumableError: on construction and by every method, if the system refuses to write.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResumableError(f"cannot write {folder}: {error}; choose a folder that may be written to") from error
        self._folder = folder
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self._hashes: dict[str, str] = {}

    def add_shard(
        self, name: str, tensors: Mapping[str, Tensor], *, narrow_to: torch.dtype | None = None
    ) -> tuple[str, str]:
        """Write `quantlab-<name>.safetensors`; an unfinished run may have left a file of that name, it is replaced.

        Args:
            name: letters, digits, `_`, `-` and `.`; new for every shard.
            tensors: by their name in the model.
            narrow_to: the dtype for wider floating tensors where every value survives; None keeps all dtypes.

        Returns:
            The file's name and its SHA-256.

        Raises:
            CheckpointError: an invalid or repeated shard name; a tensor that is already written, on the meta
                device, or not finite.
        """
        file = f"quantlab-{name}.safetensors"
        if not re.fullmatch(SHARD_PATTERN, file) or file in self._hashes:
            raise CheckpointError(f"{name!r} cannot name a shard: it is taken, or not made of letters, digits, _ - .")
        for tensor_name, tensor in tensors.items():
            self._check(tensor_name, tensor)
        digest = write_safetensors(self._folder / file, tensors, narrow_to=narrow_to)
        self._take_over(file, digest)
        return file, digest

    def path(self, file: str) -> Path:
        """Where a file of the checkpoint is."""
        return self._folder / file

    def restore_shard(self, file: str, digest: str) -> None:
        """Take over a shard that a former process wrote.

        Args:
            file: its name, as `add_shard` returned it.
            digest: its SHA-256, as `add_shard` returned it.

        Raises:
            CheckpointError: the file is missing or has changed.
        """
        path = self._folder / file
        if not path.is_file() or self._digest(file) != digest:
            raise CheckpointError(
                f"{path} is missing or not as it was written; the unfinished run cannot be continued, remove its folder"
            )
        self._take_over(file, digest)

    def finish(self, source: Path | None, config: Mapping[str, object], quantization: QuantizationConfig) -> None:
        """Write the index and `config.json`, and copy the tokenizer's and other side files byte for byte.

        Args:
            source: folder of the original model; None if there is nothing to copy.
            config: content of the model's own `config.json`.
            quantization: what is quantized, and how.
        """
        metadata = {"total_size": self._total_bytes, "sha256": self.files()}
        if source is not None:
            for name in copy_side_files(source, self._folder):
                self._note(name)
        self._write_json(INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(self._weight_map.items()))})
        self._write_json(CONFIG_NAME, {**config, "quantization_config": quantization.to_dict()})

    def files(self) -> dict[str, str]:
        """SHA-256 of every file written so far, by file name."""
        return dict(sorted(self._hashes.items()))

    def _check(self, name: str, tensor: Tensor) -> None:
        if name in self._weight_map:
            raise CheckpointError(f"tensor {name} is already written to {self._weight_map[name]}")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name} has no values: it is on the meta device")
        if tensor.is_floating_point() and not all(all_finite(piece) for piece in pieces(tensor)):
            raise CheckpointError(f"tensor {name} contains NaN or infinity; it is not written")

    def _take_over(self, file: str, digest: str) -> None:
        with safe_open(self._folder / file, framework="pt") as shard:
            self._weight_map |= dict.fromkeys(shard.keys(), file)
        self._total_bytes += data_bytes(self._folder / file)
        self._hashes[file] = digest

    def _write_json(self, name: str, content: Mapping[str, object]) -> None:
        write_json(self._folder / name, content)
        self._note(name)

    def _note(self, file: str) -> None:
        self._hashes[file] = self._digest(file)

    def _digest(self, file: str) -> str:
        return file_sha256(self._folder / file)
