"""What an evaluation is about: a run, a quantized checkpoint or a float model, told apart and loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantlab.checkpoint.names import MANIFEST_NAME, MODEL_FOLDER
from quantlab.checkpoint.reader import load
from quantlab.engine.forward import CheckpointParts, FloatParts, ModelParts
from quantlab.errors import ModelError
from quantlab.models import resolve_model
from quantlab.skeleton import CPU, load_model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: as the user gave it.
        folder: with its weights and tokenizer.
        is_quantized: whether it is a checkpoint of quantlab.
        source: the float model that a run started from; None if it is not known.
        device: where it computes.
    """

    name: str
    folder: Path
    is_quantized: bool
    source: str | None = None
    device: torch.device = CPU

    @property
    def bytes_on_disk(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def memory_bytes(self, dtype: torch.dtype) -> int:
        """About what its weights occupy when it is loaded to compute in a dtype."""
        return self.bytes_on_disk if self.is_quantized else self.bytes_on_disk * dtype.itemsize // self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in unless told otherwise."""
        config = _config(self.folder)
        dtype: torch.dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
        return dtype

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model in evaluation mode.

        Args:
            dtype: what it computes in; None means as stored.

        Raises:
            QuantlabError: it cannot be loaded.
        """
        if self.is_quantized:
            model = load(self.folder, dtype=dtype)
            model.to(self.device)  # type: ignore[arg-type]  # a decorated method
            return model
        return load_model(self.folder, dtype or self.dtype, self.device)

    def open_parts(self, dtype: torch.dtype) -> ModelParts:
        """The model, to be loaded block by block.

        Args:
            dtype: what it computes in.

        Raises:
            QuantlabError: it cannot be streamed.
        """
        parts = CheckpointParts if self.is_quantized else FloatParts
        return parts(self.folder, dtype, self.device)


def find_subject(name: str, device: str = "cpu") -> Subject:
    """Find a model by the folder of a run, the folder of a checkpoint, or anything that names a float model.

    Args:
        name: of a folder or a model.
        device: where it computes.

    Raises:
        ModelError: there is no such model.
    """
    folder, where = Path(name).expanduser(), torch.device(device)
    if (folder / MANIFEST_NAME).is_file() and (folder / MODEL_FOLDER / "config.json").is_file():
        source = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["model"]["path"]
        return Subject(name=name, folder=folder / MODEL_FOLDER, is_quantized=True, source=source, device=where)
    if _config(folder).get("quantization_config", {}).get("quant_method") == "quantlab":
        return Subject(name=name, folder=folder, is_quantized=True, device=where)
    return Subject(name=name, folder=resolve_model(name), is_quantized=False, device=where)


def _config(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {folder / 'config.json'}: {error}") from error
    return content
