"""What a target format makes of one stored layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantlab.errors import UsageError
from quantlab.runtime import LutLinear, ModuleSpec
from quantlab_kernels import unpack_codes


@dataclass(frozen=True, eq=False)
class Source:
    """What is known of a checkpoint before a value is read.

    Attributes:
        modules: how the quantized layers are stored.
        float_layers: linear layers, other than the output head, that are not quantized.
        transposed: quantized layers whose class in the model stores the weight as (in_features, out_features).
        dtype: what the model computes in.
    """

    modules: Mapping[str, ModuleSpec]
    float_layers: list[str]
    transposed: frozenset[str]
    dtype: torch.dtype


class Target(Protocol):
    """A format to export to."""

    name: str

    def prepare(self, source: Source) -> None:
        """Refuse what the format cannot hold, before a value is read.

        Raises:
            UsageError: naming the layers and the reason.
        """
        ...

    def convert(self, name: str, layer: LutLinear) -> dict[str, Tensor]:
        """The tensors that stand for the weight of a layer, by the end of their names; the bias is kept as it is.

        Raises:
            UsageError: the format cannot hold the values of this layer.
        """
        ...

    def config(self) -> dict[str, object] | None:
        """The `quantization_config` for config.json, known after the last layer; None if there is none."""
        ...


@dataclass(frozen=True, eq=False)
class UniformLayer:
    """A layer on a uniform grid whose level k is (k - zero) * scale.

    Attributes:
        codes: (out_features, in_features) uint8.
        scale: (out_features, groups) float16.
        zero: (out_features, groups) uint8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def require_uniform(target: str, source: Source) -> None:
    """Check that every layer is an ordinary linear layer on a uniform grid without outliers.

    Raises:
        UsageError: naming how many are not, and the first.
    """
    modules = source.modules
    tables = [name for name, spec in modules.items() if spec.codebook == "lut"]
    if tables:
        raise UsageError(
            f"{target} holds uniform grids; {len(tables)} of {len(modules)} layers have look-up tables, the first is "
            f"{tables[0]}. Of the formats to export to, only dequantized holds look-up tables, at the size of the "
            "original weights; rtn, gptq and quantease make uniform grids"
        )
    outliers = [name for name, spec in modules.items() if spec.outliers]
    if outliers:
        raise UsageError(
            f"{target} has no place for sparse outliers; {len(outliers)} of {len(modules)} layers have some, the first "
            f"is {outliers[0]}. Use --format dequantized"
        )
    if source.transposed:
        raise UsageError(
            f"{target} is read into torch.nn.Linear only; {min(source.transposed)} belongs to an architecture with "
            "layers of its own. Use --format dequantized"
        )


def unpack_uniform(target: str, name: str, layer: LutLinear) -> UniformLayer:
    """Codes and grid of a layer, for formats whose zeros are codes.

    Raises:
        UsageError: a zero is not a whole code.
    """
    zero = layer.get_buffer("zero").float()
    if (zero != zero.round()).any() or (zero < 0).any() or (zero >= 1 << layer.spec.bits).any():
        raise UsageError(
            f"{target} stores zeros as codes from 0 to {(1 << layer.spec.bits) - 1}; {name} has one between them or "
            f"outside (from {zero.min().item():g} to {zero.max().item():g}). Use --format dequantized"
        )
    codes = unpack_codes(layer.get_buffer("packed_codes"), layer.in_features).contiguous()
    return UniformLayer(codes=codes, scale=layer.get_buffer("scale"), zero=zero.to(torch.uint8))
