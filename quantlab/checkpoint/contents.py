"""What a checkpoint folder says it holds, checked against itself before a single value is read.

A checkpoint may come from anywhere. Its files lie in its folder, shard names are plain file names of one pattern,
and the index and the headers of the shards agree about every tensor.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.checkpoint.documents import TensorEntry, read_header, read_json, require_ordinary
from quantlab.checkpoint.format import CONFIG_NAME, INDEX_NAME, SHARD_PATTERN, QuantizationConfig
from quantlab.checkpoint.names import MODEL_FOLDER
from quantlab.errors import CheckpointError

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass(frozen=True)
class Contents:
    """A checkpoint whose files agree with each other.

    Attributes:
        folder: where it lies.
        config: content of config.json, `quantization_config` included.
        quantization: the parsed `quantization_config`.
        shards: what every shard holds: file name to tensor name to dtype and shape.
        sha256: hash of every shard by file name; empty in format 1, whose index has none.
    """

    folder: Path
    config: Mapping[str, Any]
    quantization: QuantizationConfig
    shards: Mapping[str, Mapping[str, TensorEntry]]
    sha256: Mapping[str, str]

    @property
    def stored_bytes(self) -> int:
        """Size of all shards on the disk."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint itself, where the folder of a run may be given as well."""
    return path / MODEL_FOLDER if (path / MODEL_FOLDER / CONFIG_NAME).is_file() else path


def read_contents(folder: Path) -> Contents:
    """Read config.json, the index and the headers of all shards.

    Raises:
        CheckpointError: a file is missing, damaged, not allowed or elsewhere, of an unknown version, or two files
            contradict each other.
    """
    require_inside(folder, [CONFIG_NAME])
    config = read_json(folder / CONFIG_NAME)
    if config.get("quantization_config") is None:
        raise CheckpointError(f"{folder / CONFIG_NAME} has no 'quantization_config'; the model is not quantized")
    quantization = QuantizationConfig.from_dict(config["quantization_config"])
    require_inside(folder, [INDEX_NAME])
    index = read_json(folder / INDEX_NAME)
    names = _names_by_shard(folder / INDEX_NAME, index.get("weight_map"))
    require_inside(folder, names)
    return Contents(
        folder=folder,
        config=config,
        quantization=quantization,
        shards={shard: _read_shard_header(folder / shard, names[shard]) for shard in sorted(names)},
        sha256=_hashes(folder / INDEX_NAME, index.get("metadata"), names),
    )


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """Check that files are ordinary ones whose data lie in the folder.

    Links may lead out of it in one case: the local cache of the Hugging Face hub keeps a repository's files in
    `blobs`, and its `snapshots` are folders of links to them.

    Raises:
        CheckpointError: naming the file.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for name in names:
        require_ordinary(folder / name)
        if (folder / name).resolve().parent not in (home, blobs):
            raise CheckpointError(f"{folder / name} is a link that leads out of the folder; it is not followed")


def _names_by_shard(path: Path, weight_map: object) -> dict[str, set[str]]:
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: has no object 'weight_map'")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not name.isprintable():
            raise CheckpointError(f"{path}: {name!r} cannot be the name of a tensor")
        if not isinstance(shard, str) or not re.fullmatch(SHARD_PATTERN, shard):
            raise CheckpointError(f"{path}: tensor {name} is in {shard!r}; shards must be called {SHARD_PATTERN}")
        shards.setdefault(shard, set()).add(name)
    return shards


def _read_shard_header(path: Path, promised: set[str]) -> dict[str, TensorEntry]:
    header = read_header(path)
    if header.keys() != promised:
        raise CheckpointError(
            f"{path}: the index and the file disagree about the tensors {sorted(header.keys() ^ promised)[:5]}"
        )
    return header


def _hashes(path: Path, metadata: object, shards: Iterable[str]) -> dict[str, str]:
    if not isinstance(metadata, dict) or "sha256" not in metadata:
        return {}
    hashes = metadata["sha256"]
    if not isinstance(hashes, dict) or hashes.keys() != set(shards):
        raise CheckpointError(f"{path}: metadata.sha256 does not name exactly the shards of the weight_map")
    if not all(isinstance(digest, str) for digest in hashes.values()):
        raise CheckpointError(f"{path}: metadata.sha256 holds something that is not a hash")
    return hashes
