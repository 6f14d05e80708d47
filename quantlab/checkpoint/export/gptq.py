"""The layout of GPTQ checkpoints (arXiv:2210.17323), in its second version, as GPTQModel and vLLM read it.

A weight becomes `qweight` (in_features * bits / 32, out_features), the codes of an output in one stream of bits down
the column, `qzeros` (groups, out_features * bits / 32), `scales` (groups, out_features) and `g_idx`, the group of every
input. The first version stores zeros minus one, so that it cannot hold the zero 0; it is not written.
"""

import torch
from torch import Tensor

from quantlab.checkpoint.export.bitstream import pack_stream
from quantlab.checkpoint.export.layer import Source, require_uniform, unpack_uniform
from quantlab.errors import UsageError
from quantlab.runtime import LutLinear

_BITS = frozenset({2, 3, 4, 8})
_WORD = 32


class Gptq:
    """Uniform grids of 2, 3, 4 or 8 bits, the same for all linear layers but the output head."""

    name = "gptq"

    def __init__(self) -> None:
        self._budget: tuple[int, int | None] | None = None

    def prepare(self, source: Source) -> None:
        """Refuse look-up tables, outliers, mixed budgets, odd shapes and layers that are not quantized."""
        require_uniform(self.name, source)
        budgets = {(spec.bits, spec.group_size) for spec in source.modules.values()}
        self._budget = budgets.pop()
        if budgets or self._budget[0] not in _BITS:
            raise UsageError(
                f"gptq holds one code width out of {sorted(_BITS)} and one group size for all layers; the checkpoint "
                f"has (bits, group size) {[self._budget, *budgets]}"
            )
        if source.float_layers:
            raise UsageError(
                f"gptq holds models whose linear layers are all quantized; {len(source.float_layers)} are not, "
                f"the first is {source.float_layers[0]}"
            )
        odd = [name for name, spec in source.modules.items() if spec.in_features % _WORD or spec.out_features % _WORD]
        if odd:
            raise UsageError(f"gptq holds layers whose sizes are multiples of {_WORD}; those of {odd[0]} are not")

    def convert(self, name: str, layer: LutLinear) -> dict[str, Tensor]:
        """Codes and zeros repacked, codes and scales transposed."""
        uniform, bits = unpack_uniform(self.name, name, layer), layer.spec.bits
        groups = torch.arange(layer.in_features) // (layer.spec.group_size or layer.in_features)
        return {
            "qweight": pack_stream(uniform.codes, bits).T.contiguous(),
            "qzeros": pack_stream(uniform.zero.T.contiguous(), bits),
            "scales": uniform.scale.T.contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    def config(self) -> dict[str, object]:
        """The keys that its readers look for."""
        assert self._budget is not None, "prepare comes first"
        bits, group_size = self._budget
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size or -1,
            "desc_act": False,
            "sym": False,
            "lm_head": False,
            "checkpoint_format": "gptq_v2",
            "pack_dtype": "int32",
        }
