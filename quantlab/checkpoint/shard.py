"""The tensors of one shard, checked before they are handed on.

Dtype and shape are compared with what the model expects before a value is read. A code needs no check of its range,
since `bits` bit planes cannot hold one that the codebook lacks.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlab.checkpoint.contents import Contents
from quantlab.errors import CheckpointError
from quantlab.finite import all_finite
from quantlab.runtime import ModuleSpec, storage_layout
from quantlab_kernels.packing import WORD_BITS


def read_shard(contents: Contents, shard: str, placeholders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one shard, in the dtypes that the model computes with.

    Args:
        contents: of the checkpoint.
        shard: its file name.
        placeholders: every tensor of the model, with the expected dtype and shape.

    Raises:
        CheckpointError: naming the file, the tensor and what is wrong with it.
    """
    path = contents.folder / shard
    layers = _layers_in(contents, shard)
    exact = {f"{name}.{tensor}" for name, spec in layers.items() for tensor in storage_layout(spec)}
    for name, entry in contents.shards[shard].items():
        _check_shape(path, name, entry.shape, placeholders.get(name))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {
                name: _convert(path, name, file.get_tensor(name), placeholders[name].dtype, name in exact)
                for name in sorted(contents.shards[shard])
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    for name, spec in layers.items():
        check_layer(name, spec, {tensor: tensors[f"{name}.{tensor}"] for tensor in storage_layout(spec)})
    return tensors


def check_layer(name: str, spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> None:
    """Check the values that a layer is stored as, so that no kernel reads outside its operands.

    Args:
        name: of the layer.
        spec: how it is stored.
        tensors: exactly those of `storage_layout(spec)`, of the right dtypes and shapes.

    Raises:
        CheckpointError: naming the tensor and what is wrong with it.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(f"{name}.{key} contains NaN or infinity")
    used = spec.in_features % WORD_BITS
    if used and (tensors["packed_codes"][..., -1] >> used & (1 << (WORD_BITS - used)) - 1).any():
        raise CheckpointError(f"{name}.packed_codes has bits behind the last of its {spec.in_features} codes")
    if spec.outliers:
        _check_outliers(name, spec, tensors["outlier_offsets"], tensors["outlier_columns"])


def _layers_in(contents: Contents, shard: str) -> dict[str, ModuleSpec]:
    """The quantized layers of a shard; all tensors of a layer lie in the same one."""
    stored = contents.shards[shard]
    modules = contents.quantization.modules
    layers = {name: modules[name] for name in sorted({key.rpartition(".")[0] for key in stored} & modules.keys())}
    for name, spec in layers.items():
        absent = [key for key in storage_layout(spec) if f"{name}.{key}" not in stored]
        if absent:
            raise CheckpointError(f"{contents.folder / shard}: holds a part of {name}, but not its {absent}")
    return layers


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
    if dtype.is_floating_point and not all_finite(converted):
        raise CheckpointError(f"{path}: tensor {name} contains NaN or infinity as {dtype}")
    return converted


def _check_outliers(name: str, spec: ModuleSpec, offsets: Tensor, columns: Tensor) -> None:
    if offsets[0] != 0 or offsets[-1] != len(columns) or (offsets.diff() < 0).any():
        raise CheckpointError(f"{name}.outlier_offsets do not ascend from 0 to the {len(columns)} stored outliers")
    if (columns < 0).any() or (columns >= spec.in_features).any():
        raise CheckpointError(f"{name}.outlier_columns are not all between 0 and {spec.in_features - 1}")
