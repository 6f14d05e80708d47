"""The format as a quantization method of vLLM, found through the entry point `vllm.general_plugins`.

Not yet run on vLLM: it is written against the interface of vLLM's out-of-tree methods and tested against a stand-in.

vLLM computes q, k and v, or gate and up, in one layer whose parts it loads one after the other; their rows are stacked.
So the parts must be stored alike, and in-features cannot be divided among devices. Outliers are refused, since the
rows of compressed sparse storage do not stack.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import quantlab_kernels as quantlab_kernels  # registers torch.ops.quantlab
from quantlab.checkpoint.format import QUANT_METHOD, QuantizationConfig
from quantlab.errors import CheckpointError
from quantlab.runtime import ModuleSpec, storage_layout


def register() -> None:
    """Make vLLM know the format; called by vLLM in each of its processes. Does nothing where vLLM is absent."""
    try:
        from vllm.model_executor.layers import linear, quantization
        from vllm.model_executor.layers.quantization import base_config
    except ImportError:
        return
    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(QUANT_METHOD)(make_config(base_config, linear))


def make_config(base_config: ModuleType, linear: ModuleType) -> type:
    """The configuration class, a child of vLLM's `QuantizationConfig`.

    Args:
        base_config: vllm.model_executor.layers.quantization.base_config.
        linear: vllm.model_executor.layers.linear.
    """
    method = make_method(linear)

    class QuantlabConfig(base_config.QuantizationConfig):  # type: ignore[misc, name-defined]
        def __init__(self, quantization: QuantizationConfig) -> None:
            super().__init__()
            self.quantization = quantization

        @classmethod
        def get_name(cls) -> str:
            return QUANT_METHOD

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 80

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []  # everything is in config.json

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "QuantlabConfig":
            return cls(QuantizationConfig.from_dict(config))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, linear.LinearBase):
                return None
            spec = spec_of(self.quantization, prefix, self.packed_modules_mapping)
            return linear.UnquantizedLinearMethod() if spec is None else method(spec)

    return QuantlabConfig


def spec_of(quantization: QuantizationConfig, prefix: str, packed: dict[str, list[str]]) -> ModuleSpec | None:
    """How a layer of vLLM is stored; None if it is not quantized.

    Args:
        quantization: of the checkpoint.
        prefix: name of the layer in vLLM.
        packed: names of the parts that vLLM computes in one layer, for example {"qkv_proj": ["q_proj", ...]}.

    Raises:
        CheckpointError: the parts of a layer are stored differently, or in a way that cannot be stacked.
    """
    parent, _, own = prefix.rpartition(".")
    parts = [f"{parent}.{part}" for part in packed.get(own, [own])]
    specs = [quantization.modules.get(part) for part in parts]
    kinds = {(spec.bits, spec.group_size, spec.codebook, spec.in_features) if spec else None for spec in specs}
    if len(kinds) > 1:
        raise CheckpointError(f"{prefix}: vLLM computes {parts} in one layer, but they are stored differently")
    if any(spec and spec.outliers for spec in specs):
        raise CheckpointError(f"{prefix}: sparse outliers are not supported on vLLM; load with quantlab.load")
    return specs[0]


def make_method(linear: ModuleType) -> Callable[[ModuleSpec], Any]:
    """The class that creates and applies the parameters of one layer, a child of vLLM's `LinearMethodBase`.

    Args:
        linear: vllm.model_executor.layers.linear.
    """

    class QuantlabLinearMethod(linear.LinearMethodBase):  # type: ignore[misc, name-defined]
        def __init__(self, spec: ModuleSpec) -> None:
            self.spec = spec

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra_weight_attrs: object,
        ) -> None:
            if input_size_per_partition != self.spec.in_features:
                raise CheckpointError(
                    f"a layer has {self.spec.in_features} inputs and would be divided into {input_size_per_partition} "
                    "per device; run vLLM with tensor_parallel_size=1"
                )
            rows = sum(output_partition_sizes)
            stacked = ModuleSpec(**{**vars(self.spec), "out_features": rows, "bias": False})
            for name, (dtype, shape) in storage_layout(stacked).items():
                parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
                # vLLM's loader stacks the parts of a layer along this dimension.
                attributes = {"output_dim": 1 if name == "packed_codes" else 0, **extra_weight_attrs}
                for key, value in attributes.items():
                    setattr(parameter, key, value)
                layer.register_parameter(name, parameter)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            codes = layer.get_parameter("packed_codes")
            if self.spec.codebook == "lut":
                result: Tensor = torch.ops.quantlab.lut_matmul(x, codes, layer.get_parameter("codebook"), bias)
            else:
                result = torch.ops.quantlab.lut_matmul(
                    x, codes, layer.get_parameter("scale"), bias, None, None, None, layer.get_parameter("zero")
                )
            return result

    return QuantlabLinearMethod
