"""Keeps a config.json from anywhere from making the program allocate or compute without bound.

transformers builds whatever a configuration describes. So its numbers are bounded first, and then the model is built
once without any memory, where every parameter that is announced must be covered by bytes that lie on the disk.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig

from quantlab.checkpoint.contents import Contents
from quantlab.checkpoint.limits import MAX_BUFFER_BYTES, MAX_LAYERS, MAX_SIZE, WEIGHTS_PER_STORED_BYTE
from quantlab.errors import CheckpointError

# num_hidden_layers, n_layer, depth and the like, but not sizes per layer. Configurations make lists of that length.
_COUNTS_LAYERS = re.compile(r"(?<!per_)(layers?|depths?|blocks?)$")


def check_config(config: Mapping[str, Any]) -> None:
    """Bound the numbers of a config.json, and refuse what would make transformers read or fetch something else.

    Raises:
        CheckpointError: naming the key and its value.
    """
    for path, value in _leaves({key: value for key, value in config.items() if key != "quantization_config"}):
        if not path.isprintable():
            raise CheckpointError(f"config.json: {path!r} cannot be the name of a setting")
        key = path.rpartition(".")[2]
        if type(value) is int and abs(value) > (MAX_LAYERS if _COUNTS_LAYERS.search(key.lower()) else MAX_SIZE):
            raise CheckpointError(f"config.json: {path} is {value}, more than any model has; it is not built")
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"config.json: {path} is {value!r}; kernels named by a checkpoint are not fetched")
    if "configuration_files" in config:
        raise CheckpointError("config.json: configuration_files names another configuration; it is not followed")


def check_size(config: PretrainedConfig, contents: Contents) -> None:
    """Build the model without memory and compare it with what is stored.

    Raises:
        CheckpointError: it has more parameters than the shards can hold, or computes huge tensors.
    """
    tensors = sum(len(shard) for shard in contents.shards.values())
    with torch.device("meta"), _counting(tensors, WEIGHTS_PER_STORED_BYTE * contents.stored_bytes):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    buffers_bytes = sum(buffer.nbytes for buffer in model.buffers())
    if buffers_bytes > MAX_BUFFER_BYTES:
        raise CheckpointError(
            f"config.json describes a model with {buffers_bytes >> 20} MiB of computed tables; "
            f"at most {MAX_BUFFER_BYTES >> 20} MiB are allocated"
        )


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Every value that is no list or object, under the dotted path of its keys."""
    pending: list[tuple[str, object]] = list(config.items())
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(path, inner) for inner in value]
        else:
            yield path, value


@contextmanager
def _counting(tensors: int, elements: int) -> Iterator[None]:
    """Inside, more parameters, or more elements of them, than are stored end the construction of a model.

    Each may count twice, since a weight that is tied to another is registered but not stored.
    """
    parameters = total = 0

    def count(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, total
        if parameter is None:
            return
        parameters, total = parameters + 1, total + parameter.numel()
        if parameters > 2 * tensors or total > 2 * elements:
            raise CheckpointError(
                f"config.json describes a model of more than {parameters - 1} parameters; the {tensors} stored tensors "
                f"cannot hold {name} of shape {tuple(parameter.shape)} as well"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
