"""What the journal says about a finished block."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantlab.engine.measure import LayerResult
from quantlab.runtime import ModuleSpec

REST, BLOCK = "rest", "block"
"""Kinds of journal entries: the weights outside the blocks are written; a block is finished."""


@dataclass(frozen=True, kw_only=True)
class FinishedBlock:
    """A block whose shard and whose hidden states behind it are on disk.

    Attributes:
        shard: file of its tensors.
        sha256: of the shard.
        layers: what is reported about its layers, in the order of solving.
        modules: how each quantized layer is stored, by its name in the model.
        hidden: SHA-256 by file name of the hidden states behind the block, by chain.
        seconds: where the time went.
    """

    shard: str
    sha256: str
    layers: tuple[LayerResult, ...]
    modules: Mapping[str, ModuleSpec]
    hidden: Mapping[str, Mapping[str, str]]
    seconds: Mapping[str, float]

    def to_entry(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"kind": BLOCK, **asdict(self)}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "FinishedBlock":
        """Back from what the journal kept."""
        values = {key: value for key, value in entry.items() if key != "kind"}
        layers = tuple(LayerResult(**layer | {"shape": tuple(layer["shape"])}) for layer in entry["layers"])
        modules = {name: ModuleSpec(**spec) for name, spec in entry["modules"].items()}
        return cls(**values | {"layers": layers, "modules": modules})
