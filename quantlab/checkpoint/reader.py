"""Loads a quantized checkpoint strictly: everything the model needs, nothing else, or a clear error."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.format import CONFIG_NAME, QuantizationConfig
from quantlab.checkpoint.index import read_index, read_json, read_shard
from quantlab.errors import CheckpointError
from quantlab.runtime import LutLinear, ModuleSpec, storage_layout
from quantlab.skeleton import build_skeleton, read_config, tie_weights


def load(folder: Path | str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a checkpoint for inference, on the CPU and in evaluation mode.

    Args:
        folder: written by `CheckpointWriter`.
        dtype: what the model computes in; None takes that of the checkpoint. The stored codes and codebooks
            are the same in every dtype.

    Returns:
        The model, with a `LutLinear` in the place of every quantized layer.

    Raises:
        CheckpointError: a file is missing or damaged, of an unknown version, or does not fit the model.
        ModelError: transformers does not know the architecture.
    """
    folder = Path(folder)
    section = read_json(folder / CONFIG_NAME).get("quantization_config")
    if section is None:
        raise CheckpointError(f"{folder / CONFIG_NAME} has no 'quantization_config'; the model is not quantized")
    quantization = QuantizationConfig.from_dict(section)
    config = read_config(folder)
    model = build_skeleton(config, dtype or _config_dtype(config))
    for name, spec in quantization.modules.items():
        model.set_submodule(name, _placeholder(model, name, spec))
    _fill(model, folder, quantization.modules)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return model


def _config_dtype(config: PretrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _placeholder(model: nn.Module, name: str, spec: ModuleSpec) -> LutLinear:
    try:
        original = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"the checkpoint quantizes {name}, which {type(model).__name__} does not have") from error
    if not isinstance(original, nn.Linear | Conv1D):
        raise CheckpointError(
            f"the checkpoint quantizes {name}, which is {type(original).__name__}, not a linear layer"
        )
    rows, columns = original.weight.shape if isinstance(original, nn.Linear) else reversed(original.weight.shape)
    expected = (rows, columns, original.bias is not None)
    if (spec.out_features, spec.in_features, spec.bias) != expected:
        raise CheckpointError(
            f"{name}: the checkpoint describes out_features={spec.out_features}, in_features={spec.in_features}, "
            f"bias={spec.bias}; the model has {rows}, {columns}, {expected[2]}"
        )
    return LutLinear.empty(spec, bias_dtype=original.weight.dtype)


def _fill(model: PreTrainedModel, folder: Path, modules: Mapping[str, ModuleSpec]) -> None:
    placeholders = model.state_dict()
    exact = {f"{name}.{tensor}" for name, spec in modules.items() for tensor in storage_layout(spec)}
    missing = set(placeholders)
    for shard, names in read_index(folder).items():
        model.load_state_dict(read_shard(folder / shard, names, placeholders, exact), strict=False, assign=True)
        missing -= names
    # Weights tied to one that is there are not stored; transformers ties them and strikes them off the list.
    tie_weights(model, missing)
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, the first are {sorted(missing)[:5]}")
    for name, layer in model.named_modules():
        if isinstance(layer, LutLinear):
            _check_outliers(name, layer)


def _check_outliers(name: str, layer: LutLinear) -> None:
    if not layer.spec.outliers:
        return
    offsets, columns = layer.get_buffer("outlier_offsets"), layer.get_buffer("outlier_columns")
    if offsets[0] != 0 or offsets[-1] != len(columns) or (offsets.diff() < 0).any():
        raise CheckpointError(f"{name}.outlier_offsets do not ascend from 0 to the {len(columns)} stored outliers")
    if (columns < 0).any() or (columns >= layer.in_features).any():
        raise CheckpointError(f"{name}.outlier_columns are not all between 0 and {layer.in_features - 1}")
