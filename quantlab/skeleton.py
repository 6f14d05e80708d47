"""A causal LM without its weights, and the weights of one part of it at a time.

The skeleton is the ordinary transformers module tree with parameters on the meta device and real buffers.
Parts are filled from the safetensors files through transformers' own state-dict conversion, so that every
renaming and fusing of a checkpoint is done by the code that defines it.

Every use of private transformers API in quantlab stands in this module and in `quantlab.experts`;
`tests/engine/test_skeleton_assumptions.py` says which assumption broke when a release changes it.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from quantlab.errors import ModelError

MIN_BLOCK_SHARE = 0.75  # of the weights of the decoder without embeddings and output head
ALIGNMENT_BYTES = 64  # what PyTorch gives to the tensors that it allocates itself
CPU = torch.device("cpu")


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of the model in a local folder; remote code is never run.

    Raises:
        ModelError: config.json is missing or transformers does not know the architecture.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot read config.json as a transformers model configuration: {error}") from error
    return config


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The module tree of a causal LM in evaluation mode: parameters on meta, buffers real.

    Raises:
        ModelError: the architecture is not a causal language model.
    """
    try:
        with _parameters_on_meta(), no_init_weights():
            # A copy, since transformers notes the dtype in the configuration it is given.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except ValueError as error:
        raise ModelError(f"architecture {config.model_type!r} is not a causal language model: {error}") from error
    model.tie_weights()  # part of the initialisation that is left out
    model.eval()
    return model


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their common name, for example ("model.layers", ModuleList of 32).

    Of the outermost lists of modules it is, in this order of preference, one inside the text decoder (not a vision
    tower), one of modules that transformers says not to split over devices, the longest, the one with most weights.

    Raises:
        ModelError: no list of blocks is found that holds most of the decoder.
    """
    decoder: nn.Module = model.get_decoder()
    indivisible = set(model._no_split_modules or ())
    inside = {id(module) for module in decoder.modules()}

    def preference(candidate: tuple[str, nn.ModuleList]) -> tuple[bool, bool, int, int]:
        blocks = candidate[1]
        classes = {type(block).__name__ for block in blocks}
        return id(blocks) in inside, classes <= indivisible, len(blocks), _num_weights(blocks)

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    outermost = [item for item in lists if not any(item[0].startswith(name + ".") for name, _ in lists)]
    name, blocks = max(outermost, key=preference, default=("", nn.ModuleList()))
    body = _num_weights(decoder if id(blocks) in inside else model)
    if _num_weights(blocks) < MIN_BLOCK_SHARE * body:
        raise ModelError(
            f"{type(model).__name__}: no list of decoder blocks found"
            + (f"; the best candidate, {name}, holds {_num_weights(blocks):,} of {body:,} weights" if name else "")
        )
    return name, blocks


def _num_weights(module: nn.Module) -> int:
    """Weights of a module without embeddings and output head; a quantized layer counts like the one it replaced."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    count = 0
    for child in module.modules():
        if isinstance(child, nn.Embedding) or child is head:
            continue
        rows, columns = getattr(child, "out_features", None), getattr(child, "in_features", None)
        if isinstance(rows, int) and isinstance(columns, int):
            count += rows * columns
        else:
            count += sum(parameter.numel() for parameter in child.parameters(recurse=False))
    return count


def load_model(folder: Path, dtype: torch.dtype, device: torch.device = CPU) -> PreTrainedModel:
    """The whole model of a local folder, in evaluation mode.

    Args:
        folder: with a configuration and safetensors weights.
        dtype: what the model computes in.
        device: where it computes.

    Raises:
        ModelError: it is not a causal language model, or weights are missing or damaged.
    """
    model = build_skeleton(read_config(folder), dtype)
    weights = WeightSource(folder, model, dtype, device)
    weights.load_rest()
    for index in range(len(find_blocks(model)[1])):
        weights.load_block(index)
    return model


def tie_weights(model: PreTrainedModel, missing: set[str]) -> None:
    """Tie what the architecture ties, to the weight that is there; strikes tied names off the missing ones."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def unload(module: nn.Module, *, recurse: bool = True) -> None:
    """Give the parameters of a module, and of those inside it, back to the meta device; buffers stay."""
    for child in module.modules() if recurse else [module]:
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class WeightSource:
    """The safetensors files of a model folder, read one part at a time.

    Args:
        folder: a local model folder.
        model: the skeleton to fill.
        dtype: the dtype that weights are converted to on loading.
        device: where weights are loaded to; the skeleton's buffers are moved there.

    Raises:
        ModelError: weight files are missing or damaged, or blocks share weights.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype, device: torch.device = CPU) -> None:
        place_buffers(model, device)
        self._folder = folder
        self._model = model
        self._mapping = get_model_conversion_mapping(model)
        self._load_config = LoadStateDictConfig(
            dtype=dtype,
            device_map={"": device},
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=self._mapping,  # type: ignore[arg-type]  # declared as a list of their common base
        )
        prefix, self._blocks = find_blocks(model)
        _require_separate_blocks(model, prefix, self._blocks)
        self._block_prefix = prefix + "."
        self._parts: dict[int | None, list[tuple[Path, str]]] = {}  # None: everything outside the blocks
        files = {file: _open(file).keys() for file in weight_files(folder)}
        runtime_names = self._runtime_names([key for keys in files.values() for key in keys])
        for file, keys in files.items():
            for key in keys:
                self._parts.setdefault(self._block_of(runtime_names[key]), []).append((file, key))

    def load_block(self, index: int) -> None:
        """Fill the parameters of one decoder block."""
        self._load(index)
        self._require_loaded(f"{self._block_prefix}{index}.", self._blocks[index].named_parameters())

    def load_rest(self) -> None:
        """Fill everything outside the decoder blocks, and tie what the model ties."""
        tie_weights(self._model, self._load(None))
        outside = (item for item in self._model.named_parameters() if not item[0].startswith(self._block_prefix))
        self._require_loaded("", outside)

    def unload_rest(self) -> None:
        """Give the parameters outside the decoder blocks back to the meta device, until `load_rest`."""
        blocks = {id(module) for module in self._blocks.modules()}
        for module in self._model.modules():
            if id(module) not in blocks:
                unload(module, recurse=False)

    def block_tensors(self, index: int) -> list[tuple[Path, str]]:
        """File and key of every tensor that `load_block` reads."""
        return self._parts.get(index, [])

    def _load(self, part: int | None) -> set[str]:
        by_file: dict[Path, list[str]] = {}
        for file, key in self._parts.get(part, ()):
            by_file.setdefault(file, []).append(key)
        handles = {file: _open(file) for file in by_file}
        state = {key: handles[file].get_slice(key) for file, keys in by_file.items() for key in keys}
        with _no_transformers_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self._model, state, self._load_config)
        if info.mismatched_keys or info.conversion_errors:
            raise ModelError(f"{self._folder}: weights do not fit: {info.mismatched_keys or info.conversion_errors}")
        align(self._model)
        missing: set[str] = info.missing_keys
        return missing

    def _runtime_names(self, keys: list[str]) -> dict[str, str]:
        """The name in the module tree that each checkpoint key is loaded under."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix, tree = self._model.base_model_prefix, self._model.state_dict()
        return {key: rename_source_key(key, renamings, converters, prefix, tree)[0] for key in keys}

    def _block_of(self, name: str) -> int | None:
        index, separator, _ = name.removeprefix(self._block_prefix).partition(".")
        inside = name.startswith(self._block_prefix) and separator and index.isdigit()
        return int(index) if inside else None

    def _require_loaded(self, prefix: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        absent = [prefix + name for name, parameter in parameters if parameter.is_meta]
        if absent:
            raise ModelError(
                f"{self._folder}: {len(absent)} weights are missing, the first is {absent[0]}; "
                "the folder may be an incomplete download"
            )


def open_streamed(
    source: Path, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[PreTrainedModel, str, list[nn.Module], WeightSource]:
    """A skeleton with the weights that a forward pass begins with: those outside the blocks, and of the first block.

    Returns:
        The model, the name of its blocks, the blocks, and where the weights of the others come from.

    Raises:
        ModelError: the model cannot be streamed.
    """
    model = build_skeleton(read_config(source), dtype)
    prefix, blocks = find_blocks(model)
    weights = WeightSource(source, model, dtype, device)
    weights.load_rest()
    weights.load_block(0)
    return model, prefix, list(blocks), weights


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module tree that are not on the meta device; parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def align(model: nn.Module) -> None:
    """Copy weights that start at odd addresses, as they may in a mapped file.

    Matrix products can round differently for them; results must not depend on where a weight lies in its file.
    """
    for parameter in model.parameters():
        if parameter.device == CPU and parameter.data_ptr() % ALIGNMENT_BYTES:
            parameter.data = parameter.data.clone()


def _require_separate_blocks(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList) -> None:
    owners: dict[int, str] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters(f"{prefix}.{index}"):
            owner = owners.setdefault(id(parameter), name)
            if not owner.startswith(f"{prefix}.{index}."):
                raise ModelError(
                    f"{type(model).__name__}: the blocks share weights ({name} is {owner}), so they cannot be "
                    "quantized one at a time"
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, all inside the folder.

    Raises:
        ModelError: there are none, or the index names files outside the folder or not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index: {error}") from error
    files = [folder / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not file.is_file():
            raise ModelError(f"{index}: names the file {name!r}, which is not in {folder}")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every new parameter goes to the meta device while buffers are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is already there may be tied: keep identity
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _no_transformers_progress_bar() -> Iterator[None]:
    """Loading a block is a fraction of a second; its bar would tear the run's own progress display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
