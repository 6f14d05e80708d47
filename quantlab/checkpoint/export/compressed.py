"""The format pack-quantized of compressed-tensors, read by transformers and vLLM.

A weight becomes `weight_packed` (out_features, words) with the codes of a row in one stream of bits, `weight_scale`
(out_features, groups), `weight_shape` and, unless every zero is the middle code, `weight_zero_point` (words, groups),
packed along the rows. Scales are widened to float32, so that a reader which dequantizes in their type gets the very
weights of the quantlab checkpoint.
"""

import torch
from torch import Tensor

from quantlab.checkpoint.export.bitstream import pack_stream
from quantlab.checkpoint.export.layer import Source, require_uniform, unpack_uniform
from quantlab.runtime import LutLinear


class CompressedTensors:
    """Uniform grids of 2 to 8 bits, each layer with bits and groups of its own."""

    name = "compressed-tensors"

    def __init__(self) -> None:
        self._layers: dict[tuple[int, int | None, bool], list[str]] = {}

    def prepare(self, source: Source) -> None:
        """Refuse look-up tables and outliers."""
        require_uniform(self.name, source)

    def convert(self, name: str, layer: LutLinear) -> dict[str, Tensor]:
        """Codes and zeros repacked."""
        uniform, bits = unpack_uniform(self.name, name, layer), layer.spec.bits
        symmetric = bool((uniform.zero == 1 << (bits - 1)).all())
        self._layers.setdefault((bits, layer.spec.group_size, symmetric), []).append(name)
        tensors = {
            "weight_packed": pack_stream(uniform.codes, bits),
            "weight_scale": uniform.scale.float(),
            "weight_shape": torch.tensor(uniform.codes.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_stream(uniform.zero.T.contiguous(), bits).T.contiguous()
        return tensors

    def config(self) -> dict[str, object]:
        """One group of layers for each kind of grid; layers are targeted by their exact names."""
        groups = {
            f"group_{index}": {
                "targets": sorted(names),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group_size is None else "group",
                    "group_size": group_size,
                    "dynamic": False,
                },
            }
            for index, ((bits, group_size, symmetric), names) in enumerate(self._layers.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
        }
