"""Several methods on one model, under the same conditions: same calibration tokens, same statistics, same evaluation.

A comparison is a folder with one run folder per cell: a method variant, a code width and a seed. A finished cell is
never computed again, an unfinished one is continued, and one that failed is a row with its reason.
"""

import hashlib
import json
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.checkpoint.atomic import replacing
from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.engine.journal import FolderBusyError
from quantlab.errors import QuantlabError, ResumableError, UsageError
from quantlab.evaluate.perplexity import in_memory
from quantlab.executors import Executor, Link, LocalExecutor
from quantlab.memory import reset_peak_rss
from quantlab.models import resolve_model
from quantlab.pipeline import execute
from quantlab.plan import compute_dtype
from quantlab.progress import Progress
from quantlab.recipe import (
    CalibrationSection,
    EvaluationSection,
    LayerRule,
    MethodSection,
    ModelSection,
    Recipe,
    dump_recipe,
    load_recipe,
)
from quantlab.recipe.layers import MethodAssignment, assign_methods
from quantlab.skeleton import load_model, read_config

CELLS = "cells"
FAILURE_SUFFIX = ".failed.json"
REFERENCE = "reference"
REFERENCE_BYTES = 1 << 30
"""Logits of the float model are kept up to this size, so that it runs once and not once per cell."""

HANDOVER_S = 180.0
"""A process whose cluster is dead ends within a minute; until then it holds the run folder that is to be continued."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method as it takes part in a comparison.

    Attributes:
        label: as the user wrote it.
        method: its section of a recipe.
        layers: its layer rules.
        overrides: assignments of options, such as "method.iterations=20".
    """

    label: str
    method: MethodSection
    layers: tuple[LayerRule, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: label of the method variant.
        bits: code width.
        seed: of the run.
        folder: its run folder.
        assignment: its recipe, with the methods configured.
    """

    variant: str
    bits: int
    seed: int
    folder: Path
    assignment: MethodAssignment

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant}, {self.bits} bits, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.folder / MANIFEST_NAME).is_file()

    @property
    def failure_file(self) -> Path:
        """Where the reason is kept if the run failed."""
        return self.folder.parent / f"{self.folder.name}{FAILURE_SUFFIX}"

    @property
    def failure(self) -> str | None:
        """Why the run failed, or None."""
        if not self.failure_file.is_file():
            return None
        reason: str = json.loads(self.failure_file.read_text(encoding="utf-8"))["reason"]
        return reason


def common_recipe(
    *,
    model: str,
    dtype: str,
    calibration: str,
    num_samples: int,
    sequence_length: int | None,
    group_size: int | None,
    texts: tuple[str, ...],
    num_windows: int | None,
) -> Recipe:
    """What all recipes of a comparison share; the method in it is only a place holder.

    Args:
        model: a folder, a hub id or an alias.
        dtype: what it computes in.
        calibration: text that the methods see.
        num_samples: calibration windows.
        sequence_length: tokens per window, in calibration and evaluation.
        group_size: inputs per codebook, or None.
        texts: to evaluate on.
        num_windows: evaluation windows per text, or None for all.
    """
    return Recipe(
        version=1,
        model=ModelSection(path=model, dtype=cast(Any, dtype)),
        calibration=CalibrationSection(name=calibration, num_samples=num_samples, sequence_length=sequence_length),
        method=MethodSection(name="rtn", bits=4, group_size=group_size),
        evaluation=EvaluationSection(perplexity=texts, sequence_length=sequence_length, num_windows=num_windows),
    )


def parse_variants(names: Sequence[str], settings: Sequence[str]) -> list[Variant]:
    """The variants as written on the command line.

    Args:
        names: methods ("ganq"), methods with a preset ("ganq@paper"), or recipe files, of which the method is taken.
        settings: assignments of options such as "ganq.iterations=20", for all variants of that method.

    Raises:
        RecipeError: a recipe file is not one.
        UsageError: an assignment is for a method that takes no part.
    """
    variants = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            recipe = load_recipe(name).recipe
            variants.append(Variant(label=Path(name).stem, method=recipe.method, layers=recipe.layers))
        else:
            method, _, preset = name.partition("@")
            variants.append(Variant(label=name, method=MethodSection(name=method, bits=4, preset=preset or None)))
    taking_part = {variant.method.name for variant in variants}
    for setting in settings:
        if setting.partition(".")[0] not in taking_part:
            raise UsageError(f"--set {setting}: only {', '.join(sorted(taking_part))} take part in the comparison")
    return [
        replace(
            variant,
            overrides=tuple(
                f"method.{setting.partition('.')[2]}"
                for setting in settings
                if setting.startswith(f"{variant.method.name}.")
            ),
        )
        for variant in variants
    ]


def plan_cells(
    variants: Sequence[Variant], bits: Sequence[int], seeds: int, common: Recipe, overrides: Sequence[str], folder: Path
) -> list[Cell]:
    """The runs of a comparison, all recipes checked.

    Args:
        variants: the methods.
        bits: code widths.
        seeds: how many runs of each, with seeds 0, 1, 2 and so on.
        common: what is the same for all: model, calibration, evaluation; its method is replaced.
        overrides: assignments for all recipes, such as "calibration.target_alpha=0.5".
        folder: of the comparison.

    Raises:
        RecipeError: a recipe cannot be run as it is.
        UsageError: the folder holds a finished cell of the same name with another recipe.
    """
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    cells = []
    for width in bits:
        for variant in variants:
            for seed in range(seeds):
                group_size = variant.method.group_size or common.method.group_size
                method = replace(variant.method, bits=width, group_size=group_size)
                recipe = replace(common, method=method, layers=variant.layers, seed=seed)
                name = f"{re.sub(r'[^a-z0-9.-]+', '-', variant.label.lower())}-w{width}-s{seed}"
                path = folder / CELLS / f"{name}.yaml"
                with replacing(path) as temporary:
                    temporary.write_text(dump_recipe(recipe), encoding="utf-8")
                assignment = assign_methods(load_recipe(path, [*overrides, *variant.overrides]))
                cell = Cell(
                    variant=variant.label, bits=width, seed=seed, folder=folder / CELLS / name, assignment=assignment
                )
                _require_same_recipe(cell)
                cells.append(cell)
    return cells


def _require_same_recipe(cell: Cell) -> None:
    resolved = cell.folder / "recipe.resolved.yaml"
    if cell.finished and load_recipe(resolved).recipe != cell.assignment.loaded.recipe:
        raise UsageError(
            f"{cell.folder} holds a finished run with another recipe (compare {resolved.name} there with "
            f"{cell.assignment.loaded.path}); choose another --output-dir, or remove that folder"
        )


def run_cells(
    cells: Sequence[Cell],
    progress: Progress,
    stop: Callable[[], bool],
    announce: Callable[[Cell, int], None],
    executor: Executor | None = None,
) -> None:
    """Run every cell that is not finished.

    Args:
        cells: of one comparison.
        progress: is told about every stage; of an executor that runs cells side by side, about every cell.
        stop: a true answer ends the comparison at the next place from which it can go on.
        announce: is told about every cell that is about to run, and its position, if they run one after the other.
        executor: where the cells run; None for this process.

    Raises:
        ResumableError: the comparison was stopped.
        ModelError: the model cannot be found.
        UsageError: a machine cannot take part.
    """
    pending = [(cell, position) for position, cell in enumerate(cells) if not cell.finished]
    if not pending:
        return
    executor = executor or LocalExecutor()
    recipe = pending[0][0].assignment.loaded.recipe
    model_folder = resolve_model(recipe.model.path)
    work = pending[0][0].folder.parent / REFERENCE
    work.mkdir(exist_ok=True)
    executor.require_shared(model_folder, work)
    link = executor.link(progress, stop)

    def units() -> Iterator[tuple[Any, ...]]:
        for cell, position in pending:
            if not executor.remote:
                announce(cell, position)
            yield cell, model_folder, executor.task.gpus, link, HANDOVER_S if executor.remote else 0.0

    threads = 1 if recipe.engine.deterministic else None
    resources = replace(executor.task, cpus=executor.task.cpus or threads)

    def arrived(index: int) -> None:
        cell = pending[index][0]
        if executor.remote:  # otherwise the stages of the cell itself were shown
            progress.advance(detail=f"{cell.name}: {cell.failure or ('done' if cell.finished else 'not finished')}")

    if executor.remote:
        progress.begin("comparing", len(pending), "runs")
    stopped: ResumableError | None = None
    for outcome in executor.map(run_cell, units(), resources=resources, arrived=arrived):
        stopped = stopped or outcome
        if stopped is not None and not executor.remote:
            break
    if stopped is not None:
        raise stopped
    shutil.rmtree(work)


def run_cell(cell: Cell, model_folder: Path, gpus: float, link: Link, patience_s: float) -> ResumableError | None:
    """Run one cell, or continue it; this is a unit of an executor.

    Args:
        cell: with a folder that all machines share.
        model_folder: of the float model.
        gpus: CUDA devices to compute on, if more than 0.
        link: to the comparison.
        patience_s: how long to wait for a process of a lost machine or cluster that is not out of the folder yet.

    Returns:
        Why the cell ended early, if it did. If it cannot succeed, its failure file says why.
    """
    if link.stop():
        return ResumableError(f"stopped before {cell.name}")
    cell.failure_file.unlink(missing_ok=True)
    command = shlex.join(["quantlab", "run", str(cell.assignment.loaded.path)])
    reset_peak_rss()
    try:
        with link.reporting(cell.name) as progress:
            reference = _Reference(model_folder, cell.assignment.loaded.recipe, cell.folder.parent / REFERENCE)
            arguments = (progress, command, link.stop, reference, LocalExecutor(gpus))
            deadline = time.monotonic() + patience_s
            while True:
                try:
                    execute(cell.assignment, model_folder, cell.folder, *arguments)
                    return None
                except FolderBusyError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(1)
    except ResumableError as error:
        return error
    except QuantlabError as error:
        with replacing(cell.failure_file) as temporary:
            temporary.write_text(json.dumps({"reason": str(error)}) + "\n", encoding="utf-8")
    return None


class _Reference:
    """The logits of the float model, computed once for all cells.

    They are kept in files, as far as that is affordable: in memory they would count as memory of the cells.
    """

    def __init__(self, model_folder: Path, recipe: Recipe, folder: Path) -> None:
        self._model_folder = model_folder
        self._dtype = compute_dtype(recipe, read_config(model_folder))
        self._folder = folder

    def __call__(self, index: int, ids: Tensor) -> Tensor:
        path = self._folder / f"{hashlib.sha256(ids.numpy().tobytes()).hexdigest()}.safetensors"
        if path.is_file():
            return load_file(path)["logits"]
        logits = in_memory(self._model)(index, ids)
        if logits.nbytes + self._size() <= REFERENCE_BYTES:
            own = path.with_suffix(f".{uuid.uuid4().hex}")  # another cell may be about to write the same
            with replacing(own) as temporary:
                save_file({"logits": logits.contiguous()}, temporary)
            own.replace(path)
        return logits

    def _size(self) -> int:
        size = 0
        for file in self._folder.iterdir():
            with suppress(FileNotFoundError):  # renamed by another cell
                size += file.stat().st_size
        return size

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_model(self._model_folder, self._dtype)
