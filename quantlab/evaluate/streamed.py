"""Perplexity with one block of each model in memory at a time; the figures are those of models in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from quantlab.engine.forward import ModelParts, streamed_logits
from quantlab.evaluate.perplexity import Forward, batches_of, measure_any
from quantlab.evaluate.protocols import EvaluationWindows
from quantlab.progress import Progress

OpenParts = Callable[[], ModelParts]


def measure_streamed(
    windows: EvaluationWindows, models: Mapping[str, OpenParts], work: Path, progress: Progress
) -> dict[str, Any]:
    """Perplexity of one model, or of a float and a quantized model beside each other.

    Args:
        windows: what is predicted.
        models: one, or the float and the quantized one, by what they are called in progress messages.
        work: folder for hidden states, the whole text's at a time; what is put there is removed.
        progress: is told about every block and every window.

    Returns:
        As `measure` for one model, as `measure_pair` for two.

    Raises:
        ModelError: a model cannot be streamed.
        NumericalError: a block's output is not finite.
    """
    batches = batches_of(windows)
    with ExitStack() as opened:
        forwards = [
            opened.enter_context(
                streamed_forward(parts, batches, f"{windows.protocol} through {name}", folder, progress)
            )
            for (name, parts), folder in zip(models.items(), (work / "first", work / "second"), strict=False)
        ]
        return measure_any(windows, forwards, progress)


@contextmanager
def streamed_forward(
    open_parts: OpenParts, batches: Sequence[Tensor], what: str, work: Path, progress: Progress
) -> Iterator[Forward]:
    """The logits of a model, to be asked for by the number of the batch.

    Args:
        open_parts: opens the model.
        batches: token ids, (sequences, tokens) each.
        what: is run, for the progress.
        work: folder for hidden states, removed on leaving.
        progress: is told about every block.
    """
    parts = open_parts()
    progress.begin(f"running {what}", len(parts.blocks), "blocks")
    with streamed_logits(parts, batches, work, progress.advance) as logits:
        yield logits
