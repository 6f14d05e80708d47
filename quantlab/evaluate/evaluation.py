"""One evaluation: perplexities, divergence from a float model, and tasks, of one model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab.calibration.tokens import load_tokenizer
from quantlab.errors import UsageError
from quantlab.evaluate.harness import TaskOptions, evaluate_tasks
from quantlab.evaluate.perplexity import in_memory, measure, measure_pair
from quantlab.evaluate.protocols import Bos, WindowOptions, evaluation_windows, find_protocol
from quantlab.evaluate.subject import Subject
from quantlab.progress import Progress
from quantlab.skeleton import read_config

DEFAULT_LENGTH = 2048
"""Tokens per window in the literature, where the model's context holds as many."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated.

    Attributes:
        protocols: perplexity protocols and text sources.
        sequence_length: tokens per window; None means 2048, or the model's context if that is shorter.
        stride: as in `WindowOptions`.
        bos: as in `WindowOptions`.
        num_windows: as in `WindowOptions`.
        tasks: for lm-eval; none of them if its `tasks` is empty.
        samples_file: receives every question and answer, or None.
        dtype: what the models compute in, or None for what they are stored in.
    """

    protocols: tuple[str, ...]
    tasks: TaskOptions
    sequence_length: int | None = None
    stride: int | None = None
    bos: Bos | None = None
    num_windows: int | None = None
    samples_file: Path | None = None
    dtype: str | None = None


def evaluate_subject(
    subject: Subject, reference: Subject | None, options: EvaluationOptions, progress: Progress
) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        subject: the model.
        reference: the float model to compare it with, or None.
        options: what to evaluate.
        progress: is told about every window.

    Returns:
        "perplexity" by protocol, as `measure` or `measure_pair` describes it; "tasks" and "lm_eval_version" if there
        were any; and "tokenizer_sha256".

    Raises:
        QuantlabError: a model or text is missing, or they do not fit together.
    """
    tokenizer = load_tokenizer(subject.folder)
    identity = tokenizer_sha256(subject.folder)
    if reference is not None and tokenizer_sha256(reference.folder) != identity:
        raise UsageError(
            f"{subject.name} and {reference.name} have different tokenizers, so their perplexities do not compare; "
            "give the float model that the quantized one was made from"
        )
    length = options.sequence_length or default_length(subject.folder)
    window_options = WindowOptions(
        sequence_length=length, stride=options.stride, bos=options.bos, num_windows=options.num_windows
    )
    corpora = [evaluation_windows(tokenizer, find_protocol(name), window_options) for name in options.protocols]
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = subject.load(dtype)
    results: dict[str, Any] = {"model": subject.name, "tokenizer_sha256": identity, "perplexity": {}}
    reference_model = reference.load(dtype or model.dtype) if reference is not None and corpora else None
    for windows in corpora:
        progress.begin(f"perplexity on {windows.protocol}", windows.ids.shape[0], "windows")
        results["perplexity"][windows.protocol] = (
            measure(windows, in_memory(model), progress)
            if reference_model is None
            else measure_pair(windows, in_memory(reference_model), in_memory(model), progress)
        )
    if options.tasks.tasks:
        results |= evaluate_tasks(model, tokenizer, options.tasks, options.samples_file)
    return results


def default_length(folder: Path) -> int:
    """Tokens per window that a model is evaluated on unless told otherwise."""
    context = getattr(read_config(folder), "max_position_embeddings", None)
    return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)


def tokenizer_sha256(folder: Path) -> str:
    """Identity of a tokenizer: hash of its vocabulary and merges."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
    digest = hashlib.sha256()
    for path in (folder / name for name in names):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
