"""The ordinary format of transformers, with the weights that the codes stand for."""

import torch
from torch import Tensor

from quantlab.checkpoint.export.layer import Source
from quantlab.runtime import LutLinear


class Dequantized:
    """Dense weights in the dtype of the model; holds everything, at the size of the original model."""

    name = "dequantized"

    def __init__(self) -> None:
        self._dtype = torch.float32
        self._transposed: frozenset[str] = frozenset()

    def prepare(self, source: Source) -> None:
        """Nothing is refused."""
        self._dtype, self._transposed = source.dtype, source.transposed

    def convert(self, name: str, layer: LutLinear) -> dict[str, Tensor]:
        """The dense weight."""
        weight = layer.dequantize().to(self._dtype)
        return {"weight": weight.T.contiguous() if name in self._transposed else weight}

    def config(self) -> None:
        """The result is not a quantized model."""
