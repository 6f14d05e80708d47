"""What a model consists of, known from its configuration alone."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from quantlab.engine.linears import find_linears, require_quantizable, weight_of
from quantlab.engine.memory import ModelSizes
from quantlab.experts import fused_experts, unfuse
from quantlab.skeleton import build_skeleton, find_blocks


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The parts of a model.

    Attributes:
        architecture: class name of the model.
        parameters: of the whole model.
        num_blocks: decoder blocks.
        layers: (out_features, in_features) of the linear layers inside the blocks, by full name in definition order,
            experts one by one.
        unfused_experts: names of the modules whose fused experts become one layer each.
        sizes: what the memory of a run follows from.
    """

    architecture: str
    parameters: int
    num_blocks: int
    layers: dict[str, tuple[int, int]]
    unfused_experts: tuple[str, ...]
    sizes: ModelSizes


def survey_model(config: PretrainedConfig, dtype: torch.dtype) -> Survey:
    """Examine a model without its weights.

    Raises:
        ModelError: it is not a causal LM of decoder blocks, or its weights are mostly not in linear layers.
    """
    model = build_skeleton(config, dtype)
    fused = fused_experts(model)
    unfuse(model, fused)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        require_quantizable(block, f"{prefix}.{index}")
    return Survey(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_blocks=len(blocks),
        layers={
            f"{prefix}.{index}.{name}": (weight_of(linear).shape[0], weight_of(linear).shape[1])
            for index, block in enumerate(blocks)
            for name, linear in find_linears(block).items()
        },
        unfused_experts=tuple(fused),
        sizes=ModelSizes.of(model, list(blocks)),
    )
