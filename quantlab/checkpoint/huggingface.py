"""The format as a quantizer of transformers: `AutoModelForCausalLM.from_pretrained`, `save_pretrained`, `generate`.

This module is imported while `transformers.modeling_utils` is still on its way in, so what needs a finished
transformers is imported where it is used.

The weights of a checkpoint have names that transformers does not look for, so that without quantlab it stops. Here it
is pointed at them through `config.transformers_weights`, which it reads between the two hooks that set and remove it.
"""

from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlab.checkpoint.contents import read_contents
from quantlab.checkpoint.format import INDEX_NAME, QUANT_METHOD, QuantizationConfig
from quantlab.checkpoint.fusion import fuse_layers
from quantlab.checkpoint.shard import check_layer
from quantlab.errors import CheckpointError, UsageError
from quantlab.runtime import LutLinear, storage_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class HuggingFaceConfig(QuantizationConfigMixin):
    """`QuantizationConfig` in the shape that transformers wants.

    Args:
        section: the keys of `quantization_config` in config.json.

    Attributes:
        quantization: the parsed section.
    """

    def __init__(self, **section: object) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # declared as an enum of its own methods
        self.quantization = QuantizationConfig.from_dict(section)

    def to_dict(self) -> dict[str, Any]:
        """The section as plain JSON values."""
        return self.quantization.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing in it has a default."""
        return self.to_dict()


class HuggingFaceQuantizer(HfQuantizer):
    """Loads and saves quantlab checkpoints; quantizing is done by `quantlab run`."""

    requires_calibration = True
    quantization_config: HuggingFaceConfig

    def update_attn_implementation(self, config: "PretrainedConfig") -> "PretrainedConfig":
        """Called before the weights are looked for, which is why they are named here."""
        config.transformers_weights = INDEX_NAME
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """None: the names in the checkpoint are those of the modules."""
        return []

    def is_serializable(self) -> bool:
        """`save_pretrained` works; see `adopt`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the quantized layers are; the stored weights are constants."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operation is one node of a full graph."""
        return True

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        from quantlab.checkpoint.placement import check_names, place

        if not checkpoint_files:
            raise CheckpointError("a quantlab checkpoint is loaded from its files; a state_dict cannot replace them")
        contents = read_contents(Path(checkpoint_files[0]).parent)
        if {Path(file) for file in checkpoint_files} != {contents.folder / shard for shard in contents.shards}:
            raise CheckpointError(f"{contents.folder}: transformers was led to other files: {checkpoint_files}")
        del model.config.transformers_weights
        place(model, self.quantization_config.quantization)
        check_names(model, contents)
        # Some models initialise layers from the modules above them and expect a dense weight there. Nothing is missing,
        # so nothing has to be initialised but tables, which modules compute for themselves.
        for name in self.quantization_config.quantization.modules:
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            if not parent._buffers:
                parent._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: object) -> "PreTrainedModel":
        from quantlab.skeleton import align

        for name, layer in model.named_modules():
            if isinstance(layer, LutLinear):
                tensors = {key: layer.get_buffer(key) for key in storage_layout(layer.spec)}
                if not any(tensor.is_meta for tensor in tensors.values()):  # else it is offloaded
                    check_layer(name, layer.spec, tensors)
        align(model)
        adopt(model, self.quantization_config.quantization)
        fuse_layers(model)
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: Any = None) -> "PreTrainedModel":
        from quantlab.checkpoint.dense import densify

        if self.quantization_config.quantization.unfused_experts:
            raise UsageError("a mixture of experts is not dequantized: transformers could not read it back unfused")
        densify(model, dtype)
        del model.save_pretrained  # that of the class is right again
        return model


def register() -> None:
    """Make transformers know the format; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(HuggingFaceConfig)
        register_quantizer(QUANT_METHOD)(HuggingFaceQuantizer)


def adopt(model: "PreTrainedModel", quantization: QuantizationConfig) -> None:
    """Make a model with `LutLinear` layers one that transformers knows as quantized, and can save.

    transformers would save under the names that it looks for without quantlab, too, and then fill the layers with
    random numbers; so the model gets a `save_pretrained` of its own.
    """
    from quantlab.checkpoint.save import save_pretrained

    section = HuggingFaceConfig(**quantization.to_dict())
    attributes: Any = model  # which declares none of these
    attributes.config.quantization_config = section
    attributes.hf_quantizer = HuggingFaceQuantizer(section, pre_quantized=True)
    attributes.is_quantized = True
    attributes.quantization_method = QUANT_METHOD
    attributes.save_pretrained = MethodType(save_pretrained, model)
