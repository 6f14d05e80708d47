"""The list of shards of a checkpoint, and the tensors of one shard, read with suspicion.

A checkpoint may come from anywhere. Shard names are plain file names of one pattern, every shard holds
exactly the tensors that the index promises, and dtype and shape are compared with what the model expects
before the values are read.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlab.checkpoint.format import INDEX_NAME, SHARD_PATTERN
from quantlab.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; {path.parent} is not a complete quantlab checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}; expected a JSON object")
    return content


def read_index(folder: Path) -> dict[str, set[str]]:
    """The tensor names of every shard, by shard file name.

    Raises:
        CheckpointError: the index is missing or damaged, or names a shard that is not allowed or not there.
    """
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: has no object 'weight_map'")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(SHARD_PATTERN, shard):
            raise CheckpointError(f"{path}: tensor {name} is in {shard!r}; shards must be called {SHARD_PATTERN}")
        shards.setdefault(shard, set()).add(name)
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} does not exist; the checkpoint is incomplete")
    return shards


def read_shard(
    path: Path, names: Collection[str], placeholders: Mapping[str, Tensor], exact: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of one shard, in the dtypes that the model computes with.

    Args:
        path: the shard.
        names: what the index says is in it.
        placeholders: every tensor of the model, with the expected dtype and shape.
        exact: names whose stored dtype must be the expected one; other floating tensors are cast.

    Raises:
        CheckpointError: naming the file, the tensor and what is wrong with it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            if stored != set(names):
                raise CheckpointError(
                    f"{path}: the index and the file disagree about the tensors {sorted(stored ^ set(names))[:5]}"
                )
            tensors = {}
            for name in sorted(names):
                _check_shape(path, name, tuple(file.get_slice(name).get_shape()), placeholders.get(name))
                tensors[name] = _convert(path, name, file.get_tensor(name), placeholders[name].dtype, name in exact)
            return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _check_shape(path: Path, name: str, shape: tuple[int, ...], placeholder: Tensor | None) -> None:
    if placeholder is None:
        raise CheckpointError(f"{path}: unexpected tensor {name}; the model has nothing of that name")
    if shape != tuple(placeholder.shape):
        raise CheckpointError(f"{path}: tensor {name} has shape {shape}; the model needs {tuple(placeholder.shape)}")


def _convert(path: Path, name: str, tensor: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    castable = not exact and tensor.is_floating_point() and dtype.is_floating_point
    if tensor.dtype != dtype and not castable:
        raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}; the model needs {dtype}")
    converted = tensor.to(dtype)
    if dtype.is_floating_point and not torch.isfinite(converted).all():
        raise CheckpointError(f"{path}: tensor {name} contains NaN or infinity as {dtype}")
    return converted
