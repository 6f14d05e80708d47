"""The weights of single layers, read from a run's checkpoint and, where it is at hand, from its float model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlab.api import CodebookSpec
from quantlab.checkpoint.contents import Contents, checkpoint_folder, read_contents
from quantlab.checkpoint.shard import check_layer
from quantlab.errors import CheckpointError, ModelError
from quantlab.models import DEMO, resolve_model
from quantlab.runtime import CODEBOOK_DTYPE, LutLinear, ModuleSpec, storage_layout
from quantlab.skeleton import weight_files
from quantlab.solvers.grid import round_to_nearest

MAX_ROWS = 512
"""Rows of a layer that are looked at."""

_DTYPE_NAMES = {torch.int32: "I32", CODEBOOK_DTYPE: "F16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class CodebookView:
    """The weights that share one codebook.

    Attributes:
        row: output row of the layer.
        group: number of the group in that row; None where the row has one codebook.
        levels: (levels in use,), ascending.
        grid: (levels in use,), those of round-to-nearest for the same weights.
        weights: (weights,), of the float model, or as dequantized.
        is_original: whether they are those of the float model.
    """

    row: int
    group: int | None
    levels: Tensor
    grid: Tensor
    weights: Tensor
    is_original: bool


class RunWeights:
    """Reads layers of one run.

    Args:
        run_folder: of the run.
        model: the float model as the recipe names it; only a folder on this machine is read.

    Raises:
        CheckpointError: the checkpoint is not there or damaged.
    """

    def __init__(self, run_folder: Path, model: str) -> None:
        self._contents = read_contents(checkpoint_folder(run_folder))
        self._source = _source_files(model)

    def view(self, layer: str) -> CodebookView | None:
        """The codebook whose weights have the largest squared error, or the widest if the float ones are not known.

        Only the first rows of a layer are looked at, so that layers of any size take little memory.

        Returns:
            None if the checkpoint has no layer of that name.

        Raises:
            CheckpointError: the layer is damaged.
        """
        module = _read_layer(self._contents, layer)
        if module is None:
            return None
        dequantized = module.dequantize()
        original = self._original(layer, dequantized)
        size = module.spec.group_size or module.in_features
        quantized = dequantized.unflatten(1, (-1, size))
        weights = quantized if original is None else original.unflatten(1, (-1, size))
        spread = weights.std(2) if original is None else (weights - quantized).square().sum(2)
        row, group = divmod(int(spread.argmax()), spread.shape[1])
        chosen = weights[row, group]
        spec = CodebookSpec(bits=module.spec.bits, group_size=None)
        return CodebookView(
            row=row,
            group=None if module.spec.group_size is None else group,
            levels=quantized[row, group].unique(),
            grid=round_to_nearest(chosen[None], spec).dequantize().unique(),
            weights=chosen,
            is_original=original is not None,
        )

    def _original(self, layer: str, dequantized: Tensor) -> Tensor | None:
        """The weight of the float model, if it is stored under the layer's name and is what was quantized."""
        for file in self._source:
            try:
                with safe_open(file, framework="pt") as tensors:
                    if f"{layer}.weight" not in tensors.keys():  # noqa: SIM118, not a mapping
                        continue
                    weight: Tensor = tensors.get_slice(f"{layer}.weight")[: len(dequantized)].float()
            except (OSError, SafetensorError):
                return None
            # A transposed or fused weight, or that of another model, is not near what the layer computes with.
            if weight.shape != dequantized.shape or (weight - dequantized).norm() > 0.9 * weight.norm():
                return None
            return weight
        return None


def _source_files(model: str) -> list[Path]:
    if model != DEMO and not Path(model).expanduser().is_dir():
        return []  # a hub id: a report downloads nothing
    try:
        return weight_files(resolve_model(model))
    except ModelError:
        return []


def _read_layer(contents: Contents, name: str) -> LutLinear | None:
    spec = contents.quantization.modules.get(name)
    if spec is None:
        return None
    spec = replace(spec, bias=False)
    keys = {key: f"{name}.{key}" for key in storage_layout(spec)}
    shard = next((shard for shard, stored in contents.shards.items() if keys["packed_codes"] in stored), None)
    if shard is None or not set(keys.values()) <= contents.shards[shard].keys():
        raise CheckpointError(f"{contents.folder}: no shard holds the whole layer {name}")
    _require_layout(contents, shard, name, spec)
    try:
        with safe_open(contents.folder / shard, framework="pt") as file:
            tensors = {key: file.get_tensor(full) for key, full in keys.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{contents.folder / shard}: not a readable safetensors file: {error}") from error
    check_layer(name, spec, tensors)
    return _first_rows(spec, tensors)


def _first_rows(spec: ModuleSpec, tensors: Mapping[str, Tensor]) -> LutLinear:
    """The first rows of a layer without its outliers, which belong to no codebook."""
    rows = min(spec.out_features, MAX_ROWS)
    part = replace(spec, out_features=rows, outliers=0)
    kept = {key: tensors[key] for key in storage_layout(part)}
    cut = {key: tensor[:, :rows] if key == "packed_codes" else tensor[:rows] for key, tensor in kept.items()}
    return LutLinear(part, {key: tensor.contiguous() for key, tensor in cut.items()}, None)


def _require_layout(contents: Contents, shard: str, name: str, spec: ModuleSpec) -> None:
    """Compare dtypes and shapes in the header before a value is read."""
    for key, (dtype, shape) in storage_layout(spec).items():
        stored = contents.shards[shard][f"{name}.{key}"]
        if (stored.dtype, stored.shape) != (_DTYPE_NAMES[dtype], shape):
            raise CheckpointError(
                f"{contents.folder / shard}: tensor {name}.{key} is {stored.dtype} of shape {stored.shape}; "
                f"the layer needs {_DTYPE_NAMES[dtype]} of shape {shape}"
            )
