"""Perplexity with the batches of a text spread over the machines of an executor; the figures are the same as on one."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.engine.shards import shard_ranges
from quantlab.evaluate.perplexity import Forward, batch_scores, batches_of, combine, in_memory
from quantlab.evaluate.protocols import EvaluationWindows
from quantlab.evaluate.streamed import streamed_forward
from quantlab.evaluate.subject import Subject
from quantlab.executors import Executor
from quantlab.progress import NoProgress, Progress


def measure_spread(
    windows: EvaluationWindows,
    models: Sequence[Subject],
    dtype: torch.dtype,
    executor: Executor,
    progress: Progress,
    *,
    streamed: bool,
) -> dict[str, Any]:
    """Perplexity of one model, or of a float and a quantized model beside each other.

    Args:
        windows: what is predicted.
        models: one, or the float and the quantized one, in folders that all machines read.
        dtype: what they compute in.
        executor: where the batches are scored.
        progress: is told about every window.
        streamed: whether one block at a time is loaded.

    Returns:
        As `measure` for one model, as `measure_pair` for two.
    """
    batches = batches_of(windows)
    parts = [batches[numbers.start : numbers.stop] for numbers in shard_ranges(len(batches), max(1, executor.slots))]
    progress.begin(f"perplexity on {windows.protocol}", windows.ids.shape[0], "windows")

    def arrived(position: int) -> None:
        progress.advance(sum(len(ids) for ids in parts[position]))

    units = ((tuple(models), dtype, part, streamed) for part in parts)
    scores = [batch for part in executor.map(score_part, units, arrived=arrived) for batch in part]
    return combine(windows, scores)


def score_part(
    models: Sequence[Subject], dtype: torch.dtype, batches: Sequence[Tensor], streamed: bool
) -> list[dict[str, Tensor]]:
    """The scores of some batches; this is a unit of an executor.

    Args:
        models: as in `measure_spread`.
        dtype: what they compute in.
        batches: token ids, (windows, tokens) each.
        streamed: whether one block at a time is loaded.
    """
    with ExitStack() as opened:
        forwards: list[Forward] = []
        for model in models:
            if streamed:
                work = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="quantlab-")))
                parts = partial(model.open_parts, dtype)
                forwards.append(
                    opened.enter_context(streamed_forward(parts, batches, model.name, work / "hidden", NoProgress()))
                )
            else:
                forwards.append(in_memory(model.load(dtype)))
        with torch.inference_mode():
            return [
                batch_scores([forward(index, ids) for forward in forwards], ids) for index, ids in enumerate(batches)
            ]
