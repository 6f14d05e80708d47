"""Ordinary layers with the weights that quantized ones stand for."""

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.runtime import LutLinear


def densify(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every `LutLinear` by a `torch.nn.Linear` in `dtype`, on the same device.

    Its weight is the one that `LutLinear.forward` multiplies with for inputs of that type.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LutLinear):
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.spec.bias, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        model.set_submodule(name, linear.eval())
