"""Loads a quantized checkpoint strictly: everything the model needs, nothing else, or a clear error."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from quantlab.checkpoint.contents import (
    GENERATION_CONFIG_NAME,
    Contents,
    checkpoint_folder,
    read_contents,
    require_inside,
)
from quantlab.checkpoint.fusion import fuse_layers
from quantlab.checkpoint.guard import check_config, check_size
from quantlab.checkpoint.huggingface import adopt
from quantlab.checkpoint.placement import check_names, place
from quantlab.checkpoint.shard import read_shard
from quantlab.errors import CheckpointError, QuantlabError
from quantlab.skeleton import align, build_skeleton, read_config, tie_weights


def load(folder: Path | str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a checkpoint for inference, on the CPU and in evaluation mode.

    The checkpoint may come from anywhere: no code in it is run, nothing outside its folder is read, and what it makes
    the program allocate is bounded by its own size and by `quantlab.checkpoint.limits`.

    Args:
        folder: written by `CheckpointWriter`, or the folder of a run.
        dtype: what the model computes in; None takes that of the checkpoint. The stored codes and codebooks
            are the same in every dtype.

    Returns:
        The model, with a `LutLinear` in the place of every quantized layer.

    Raises:
        CheckpointError: a file is missing or damaged, of an unknown version, or does not fit the model.
        ModelError: transformers does not know the architecture.
    """
    contents = read_contents(checkpoint_folder(Path(folder)))
    model = empty_model(contents, dtype)
    placeholders = model.state_dict()
    for shard in contents.shards:
        model.load_state_dict(read_shard(contents, shard, placeholders), strict=False, assign=True)
    # Weights tied to one that is there are not stored; transformers ties them and strikes them off the list.
    tie_weights(model, {name for name, tensor in model.state_dict().items() if tensor.is_meta})
    align(model)
    if (contents.folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = _generation_config(contents.folder)
    adopt(model, contents.quantization)
    fuse_layers(model)
    model.eval()
    return model


def empty_model(contents: Contents, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a checkpoint with all its tensors on the meta device, except those that it computes itself.

    Args:
        contents: of the checkpoint.
        dtype: what the model computes in; None takes that of the checkpoint.

    Raises:
        CheckpointError: the configuration asks for too much or makes no model, or the stored tensors do not fit it.
        ModelError: transformers does not know the architecture.
    """
    check_config(contents.config)
    try:
        config = read_config(contents.folder)
        check_size(config, contents)
        model = build_skeleton(config, dtype or _config_dtype(config))
    except QuantlabError:
        raise
    except Exception as error:  # a configuration from anywhere makes the code it configures fail in any way
        raise CheckpointError(
            f"{contents.folder}: transformers builds no model from config.json: {type(error).__name__}: {error}"
        ) from error
    place(model, contents.quantization)
    check_names(model, contents)
    return model


def _config_dtype(config: PretrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _generation_config(folder: Path) -> GenerationConfig:
    require_inside(folder, [GENERATION_CONFIG_NAME])
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(
            f"{folder / GENERATION_CONFIG_NAME}: transformers cannot use it: {type(error).__name__}: {error}"
        ) from error
