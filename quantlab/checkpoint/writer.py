"""Writes a quantized checkpoint, one shard at a time, so that no more than one shard is in memory."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantlab.checkpoint.atomic import replacing
from quantlab.checkpoint.format import CONFIG_NAME, INDEX_NAME, SHARD_PATTERN, QuantizationConfig
from quantlab.errors import CheckpointError

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


class CheckpointWriter:
    """Writes shards as they arrive, and at the end what makes the folder a checkpoint.

    `config.json` is written last: a folder without it is not finished. No file is called `model.safetensors`,
    so that a program that does not know the format stops instead of running with random weights.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self._hashes: dict[str, str] = {}

    def add_shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `quantlab-<name>.safetensors`.

        Args:
            name: letters, digits, `_`, `-` and `.`; new for every shard.
            tensors: by their name in the model.

        Raises:
            CheckpointError: an invalid or repeated shard name; a tensor that is already written, on the meta
                device, or not finite.
        """
        file = f"quantlab-{name}.safetensors"
        if not re.fullmatch(SHARD_PATTERN, file) or file in self._hashes:
            raise CheckpointError(f"{name!r} cannot name a shard: it is taken, or not made of letters, digits, _ - .")
        for tensor_name, tensor in tensors.items():
            self._check(tensor_name, tensor)
        # Clones, since safetensors refuses tensors that share memory.
        copies = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
        }
        with replacing(self._folder / file) as temporary:
            save_file(copies, temporary, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(copies, file)
        self._total_bytes += sum(tensor.nbytes for tensor in copies.values())
        self._note(file)

    def finish(self, source: Path, config: Mapping[str, object], quantization: QuantizationConfig) -> None:
        """Write the index and `config.json`, and copy the tokenizer's and other side files byte for byte.

        Args:
            source: folder of the original model.
            config: content of the model's own `config.json`.
            quantization: what is quantized, and how.
        """
        for side_file in sorted({path for pattern in SIDE_FILES for path in source.glob(pattern) if path.is_file()}):
            with replacing(self._folder / side_file.name) as temporary:
                shutil.copyfile(side_file, temporary)
            self._note(side_file.name)
        self._write_json(
            INDEX_NAME,
            {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(self._weight_map.items()))},
        )
        self._write_json(CONFIG_NAME, {**config, "quantization_config": quantization.to_dict()})

    def files(self) -> dict[str, str]:
        """SHA-256 of every file written so far, by file name."""
        return dict(sorted(self._hashes.items()))

    def _check(self, name: str, tensor: Tensor) -> None:
        if name in self._weight_map:
            raise CheckpointError(f"tensor {name} is already written to {self._weight_map[name]}")
        if tensor.is_meta:
            raise CheckpointError(f"tensor {name} has no values: it is on the meta device")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} contains NaN or infinity; it is not written")

    def _write_json(self, name: str, content: Mapping[str, object]) -> None:
        with replacing(self._folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._note(name)

    def _note(self, name: str) -> None:
        with (self._folder / name).open("rb") as stream:
            self._hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
