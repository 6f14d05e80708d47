"""Rewrites a checkpoint shard by shard; what is not quantized is copied bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.atomic import staged_folder
from quantlab.checkpoint.contents import Contents, checkpoint_folder, read_contents, require_inside
from quantlab.checkpoint.export.compressed import CompressedTensors
from quantlab.checkpoint.export.dequantized import Dequantized
from quantlab.checkpoint.export.gptq import Gptq
from quantlab.checkpoint.export.layer import Source, Target
from quantlab.checkpoint.format import CONFIG_NAME
from quantlab.checkpoint.reader import empty_model
from quantlab.checkpoint.serialize import write_safetensors
from quantlab.checkpoint.shard import read_shard
from quantlab.checkpoint.writer import copy_side_files, side_files, write_json
from quantlab.errors import UsageError
from quantlab.runtime import LutLinear, storage_layout
from quantlab.skeleton import build_skeleton

FORMATS: Final[dict[str, Callable[[], Target]]] = {
    target.name: target for target in (Dequantized, CompressedTensors, Gptq)
}


def export(path: Path, target_name: str, output_dir: Path) -> None:
    """Convert a checkpoint to another format.

    Args:
        path: a checkpoint, or the folder of a run.
        target_name: one of `FORMATS`.
        output_dir: the folder to create; it appears when it is complete.

    Raises:
        UsageError: the format cannot hold the checkpoint, or the folder exists.
        CheckpointError: the checkpoint is damaged.
        ResumableError: the result cannot be written.
    """
    if output_dir.exists():
        raise UsageError(f"the output folder {output_dir} exists; choose another with --output-dir, or remove it")
    contents = read_contents(checkpoint_folder(path))
    if contents.quantization.unfused_experts:
        raise UsageError(
            f"{contents.folder} is a mixture of experts, whose weights other programs expect fused; "
            "exporting it is not supported"
        )
    model = empty_model(contents, None)
    target = FORMATS[target_name]()
    target.prepare(_describe(contents, model))
    require_inside(contents.folder, side_files(contents.folder))
    with staged_folder(output_dir) as folder:
        _write_shards(contents, model, target, folder)
        copy_side_files(contents.folder, folder)
        section = target.config()
        config = {key: value for key, value in contents.config.items() if key != "quantization_config"}
        write_json(folder / CONFIG_NAME, config if section is None else {**config, "quantization_config": section})


def _write_shards(contents: Contents, model: PreTrainedModel, target: Target, folder: Path) -> None:
    placeholders = model.state_dict()
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(contents.shards, start=1):
        file = f"model-{number:05d}-of-{len(contents.shards):05d}.safetensors"
        tensors = _convert(contents, target, read_shard(contents, shard, placeholders))
        write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )


def _convert(contents: Contents, target: Target, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a shard in the target format."""
    tensors = dict(stored)
    for name, spec in contents.quantization.modules.items():
        if f"{name}.packed_codes" not in stored:
            continue
        parts = {key: tensors.pop(f"{name}.{key}") for key in storage_layout(spec)}
        layer = LutLinear(spec, parts, tensors.get(f"{name}.bias"))
        tensors |= {f"{name}.{key}": tensor for key, tensor in target.convert(name, layer).items()}
    return tensors


def _describe(contents: Contents, model: PreTrainedModel) -> Source:
    head, modules = model.get_output_embeddings(), contents.quantization.modules
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    original = build_skeleton(model.config, model.dtype)
    transposed = frozenset(name for name in modules if isinstance(original.get_submodule(name), Conv1D))
    return Source(modules=modules, float_layers=linears, transposed=transposed, dtype=model.dtype)
