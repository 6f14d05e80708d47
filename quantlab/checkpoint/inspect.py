"""What is in a checkpoint, from its headers alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.checkpoint.contents import checkpoint_folder, read_contents, require_inside
from quantlab.checkpoint.documents import read_json
from quantlab.checkpoint.format import storage_bits
from quantlab.checkpoint.names import MANIFEST_NAME


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer.

    Attributes:
        name: its module in the model.
        shape: (out_features, in_features).
        bits: code width.
        group_size: inputs that share a codebook; None means one codebook per row.
        codebook: "lut" or "uniform".
        outliers: stored additive corrections.
        bits_per_weight: stored bits per weight, codebooks and outliers included.
        relative_loss: as the manifest of the run has it; None where there is no manifest beside the checkpoint.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    codebook: str
    outliers: int
    bits_per_weight: float
    relative_loss: float | None


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds.

    Attributes:
        model_type: architecture in the words of transformers.
        method: {"name", "options"} of what produced the codes.
        producer: {"name", "version"} of the program that wrote it.
        bits_per_weight: over all quantized layers.
        stored_bytes: size of all shards.
        shards: their number.
        layers: in the order of config.json.
    """

    model_type: str
    method: dict[str, object]
    producer: dict[str, object]
    bits_per_weight: float
    stored_bytes: int
    shards: int
    layers: tuple[LayerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def inspect(path: Path) -> Summary:
    """Summarise a checkpoint; values of tensors are not read.

    Args:
        path: a checkpoint, or the folder of a run, whose manifest then gives the losses.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    contents = read_contents(checkpoint_folder(path))
    quantization = contents.quantization
    losses = _losses(path) if contents.folder != path else {}
    return Summary(
        model_type=str(contents.config.get("model_type")),
        method=dict(quantization.method),
        producer=dict(quantization.producer),
        bits_per_weight=quantization.bits_per_weight,
        stored_bytes=contents.stored_bytes,
        shards=len(contents.shards),
        layers=tuple(
            LayerSummary(
                name=name,
                shape=(spec.out_features, spec.in_features),
                bits=spec.bits,
                group_size=spec.group_size,
                codebook=spec.codebook,
                outliers=spec.outliers,
                bits_per_weight=storage_bits(spec) / (spec.out_features * spec.in_features),
                relative_loss=losses.get(name),
            )
            for name, spec in quantization.modules.items()
        ),
    )


def _losses(run_folder: Path) -> dict[str, float]:
    """relative_loss by layer; entries that are not of that kind are none of ours."""
    if not (run_folder / MANIFEST_NAME).exists():
        return {}
    require_inside(run_folder, [MANIFEST_NAME])
    layers = read_json(run_folder / MANIFEST_NAME).get("layers")
    return {
        layer["name"]: layer["relative_loss"]
        for layer in (layers if isinstance(layers, list) else [])
        if isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and isinstance(layer.get("relative_loss"), float)
    }
