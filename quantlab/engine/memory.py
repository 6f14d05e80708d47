"""How much memory a run takes, and how its parts are cut so that it stays within the budget.

A run goes through phases that occupy different things:

    recording   the weights outside the blocks, and one block
    forward     one block, the statistics of one group of layers, a batch inside the block
    solving     one block, the same statistics, the solver's matrices, layers, and what is larger: a third matrix while
                the Hessian is factored, or rows
    finishing   the weights outside the blocks, and the logits of one batch

The peak is that of the largest phase, beside the runtime and the hidden states in memory. Models whose forward is
paused inside their blocks (`quantlab.engine.suspend`) keep the weights outside the blocks all the time.

Where the model computes on a GPU, the phases take place there. In main memory are the runtime, the hidden states, and a
block on its way to the device or from it; each of the two memories has a budget of its own.

What is cut by the budget and has an influence on the last digits (tokens per batch, rows solved at a time) depends
on the recipe and on shapes alone, never on the machine, so that a run can be repeated elsewhere.
"""

import ctypes
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

DEVICE_RUNTIME_BYTES = 512 * 2**20
"""The CUDA context, the libraries' workspaces, and what the allocator does not give back; not yet measured."""

SOLVER_MATRICES = 2
"""Matrices of the size of the Hessian that a method holds beside it: its copy in order, and the factor. While the
factor is made there is a third one, but nothing yet of the rows."""

SOLVER_ROW_COPIES = 2
"""Float32 copies of the rows being solved: weights, rounded values, errors, codes. Methods hold between 1 and 3."""

ROWS_RESERVE = 8
"""Room that the budget leaves for rows, in multiples of that: a method may hold more than those measured."""

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

LOGITS_RESERVE = 3
"""Copies of a batch's logits that the budget leaves room for: models that cap or widen them make some."""

UNBOUNDED_EXPERTS_BYTES = 4 * 2**30

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
        outside_stays: whether the weights outside the blocks stay in memory all the time.
        on_device: whether the phases take place in another memory than the main one.
        parts: what is expected to be occupied, in bytes by name; not all at the same time.
    """

    tokens_per_batch: int
    max_rows: int | None
    statistics_bytes: int
    activations_in_memory: bool
    outside_stays: bool
    on_device: bool
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """What is expected to be occupied of the main memory."""
        working = self.parts["block"] if self.on_device else self._working_bytes
        return self.parts["runtime"] + self.parts["hidden states"] + working

    @property
    def device_peak_bytes(self) -> int:
        """What is expected to be occupied on the device, if that is not the CPU."""
        return DEVICE_RUNTIME_BYTES + self._working_bytes if self.on_device else 0

    @property
    def _working_bytes(self) -> int:
        """What the largest phase occupies."""
        parts = self.parts
        solving = parts["solver"] + parts["layers"] + max(parts["factoring"], parts["rows"])
        inside = _beside_block(parts["block"]) + parts["statistics"] + parts["experts"] + max(parts["batch"], solving)
        return max(
            parts["outside"] + parts["block"],
            parts["outside"] + parts["logits"],
            inside + (parts["outside"] if self.outside_stays else 0),
        )


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

    def stack_elements(self, columns: int) -> int:
        """Weights of the largest layers that share one input of this width."""
        rows = max(rows for rows, own in self.shapes if own == columns)
        return (LAYERS_PER_STACK if columns == self.hidden_size else 1) * rows * columns

    def inside_bytes(self, tokens: int) -> int:
        """Of what one batch occupies inside a block."""
        return tokens * WIDE_COPIES * 4 * max(max(shape) for shape in self.shapes)

    def logits_bytes(self, tokens: int) -> int:
        """Of the logits of one batch."""
        return tokens * self.vocabulary * self.itemsize


@dataclass(frozen=True, kw_only=True)
class _Solving:
    """What it takes to solve the layers that share an input of one width, in bytes.

    Attributes:
        statistics: of the input.
        solver: matrices that the method holds beside the Hessian.
        factoring: one more, while the factor is made.
        layers: what exists of the layers however their rows are cut.
        rows: what solving all their rows at once occupies.
        row: what solving one row occupies.
    """

    statistics: int
    solver: int
    factoring: int
    layers: int
    rows: int
    row: int

    @property
    def fixed(self) -> int:
        return self.statistics + self.solver + self.factoring + self.layers

    def rows_within(self, room: int) -> int | None:
        """The rows to solve at a time so that, with their reserve, they fit beside the rest; None for all."""
        spare = room - self.fixed
        return None if ROWS_RESERVE * self.rows <= spare else max(0, spare // (ROWS_RESERVE * self.row))

    def rows_of(self, max_rows: int | None) -> int:
        """Bytes of the rows solved at a time."""
        return self.rows if max_rows is None else min(self.rows, max_rows * self.row)

    def reserved(self, max_rows: int | None) -> int:
        """Bytes that the budget has to leave."""
        return self.fixed + ROWS_RESERVE * self.rows_of(max_rows)


def plan_memory(
    sizes: ModelSizes,
    samples: int,
    sequence_length: int,
    options: EngineOptions,
    statistics: StatisticsOptions,
    *,
    calibrated: bool = True,
    outside_stays: bool = False,
) -> MemoryPlan:
    """Cut the work so that it fits the budget.

    Args:
        sizes: of the model.
        samples: calibration windows.
        sequence_length: tokens per window.
        options: the budgets, the device, and where hidden states are kept.
        statistics: what is collected.
        calibrated: whether a method works with the Hessian, so that it holds matrices of its size.
        outside_stays: as in `MemoryPlan`.

    Raises:
        RecipeError: the budget is too small whatever is cut; the message lists what needs how much.
    """
    on_device, budget = options.on_device, options.working_budget_bytes
    runtime = DEVICE_RUNTIME_BYTES if on_device else RUNTIME_BYTES
    tokens = _tokens_per_batch(sizes, sequence_length, budget)
    batch_tokens = min(tokens, samples * sequence_length)
    copies = 1 if options.calibration_shards == 1 else 2  # the sums so far, and those of one shard
    widths = {columns for _, columns in sizes.shapes}
    groups = [_solving(sizes, columns, statistics, calibrated, copies) for columns in widths]
    one_pass = max(group.statistics for group in groups) // copies
    chains = 2 if statistics.float_inputs else 1
    hidden = 2 * chains * samples * sequence_length * sizes.hidden_size * sizes.itemsize
    experts = max(0, sizes.expert_groups - 1) * one_pass
    always = {"runtime": RUNTIME_BYTES, "outside": sizes.outside_bytes, "block": sizes.block_bytes}
    batch = {"batch": sizes.inside_bytes(batch_tokens), "logits": sizes.logits_bytes(batch_tokens)}
    room = _room_for_hidden(options, hidden, sizes.block_bytes)
    if budget is None:
        experts = min(experts, UNBOUNDED_EXPERTS_BYTES)
        max_rows = options.rows_per_unit
    else:
        fewest = min(MIN_ROWS, options.rows_per_unit or MIN_ROWS)
        needed = hidden if options.activations == "ram" and not on_device else 0
        spare = budget - runtime - needed
        inside = spare - _beside_block(sizes.block_bytes) - (sizes.outside_bytes if outside_stays else 0)
        experts = min(experts, max(0, inside - max(group.fixed for group in groups)) // (4 * copies))
        inside -= copies * experts
        bounds = [options.rows_per_unit, *(group.rows_within(inside) for group in groups)]
        max_rows = min((bound for bound in bounds if bound is not None), default=None)
        largest = max(group.reserved(max_rows) for group in groups)
        statistics_and_batch = max(group.statistics for group in groups) + batch["batch"]
        outside = sizes.outside_bytes + max(sizes.block_bytes, batch["logits"])
        if (max_rows is not None and max_rows < fewest) or max(statistics_and_batch - inside, outside - spare) > 0:
            least = max(max(group.reserved(fewest) for group in groups), statistics_and_batch)
            least = budget + max(least - inside, outside - spare)
            parts = always | batch | _parts_of(max(groups, key=lambda group: group.fixed), fewest)
            raise _too_small(on_device, budget, least, parts | {"runtime": runtime, "hidden states": needed})
        if not on_device and options.activations != "disk":
            room = needed + min(inside - largest, spare - outside)

    def occupied(group: _Solving) -> int:
        solving = group.solver + group.layers + max(group.factoring, group.rows_of(max_rows))
        return group.statistics + max(solving, batch["batch"])

    parts = _parts_of(max(groups, key=occupied), max_rows)
    return MemoryPlan(
        tokens_per_batch=tokens,
        max_rows=max_rows,
        statistics_bytes=one_pass + experts,
        activations_in_memory=hidden <= room,
        outside_stays=outside_stays,
        on_device=on_device,
        parts=always | batch | parts | {"experts": copies * experts, "hidden states": hidden if hidden <= room else 0},
    )


def _room_for_hidden(options: EngineOptions, hidden: int, block_bytes: int) -> int:
    """Main memory for hidden states, if the phases are elsewhere or not bounded."""
    room = {"ram": hidden, "disk": 0, "auto": physical_bytes() // 4}[options.activations]
    budget = options.memory_budget_bytes
    if not options.on_device or budget is None:
        return room
    parts = {"runtime": RUNTIME_BYTES, "block": block_bytes}
    parts["hidden states"] = hidden if options.activations == "ram" else 0
    if sum(parts.values()) > budget:
        raise _too_small(False, budget, sum(parts.values()), parts)
    return min(room, budget - RUNTIME_BYTES - block_bytes)


def give_freed_memory_back() -> None:
    """Let large allocations return to the system when they are freed, for the rest of the process.

    glibc keeps them for reuse, but before version 2.38 it does not find aligned ones again, so that the heap grows
    with every block. With a fixed threshold each large allocation is a mapping of its own.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _beside_block(block_bytes: int) -> int:
    """A block and the layers that replace its own one by one, which take at most half as much."""
    return block_bytes * 3 // 2


def _tokens_per_batch(sizes: ModelSizes, sequence_length: int, budget: int | None) -> int:
    tokens = max(TOKENS_PER_BATCH, sequence_length)
    while budget is not None and tokens > sequence_length and _batch_bytes(sizes, tokens) > budget // 8:
        tokens //= 2
    return max(tokens // sequence_length, 1) * sequence_length


def _batch_bytes(sizes: ModelSizes, tokens: int) -> int:
    return max(sizes.inside_bytes(tokens), LOGITS_RESERVE * sizes.logits_bytes(tokens))


def _solving(sizes: ModelSizes, columns: int, statistics: StatisticsOptions, calibrated: bool, copies: int) -> _Solving:
    elements = sizes.stack_elements(columns)
    num_layers = LAYERS_PER_HIDDEN_STATE if columns == sizes.hidden_size else 1
    matrix = 4 * columns**2 if calibrated else 0
    return _Solving(
        statistics=copies * statistics_bytes(columns, num_layers, statistics),
        solver=SOLVER_MATRICES * matrix,
        factoring=matrix,
        layers=LAYER_BYTES * elements,
        rows=SOLVER_ROW_COPIES * 4 * elements,
        row=SOLVER_ROW_COPIES * 4 * columns,
    )


def _parts_of(group: _Solving, max_rows: int | None) -> dict[str, int]:
    return {
        "statistics": group.statistics,
        "solver": group.solver,
        "factoring": group.factoring,
        "layers": group.layers,
        "rows": group.rows_of(max_rows),
    }


def _too_small(on_device: bool, budget: int, least: int, parts: dict[str, int]) -> RecipeError:
    key = "engine.device_memory_budget" if on_device else "engine.memory_budget"
    lines = "".join(f"\n  {name}: {_mib(size)}" for name, size in parts.items())
    return RecipeError(
        f"{key}={_mib(budget)} is too small for this model; it needs {_mib(least)}:{lines}\n"
        "  Shorter calibration windows, model.dtype: bfloat16 and engine.activations: disk need less"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
