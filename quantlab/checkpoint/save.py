"""`save_pretrained` of a quantized model: the same strict folder that a run writes."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quantlab.checkpoint.contents import GENERATION_CONFIG_NAME
from quantlab.checkpoint.format import CONFIG_NAME, QuantizationConfig
from quantlab.checkpoint.writer import CheckpointWriter, write_json
from quantlab.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# Arguments of transformers' save_pretrained that ask for nothing if they are true; all others ask if they are.
_USUALLY_TRUE = frozenset({"is_main_process", "safe_serialization", "save_original_format", "save_peft_format"})


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    **others: object,
) -> None:
    """Write a checkpoint that `quantlab.load` and `from_pretrained` read; the tokenizer is saved by itself.

    Args:
        model: with `LutLinear` layers.
        save_directory: a folder without a model; created if it does not exist.
        max_shard_size: bytes, or a number with KB, MB or GB. One layer is never split.
        others: further arguments of transformers' `save_pretrained`; accepted only if they ask for nothing.

    Raises:
        UsageError: an argument that is not supported, or a folder that holds a model.
        CheckpointError: a tensor is offloaded or not finite.
    """
    asked = [name for name, value in others.items() if bool(value) != (name in _USUALLY_TRUE)]
    if asked:
        raise UsageError(
            f"save_pretrained of a quantlab model does not take {asked[0]}={others[asked[0]]!r}; "
            "save to a folder, and upload or process that"
        )
    folder = Path(save_directory)
    taken = [path.name for pattern in (CONFIG_NAME, "*.safetensors", "*.bin") for path in folder.glob(pattern)]
    if taken:
        raise UsageError(f"{folder} holds a model already ({taken[0]}); choose another folder")
    quantizer: Any = model.hf_quantizer  # set by quantlab.checkpoint.huggingface.adopt
    quantization: QuantizationConfig = quantizer.quantization_config.quantization
    tied = model.all_tied_weights_keys.keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    writer = CheckpointWriter(folder)
    for index, tensors in enumerate(_split(state, quantization.modules, _bytes(max_shard_size))):
        writer.add_shard(f"{index:05d}", tensors)
    if model.can_generate():
        write_json(folder / GENERATION_CONFIG_NAME, json.loads(model.generation_config.to_json_string()))
    dtype = str(model.dtype).removeprefix("torch.")
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__], "dtype": dtype}
    writer.finish(None, config, quantization)


def _split(state: Mapping[str, Tensor], modules: Iterable[str], limit_bytes: int) -> list[dict[str, Tensor]]:
    """Shards of at most `limit_bytes`, in the order of the model; the tensors of a quantized layer stay together."""
    layers = set(modules)
    units: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner = name.rpartition(".")[0]
        units.setdefault(owner if owner in layers else name, {})[name] = tensor
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for unit in units.values():
        size = sum(tensor.nbytes for tensor in unit.values())
        if shards[-1] and used + size > limit_bytes:
            shards.append({})
            used = 0
        shards[-1] |= unit
        used += size
    return shards


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", size.upper())
    if match is None:
        raise UsageError(f"max_shard_size={size!r} is neither a number of bytes nor one with {', '.join(_UNITS)}")
    return int(float(match[1]) * _UNITS[match[2]])
