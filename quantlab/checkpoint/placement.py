"""Puts placeholders for the stored layers into a model without weights, and compares the model with what is stored."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.contents import Contents
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.errors import CheckpointError, ModelError
from quantlab.experts import unfuse
from quantlab.runtime import LutLinear, ModuleSpec


def place(model: PreTrainedModel, quantization: QuantizationConfig) -> None:
    """Take the experts apart that are stored apart, and put an empty `LutLinear` for every quantized module.

    Raises:
        CheckpointError: the model has no such experts or no such linear layer, or one of another size.
    """
    try:
        unfuse(model, quantization.unfused_experts)
    except ModelError as error:
        raise CheckpointError(f"quantization_config.unfused_experts does not fit the model: {error}") from error
    for name, spec in quantization.modules.items():
        model.set_submodule(name, _placeholder(model, name, spec))


def check_names(model: PreTrainedModel, contents: Contents) -> None:
    """Check that exactly the tensors of the model are stored; of tied weights one is enough.

    Raises:
        CheckpointError: naming some that are missing or unexpected.
    """
    needed = model.state_dict().keys()
    stored = {name: shard for shard, tensors in contents.shards.items() for name in tensors}
    unexpected = sorted(stored.keys() - needed)
    if unexpected:
        path = contents.folder / stored[unexpected[0]]
        raise CheckpointError(f"{path}: unexpected tensor {unexpected[0]}; the model has nothing of that name")
    tied = model.all_tied_weights_keys
    partners = tied | {source: target for target, source in tied.items()}
    missing = sorted(name for name in needed - stored.keys() if partners.get(name) not in stored)
    if missing:
        raise CheckpointError(f"{contents.folder}: {len(missing)} tensors are missing, the first are {missing[:5]}")


def _placeholder(model: nn.Module, name: str, spec: ModuleSpec) -> LutLinear:
    try:
        original = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"the checkpoint quantizes {name}, which {type(model).__name__} does not have") from error
    if not isinstance(original, nn.Linear | Conv1D):
        raise CheckpointError(
            f"the checkpoint quantizes {name}, which is {type(original).__name__}, not a linear layer"
        )
    rows, columns = original.weight.shape if isinstance(original, nn.Linear) else reversed(original.weight.shape)
    expected = (rows, columns, original.bias is not None)
    if (spec.out_features, spec.in_features, spec.bias) != expected:
        raise CheckpointError(
            f"{name}: the checkpoint describes out_features={spec.out_features}, in_features={spec.in_features}, "
            f"bias={spec.bias}; the model has {rows}, {columns}, {expected[2]}"
        )
    return LutLinear.empty(spec, bias_dtype=original.weight.dtype)
