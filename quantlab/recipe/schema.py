"""The recipe as frozen dataclasses: the fields are the keys, their types and metadata are the rules.

Field metadata: `minimum` and `maximum` bound a number; `check` names what is wrong with a value, or returns None;
`needed` explains a key without a default; `collects_rest` marks the field that takes all keys not listed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantlab.calibration.sources import protocol_error, source_error
from quantlab.recipe.device import device_error
from quantlab.recipe.size import size_error


def _number(*, minimum: int, maximum: int | None = None) -> Mapping[str, Any]:
    return {"minimum": minimum, "maximum": maximum}


def _checked(check: Callable[[str], str | None]) -> Mapping[str, Any]:
    return {"check": check}


def _path_error(path: str) -> str | None:
    return None if path.strip() else "is empty; give a folder, a hub id or a name from `quantlab ls models`"


def _pattern_error(pattern: str) -> str | None:
    return None if pattern.strip() else 'is empty; "*" matches every layer'


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The float model.

    Attributes:
        path: a local folder, a hub id, or an alias such as "demo".
        dtype: what the model is computed in; "auto" is the dtype of its weights.
    """

    path: str = field(default="demo", metadata=_checked(_path_error))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class CalibrationSection:
    """The text whose activations the method sees.

    Attributes:
        name: "stdlib" or "file:PATH".
        num_samples: number of token windows.
        sequence_length: tokens per window; None means 2048, or the model's context if that is shorter.
        inputs: whose inputs to a layer are measured: "quantized" behind the layers quantized so far, or "float".
        target_alpha: how far the target of a layer makes up for the errors before it, from 0 (not) to 1 (fully).
        saliency_groups: groups of rows that are measured with weights of their own (GuidedQuant); 0 for none.
    """

    name: str = field(default="stdlib", metadata=_checked(source_error))
    num_samples: int = field(default=128, metadata=_number(minimum=1))
    sequence_length: int | None = field(default=None, metadata=_number(minimum=1))
    inputs: Literal["quantized", "float"] = "quantized"
    target_alpha: float = field(default=0.0, metadata=_number(minimum=0, maximum=1))
    saliency_groups: int = field(default=0, metadata=_number(minimum=0))


@dataclass(frozen=True, kw_only=True)
class MethodSection:
    """The method and its storage budget; the method's own options stand beside them in the file.

    Attributes:
        name: an installed method, see `quantlab ls methods`.
        bits: code width.
        group_size: inputs that share a codebook; None means one codebook per output row.
        preset: a named set of the method's options; options written out override it.
        options: the method's own options, as given.
    """

    name: str = field(metadata={"needed": "name a method of `quantlab ls methods`, for example `name: ganq`"})
    bits: int = field(
        metadata={**_number(minimum=2, maximum=8), "needed": "give the code width, for example `bits: 4`"}
    )
    group_size: int | None = field(default=None, metadata=_number(minimum=1))
    preset: str | None = None
    options: Mapping[str, object] = field(default_factory=dict, metadata={"collects_rest": True})


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """An exception from the `method` section for some layers.

    Of the rules that match a layer the last one applies, alone; what it leaves out is as in `method`.

    Attributes:
        match: shell pattern on the full name of a layer, such as "*.mlp.down_proj" or "model.layers.0.*".
        skip: keep these layers in floating point.
        bits: code width; None means as in `method`.
        group_size: inputs that share a codebook; None means as in `method`.
        options: options of the method that differ, as given.
    """

    match: str = field(
        metadata={**_checked(_pattern_error), "needed": 'name the layers, for example `match: "*.mlp.down_proj"`'}
    )
    skip: bool = False
    bits: int | None = field(default=None, metadata=_number(minimum=2, maximum=8))
    group_size: int | None = field(default=None, metadata=_number(minimum=1))
    options: Mapping[str, object] = field(default_factory=dict, metadata={"collects_rest": True})


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """What is measured afterwards, on the float and on the quantized model.

    Attributes:
        perplexity: protocols and text sources; empty for none.
        sequence_length: tokens per window; at least 2, since a window's first token is not predicted. None means
            2048, or the model's context if that is shorter.
        stride: tokens from one window to the next, of which only those are scored that no earlier window has; None
            means windows that do not overlap.
        bos: where the beginning-of-text token stands; None means as the protocol says.
        num_windows: windows per text, evenly spread; None means all of the protocol.
        tasks: for lm-eval: its own tasks, groups such as "ganq-zeroshot", local ones, or "stdlib_continuation".
        num_fewshot: solved examples before each question of a task; None means as the task does.
        limit: questions per task; None means all.
        tasks_dir: folder with the files of local tasks.
    """

    perplexity: tuple[str, ...] = field(default=("stdlib",), metadata=_checked(protocol_error))
    sequence_length: int | None = field(default=None, metadata=_number(minimum=2))
    stride: int | None = field(default=None, metadata=_number(minimum=1))
    bos: Literal["none", "tokenizer", "each_window"] | None = None
    num_windows: int | None = field(default=None, metadata=_number(minimum=1))
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = field(default=None, metadata=_number(minimum=0))
    limit: int | None = field(default=None, metadata=_number(minimum=1))
    tasks_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """How the machine is used.

    Attributes:
        memory_budget: memory that quantizing may occupy, such as "12GiB"; None for no limit.
        activations: where hidden states are kept between blocks; "auto" takes memory if there is room.
        deterministic: compute on one thread, so that the result does not depend on the number of threads.
        calibration_shards: parts of the calibration set that an executor can hold on as many machines. Sums over them
            are added in order, so that the number may change last digits; it is part of the recipe for that.
        rows_per_unit: rows of the layers with one input that are solved as one unit, so that an executor can spread
            a layer; part of the recipe because it may change last digits. None for all rows, as far as the memory
            budget allows.
        device: where the model computes, block by block, and where layers are solved: cpu, cuda, cuda:1. Hidden states
            wait in main memory or on disk. Other devices give other last digits.
        device_memory_budget: memory that may be occupied on a GPU, such as "20GiB"; None for no limit.
    """

    memory_budget: str | None = field(default=None, metadata=_checked(size_error))
    activations: Literal["auto", "ram", "disk"] = "auto"
    deterministic: bool = False
    calibration_shards: int = field(default=1, metadata=_number(minimum=1))
    rows_per_unit: int | None = field(default=None, metadata=_number(minimum=1))
    device: str = field(default="cpu", metadata=_checked(device_error))
    device_memory_budget: str | None = field(default=None, metadata=_checked(size_error))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, completely described.

    Attributes:
        version: version of the recipe format.
        seed: source of all randomness: calibration windows and methods.
        model: the float model.
        calibration: what the method sees.
        method: the method and its budget.
        layers: exceptions for some layers, in order.
        engine: how the machine is used.
        evaluation: what is measured.
        allow_fallbacks: whether a method may depart from its options where a layer forces it to (reported), or
            whether that ends the run.
    """

    version: Literal[1] = field(metadata={"needed": "begin the recipe with `version: 1`"})
    seed: int = field(default=0, metadata=_number(minimum=0))
    model: ModelSection = field(default_factory=ModelSection)
    calibration: CalibrationSection = field(default_factory=CalibrationSection)
    method: MethodSection = field(metadata={"needed": "add a section with at least a name and bits"})
    layers: tuple[LayerRule, ...] = ()
    engine: EngineSection = field(default_factory=EngineSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    allow_fallbacks: bool = False
