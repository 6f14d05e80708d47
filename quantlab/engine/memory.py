"""How much memory a run takes, and how its parts are cut so that it stays within the budget.

    peak = runtime + weights + statistics + hidden states in memory + the larger of  batch  and  solver + layers + rows

The weights are one block and those outside the blocks, or two blocks. The budget is kept even if batch and solver were
there at once.

What is cut by the budget and has an influence on the last digits (tokens per batch, rows solved at a time) depends
on the recipe and on shapes alone, never on the machine, so that a run can be repeated elsewhere.
"""

import ctypes
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from quantlab.engine.linears import find_linears, weight_of
from quantlab.engine.options import EngineOptions
from quantlab.engine.statistics import StatisticsOptions, statistics_bytes
from quantlab.errors import RecipeError
from quantlab.experts import expert_groups
from quantlab.memory import physical_bytes

TOKENS_PER_BATCH = 4096
RUNTIME_BYTES = 512 * 2**20
"""Python, torch and transformers themselves, and what the allocator does not give back."""

SOLVER_MATRICES = 3
"""Matrices of the size of the Hessian that a method holds beside it: damped, ordered, and factored."""

SOLVER_ROW_COPIES = 8
"""Float32 copies of the rows being solved: weights, rounded values, errors, codes, and those of the checks."""

MIN_ROWS = 64
"""Fewer rows at a time would spend the time on what is done once for all of them."""

LAYERS_PER_STACK = 2
"""Layers of the largest size that share one input, such as gate_proj and up_proj."""

LAYERS_PER_HIDDEN_STATE = 3
"""Layers that share the hidden state as their input: query, key and value."""

LAYER_BYTES = 6
"""Bytes per weight of such layers that exist however their rows are cut: float32 targets, codes, packed codes."""

WIDE_COPIES = 6
"""Tensors of a batch that exist at once inside a block, counted as float32 of the widest layer."""

UNBOUNDED_EXPERTS_BYTES = 4 * 2**30

_SOLVING = ("solver", "layers", "rows")

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the work is cut.

    Attributes:
        tokens_per_batch: of the calibration forward.
        max_rows: rows that a row-independent method is given at once; None for all.
        statistics_bytes: for the statistics that are collected in one pass.
        activations_in_memory: whether hidden states are kept in memory between blocks.
        parts: what is expected to be occupied, in bytes by name; not all at the same time.
    """

    tokens_per_batch: int
    max_rows: int | None
    statistics_bytes: int
    activations_in_memory: bool
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """What is expected to be occupied at the peak: a batch is gone before the layers are solved."""
        solving = sum(self.parts[name] for name in _SOLVING)
        return sum(self.parts.values()) - min(solving, self.parts["batch"])


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that its memory follows from.

    Attributes:
        outside_bytes: of the weights outside the blocks.
        block_bytes: of the largest block.
        hidden_size: width of the hidden states.
        vocabulary: width of the logits.
        shapes: (out_features, in_features) of the linear layers that occur.
        expert_groups: groups of expert layers in one block, whose statistics may be collected in one pass.
        itemsize: bytes per value of what the model computes in.
    """

    outside_bytes: int
    block_bytes: int
    hidden_size: int
    vocabulary: int
    shapes: frozenset[tuple[int, int]]
    expert_groups: int
    itemsize: int

    @classmethod
    def of(cls, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> "ModelSizes":
        """The sizes of a skeleton, its experts unfused."""
        block_bytes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
        vocabulary, hidden_size = tuple(cast(nn.Embedding, model.get_input_embeddings()).weight.shape)
        shapes = {tuple(weight_of(linear).shape) for block in blocks for linear in find_linears(block).values()}
        return cls(
            outside_bytes=sum(parameter.nbytes for parameter in model.parameters()) - sum(block_bytes),
            block_bytes=max(block_bytes),
            hidden_size=hidden_size,
            vocabulary=vocabulary,
            shapes=frozenset((rows, columns) for rows, columns in shapes),
            expert_groups=max(len(expert_groups(block)) for block in blocks),
            itemsize=model.dtype.itemsize,
        )

    @property
    def stack_elements(self) -> int:
        """Weights of the largest layers that share one input."""
        return LAYERS_PER_STACK * max(rows * columns for rows, columns in self.shapes)

    @property
    def stack_bytes(self) -> int:
        """What solving these layers at once occupies."""
        return SOLVER_ROW_COPIES * 4 * self.stack_elements

    @property
    def row_bytes(self) -> int:
        """What solving one row of the widest layer occupies."""
        return SOLVER_ROW_COPIES * 4 * max(columns for _, columns in self.shapes)

    def batch_bytes(self, tokens: int) -> int:
        """Of what one batch occupies inside a block, or as logits."""
        widest = max(max(shape) for shape in self.shapes)
        return tokens * max(WIDE_COPIES * 4 * widest, 4 * self.vocabulary)


def plan_memory(
    sizes: ModelSizes, samples: int, sequence_length: int, options: EngineOptions, statistics: StatisticsOptions
) -> MemoryPlan:
    """Cut the work so that it fits the budget.

    Args:
        sizes: of the model.
        samples: calibration windows.
        sequence_length: tokens per window.
        options: the budget, and where hidden states are kept.
        statistics: what is collected.

    Raises:
        RecipeError: the budget is too small whatever is cut; the message lists what needs how much.
    """
    budget = options.memory_budget_bytes
    tokens = _tokens_per_batch(sizes, sequence_length, budget)
    fixed = _fixed_parts(sizes, min(tokens, samples * sequence_length), statistics)
    chains = 2 if statistics.float_inputs else 1
    hidden = 2 * chains * samples * sequence_length * sizes.hidden_size * sizes.itemsize
    copies = 1 if options.calibration_shards == 1 else 2  # the sums so far, and those of one shard
    experts = max(0, sizes.expert_groups - 1) * fixed["statistics"]
    statistics_pass = fixed["statistics"]
    fixed["statistics"] *= copies
    if budget is None:
        room = {"ram": hidden, "disk": 0, "auto": physical_bytes() // 4}[options.activations]
        experts = min(experts, UNBOUNDED_EXPERTS_BYTES)
        max_rows, rows = _rows_within(sizes, sizes.stack_bytes, options.rows_per_unit)
    else:
        spare = budget - sum(fixed.values())
        experts = min(experts, max(0, spare // (4 * copies)))
        spare -= copies * experts
        max_rows, rows = _rows_within(sizes, spare // 2, options.rows_per_unit)
        fewest = min(MIN_ROWS, options.rows_per_unit or MIN_ROWS)
        needed = hidden if options.activations == "ram" else 0
        if (max_rows is not None and max_rows < fewest) or spare - rows < needed:
            least = max(needed + sizes.stack_bytes, 2 * MIN_ROWS * sizes.row_bytes) + sum(fixed.values())
            raise _too_small(budget, least, fixed | {"hidden states": needed})
        room = 0 if options.activations == "disk" else spare - rows
    return MemoryPlan(
        tokens_per_batch=tokens,
        max_rows=max_rows,
        statistics_bytes=statistics_pass + experts,
        activations_in_memory=hidden <= room,
        parts=fixed | {"experts": copies * experts, "rows": rows, "hidden states": hidden if hidden <= room else 0},
    )


def give_freed_memory_back() -> None:
    """Let large allocations return to the system when they are freed, for the rest of the process.

    glibc keeps them for reuse, but before version 2.38 it does not find aligned ones again, so that the heap grows
    with every block. With a fixed threshold each large allocation is a mapping of its own.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _tokens_per_batch(sizes: ModelSizes, sequence_length: int, budget: int | None) -> int:
    tokens = max(TOKENS_PER_BATCH, sequence_length)
    while budget is not None and tokens > sequence_length and sizes.batch_bytes(tokens) > budget // 8:
        tokens //= 2
    return max(tokens // sequence_length, 1) * sequence_length


def _fixed_parts(sizes: ModelSizes, tokens: int, statistics: StatisticsOptions) -> dict[str, int]:
    """What is needed however the rows are cut."""
    columns = max(shape[1] for shape in sizes.shapes)
    return {
        "runtime": RUNTIME_BYTES,
        "weights": max(sizes.outside_bytes + sizes.block_bytes, 2 * sizes.block_bytes),
        "batch": sizes.batch_bytes(tokens),
        "statistics": max(
            statistics_bytes(inputs, LAYERS_PER_HIDDEN_STATE if inputs == sizes.hidden_size else 1, statistics)
            for _, inputs in sizes.shapes
        ),
        "solver": SOLVER_MATRICES * 4 * columns**2,
        "layers": LAYER_BYTES * sizes.stack_elements,
    }


def _rows_within(sizes: ModelSizes, room: int, rows_per_unit: int | None) -> tuple[int | None, int]:
    """The rows to solve at a time, None for all, and their memory."""
    if sizes.stack_bytes <= room:
        if rows_per_unit is None:
            return None, sizes.stack_bytes
        return rows_per_unit, min(rows_per_unit * sizes.row_bytes, sizes.stack_bytes)
    max_rows = min(max(0, room // sizes.row_bytes), rows_per_unit or sys.maxsize)
    return max_rows, max_rows * sizes.row_bytes


def _too_small(budget: int, least: int, parts: dict[str, int]) -> RecipeError:
    lines = "".join(f"\n  {name}: {_mib(size)}" for name, size in parts.items())
    return RecipeError(
        f"engine.memory_budget={_mib(budget)} is too small for this model; it needs {_mib(least)}:{lines}\n"
        "  Shorter calibration windows, model.dtype: bfloat16 and engine.activations: disk need less"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
