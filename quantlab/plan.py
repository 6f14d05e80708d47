"""What a run would do, and whether it can: known before any weight is read."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from quantlab.api import Statistic
from quantlab.calibration.sources import FILE_PREFIX
from quantlab.calibration.tokens import context_length, window_length
from quantlab.engine.memory import MemoryPlan, plan_memory
from quantlab.engine.options import EngineOptions
from quantlab.engine.statistics import StatisticsOptions, require_collectable
from quantlab.engine.survey import survey_model
from quantlab.errors import ModelError, RecipeError
from quantlab.recipe import Recipe
from quantlab.recipe.layers import LayerMethod, MethodAssignment
from quantlab.recipe.size import parse_size


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One linear layer.

    Attributes:
        name: full name in the model.
        shape: (out_features, in_features).
        method: how it is quantized; None keeps it in floating point.
    """

    name: str
    shape: tuple[int, int]
    method: LayerMethod | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, known before any weight is read.

    Attributes:
        architecture: class name of the model.
        parameters: of the whole model.
        num_blocks: decoder blocks.
        layers: the linear layers inside the blocks, experts one by one.
        calibration_tokens: tokens of calibration text.
        itemsize: bytes per value of what the model computes in.
        work_bytes: of the hidden states that are on disk while the run lasts.
        memory: how the work is cut, and what it occupies.
    """

    architecture: str
    parameters: int
    num_blocks: int
    layers: tuple[PlannedLayer, ...]
    calibration_tokens: int
    itemsize: int
    work_bytes: int
    memory: MemoryPlan

    @property
    def quantized(self) -> tuple[PlannedLayer, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if layer.method is not None)

    @property
    def hidden_states_written(self) -> int:
        """Bytes of the hidden states between blocks, and before the first one if they are not kept in memory.

        `work_bytes` are two such generations.
        """
        return self.work_bytes // 2 * (self.num_blocks - self.memory.activations_in_memory)

    @property
    def quantized_parameters(self) -> int:
        """Weights in those layers."""
        return sum(math.prod(layer.shape) for layer in self.quantized)


def plan_run(assignment: MethodAssignment, config: PretrainedConfig) -> Plan:
    """Examine recipe and model together without reading weights.

    Args:
        assignment: the recipe and its methods.
        config: of the model.

    Raises:
        ModelError: the model cannot be streamed.
        RecipeError: recipe and model do not fit together; all problems at once.
    """
    recipe = assignment.loaded.recipe
    problems = [
        *_window_problems(recipe, config),
        *_text_problems(recipe),
        *_task_problems(recipe),
        *_device_problems(recipe),
    ]
    dtype = compute_dtype(recipe, config)
    survey = survey_model(config, dtype)
    layers = tuple(
        PlannedLayer(name=name, shape=shape, method=assignment.of(name)) for name, shape in survey.layers.items()
    )
    problems += [*_group_problems(layers), *_rule_problems(assignment, layers)]
    samples, length = recipe.calibration.num_samples, window_length(recipe.calibration.sequence_length, config)
    methods = [layer.method for layer in layers if layer.method is not None]
    statistics = statistics_options(recipe, methods)
    memory = None
    try:
        require_collectable(statistics, config, survey.unfused_experts)
        calibrated = any(method.quantizer.info.needs for method in methods)
        memory = plan_memory(survey.sizes, samples, length, engine_options(recipe), statistics, calibrated=calibrated)
    except (ModelError, RecipeError) as error:
        problems.append(str(error))
    if problems or memory is None:
        lines = "".join(f"\n  {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(f"recipe {assignment.loaded.path} cannot be run on this model: {count}{lines}")
    chains = 2 if statistics.float_inputs else 1
    return Plan(
        architecture=survey.architecture,
        parameters=survey.parameters,
        num_blocks=survey.num_blocks,
        layers=layers,
        calibration_tokens=samples * length,
        itemsize=dtype.itemsize,
        work_bytes=2 * chains * samples * length * survey.sizes.hidden_size * dtype.itemsize,
        memory=memory,
    )


def compute_dtype(recipe: Recipe, config: PretrainedConfig) -> torch.dtype:
    """The dtype that a recipe asks for; "auto" is that of the source model."""
    if recipe.model.dtype == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype: torch.dtype = getattr(torch, recipe.model.dtype)
    return dtype


def engine_options(recipe: Recipe) -> EngineOptions:
    """How a recipe wants the machine to be used."""
    budget, device_budget = recipe.engine.memory_budget, recipe.engine.device_memory_budget
    return EngineOptions(
        memory_budget_bytes=None if budget is None else parse_size(budget),
        activations=recipe.engine.activations,
        calibration_shards=recipe.engine.calibration_shards,
        rows_per_unit=recipe.engine.rows_per_unit,
        device=torch.device(recipe.engine.device),
        device_memory_budget_bytes=None if device_budget is None else parse_size(device_budget),
    )


def statistics_options(recipe: Recipe, methods: Sequence[LayerMethod]) -> StatisticsOptions:
    """What a recipe and its methods want measured.

    Raises:
        RecipeError: its wishes contradict each other.
    """
    section = recipe.calibration
    try:
        return StatisticsOptions(
            inputs=section.inputs,
            target_alpha=section.target_alpha,
            saliency_groups=section.saliency_groups,
            fisher=any(Statistic.FISHER in method.quantizer.info.needs for method in methods),
        )
    except ValueError as error:
        raise RecipeError(f"section calibration: {error}") from error


def _window_problems(recipe: Recipe, config: PretrainedConfig) -> Iterator[str]:
    limit = context_length(config)
    for section, length in (
        ("calibration", recipe.calibration.sequence_length),
        ("evaluation", recipe.evaluation.sequence_length),
    ):
        if limit is not None and length is not None and length > limit:
            yield (
                f"{section}.sequence_length={length} is longer than the model's context of {limit} tokens; "
                f"use --set {section}.sequence_length={limit} or less"
            )


def _text_problems(recipe: Recipe) -> Iterator[str]:
    source = recipe.calibration.name
    if source.startswith(FILE_PREFIX) and source in recipe.evaluation.perplexity:
        yield f"calibration and evaluation both read {source}; evaluate on text that the method has not seen"


def _task_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.evaluation.tasks and recipe.engine.memory_budget is not None:
        yield (
            "evaluation.tasks need the whole model in memory, so engine.memory_budget cannot be kept; use "
            "--set evaluation.tasks=[], and `quantlab eval` where there is room"
        )


def _device_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.engine.device == "cpu" and recipe.engine.device_memory_budget is not None:
        yield (
            "engine.device_memory_budget bounds the memory of a GPU, but engine.device is cpu; use "
            "engine.memory_budget, or --set engine.device=cuda"
        )


def _group_problems(layers: Sequence[PlannedLayer]) -> Iterator[str]:
    """Group sizes that do not divide the width of a layer, each with all the layers it does not fit."""
    unfit: dict[tuple[int, int], list[str]] = {}
    for layer in layers:
        size = layer.method.spec.group_size if layer.method is not None else None
        if size is not None and layer.shape[1] % size:
            unfit.setdefault((layer.shape[1], size), []).append(layer.name)
    for (columns, size), names in unfit.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"{names[0]}{others}: in_features={columns} is not a multiple of group_size={size}; choose a divisor, or "
            "group_size: null for one codebook per row"
        )


def _rule_problems(assignment: MethodAssignment, layers: Sequence[PlannedLayer]) -> Iterator[str]:
    try:
        assignment.require_use(layer.name for layer in layers)
    except RecipeError as error:
        yield str(error)
    if not any(layer.method for layer in layers):
        yield "the layer rules keep every layer in floating point, so nothing is left to quantize"
