"""What a run would do, and whether it can: known before any weight is read."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from quantlab.calibration.sources import FILE_PREFIX
from quantlab.engine.linears import find_linears, require_quantizable, weight_of
from quantlab.errors import ModelError, RecipeError
from quantlab.recipe import Recipe
from quantlab.skeleton import build_skeleton, find_blocks, read_config, weight_files


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, known before any weight is read."""

    architecture: str
    num_blocks: int
    num_layers: int
    parameters: int
    quantized_parameters: int
    bits: int
    group_size: int | None
    calibration_tokens: int
    largest_hessian_bytes: int
    source_bytes: int

    def rows(self) -> list[tuple[str, str]]:
        """The plan for display, as (what, value)."""
        share = self.quantized_parameters / self.parameters
        return [
            ("architecture", self.architecture),
            ("decoder blocks", str(self.num_blocks)),
            ("layers to quantize", str(self.num_layers)),
            ("parameters", f"{self.parameters:,} ({share:.1%} quantized)"),
            ("bits", str(self.bits)),
            ("codebooks", "per row" if self.group_size is None else f"per group of {self.group_size}"),
            ("calibration tokens", f"{self.calibration_tokens:,}"),
            ("largest Hessian", f"{self.largest_hessian_bytes / 2**20:.1f} MiB"),
            ("size of the source weights", f"{self.source_bytes / 2**20:.1f} MiB"),
        ]


def plan_run(recipe: Recipe, model_folder: Path) -> Plan:
    """Examine recipe and model together without reading weights.

    Raises:
        ModelError: the model cannot be streamed.
        RecipeError: recipe and model do not fit together.
    """
    config = read_config(model_folder)
    _require_fitting_windows(recipe, config)
    _require_separate_texts(recipe)
    model = build_skeleton(config, compute_dtype(recipe, config))
    prefix, blocks = find_blocks(model)
    shapes = []
    for index, block in enumerate(blocks):
        require_quantizable(block, f"{prefix}.{index}")
        for name, linear in find_linears(block).items():
            shapes.append(tuple(weight_of(linear).shape))
            _require_fitting_groups(recipe, f"{prefix}.{index}.{name}", shapes[-1][1])
    return Plan(
        architecture=type(model).__name__,
        num_blocks=len(blocks),
        num_layers=len(shapes),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantized_parameters=sum(math.prod(shape) for shape in shapes),
        bits=recipe.method.bits,
        group_size=recipe.method.group_size,
        calibration_tokens=recipe.calibration.num_samples * recipe.calibration.sequence_length,
        largest_hessian_bytes=4 * max(shape[1] for shape in shapes) ** 2,
        source_bytes=sum(file.stat().st_size for file in weight_files(model_folder)),
    )


def compute_dtype(recipe: Recipe, config: PretrainedConfig) -> torch.dtype:
    """The dtype that a recipe asks for; "auto" is that of the source model."""
    if recipe.model.dtype == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype: torch.dtype = getattr(torch, recipe.model.dtype)
    return dtype


def _require_fitting_windows(recipe: Recipe, config: PretrainedConfig) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    sections = {"calibration": recipe.calibration.sequence_length, "evaluation": recipe.evaluation.sequence_length}
    for section, length in sections.items():
        if limit is not None and length > limit:
            raise RecipeError(
                f"{section}.sequence_length={length} is longer than the model's context of {limit} tokens; "
                f"use --set {section}.sequence_length={limit} or less"
            )


def _require_separate_texts(recipe: Recipe) -> None:
    shared = recipe.calibration.name
    if shared.startswith(FILE_PREFIX) and shared in recipe.evaluation.perplexity:
        raise RecipeError(
            f"calibration and evaluation both read {shared}; evaluate on text that the method has not seen"
        )


def _require_fitting_groups(recipe: Recipe, layer: str, in_features: int) -> None:
    size = recipe.method.group_size
    if size is not None and in_features % size:
        raise ModelError(
            f"{layer}: in_features={in_features} is not a multiple of method.group_size={size}; "
            "choose a divisor, or group_size: null for one codebook per row"
        )
