"""One evaluation: perplexities, divergence from a float model, and tasks, of one model."""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantlab.calibration.tokens import calibration_windows, load_tokenizer, window_length
from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.engine.device import capacity_bytes
from quantlab.engine.forward import CheckpointParts, FloatParts
from quantlab.engine.memory import RUNTIME_BYTES, ModelSizes
from quantlab.engine.survey import survey_model
from quantlab.errors import DataError, UsageError
from quantlab.evaluate.harness import TaskOptions, evaluate_tasks
from quantlab.evaluate.layers import measure_layers
from quantlab.evaluate.perplexity import TOKENS_PER_BATCH, in_memory, measure_any
from quantlab.evaluate.protocols import Bos, EvaluationWindows, WindowOptions, evaluation_windows, find_protocol
from quantlab.evaluate.spread import measure_spread
from quantlab.evaluate.streamed import measure_streamed
from quantlab.evaluate.subject import Subject
from quantlab.executors import Executor
from quantlab.progress import Progress
from quantlab.skeleton import read_config

MEMORY_SHARE = 0.8
"""Of the machine's memory that models may fill; the rest is for logits and everything else."""

LOGITS_COPIES = 8
"""Tensors of the size of a batch's logits that exist at once when two models are compared, counted as float32."""

LAYER_COPIES = 4
"""Tensors of the size of a layer that exist at once while its errors are measured, counted as float32."""


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
        layers: whether the errors of every quantized layer are measured, on the first of the `protocols` and on the
            text that the run was calibrated on.
        samples_file: receives every question and answer, or None.
        dtype: what the models compute in, or None for what the model is stored in.
        memory_budget_bytes: memory that the evaluation may occupy, one block at a time; None for no limit.
    """

    protocols: tuple[str, ...]
    tasks: TaskOptions
    sequence_length: int | None = None
    stride: int | None = None
    bos: Bos | None = None
    num_windows: int | None = None
    layers: bool = False
    samples_file: Path | None = None
    dtype: str | None = None
    memory_budget_bytes: int | None = None


def evaluate_subject(
    subject: Subject,
    reference: Subject | None,
    options: EvaluationOptions,
    progress: Progress,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        subject: the model.
        reference: the float model to compare it with, or None.
        options: what to evaluate.
        progress: is told about every window.
        executor: where perplexities are measured; None for this process. Tasks are evaluated here.

    Returns:
        "perplexity" by protocol, as `measure` or `measure_pair` describes it; "tasks" and "lm_eval_version" if there
        were any; "layers" if asked for, as `evaluate_layers` describes it; "tokenizer_sha256"; and whether perplexities
        were "streamed".

    Raises:
        QuantlabError: a model or text is missing, they do not fit together, or the memory does not suffice.
    """
    tokenizer = load_tokenizer(subject.folder)
    identity = tokenizer_sha256(subject.folder)
    if reference is not None and tokenizer_sha256(reference.folder) != identity:
        raise UsageError(
            f"{subject.name} and {reference.name} have different tokenizers, so their perplexities do not compare; "
            "give the float model that the quantized one was made from"
        )
    length = window_length(options.sequence_length, read_config(subject.folder))
    window_options = WindowOptions(
        sequence_length=length,
        stride=options.stride,
        bos=options.bos,
        num_windows=options.num_windows,
    )
    corpora = [evaluation_windows(tokenizer, find_protocol(name), window_options) for name in options.protocols]
    dtype = subject.dtype if options.dtype is None else getattr(torch, options.dtype)
    subjects = [subject] if reference is None else [reference, subject]
    streamed = must_stream(subjects, dtype, options.memory_budget_bytes)
    results: dict[str, Any] = {"model": subject.name, "tokenizer_sha256": identity, "streamed": streamed}
    model = None
    if streamed:
        _require_budget(subjects, dtype, options, length)
    if executor is not None and executor.remote:
        everywhere = [replace(each, folder=each.folder.absolute()) for each in subjects]
        for each in everywhere:
            executor.require_shared(each.folder, None)
        executor.link(progress, lambda: False)
        results["perplexity"] = {
            windows.protocol: measure_spread(windows, everywhere, dtype, executor, progress, streamed=streamed)
            for windows in corpora
        }
    elif streamed:
        models = {each.name: partial(each.open_parts, dtype) for each in subjects}
        with tempfile.TemporaryDirectory(prefix="quantlab-") as work:
            results["perplexity"] = {
                windows.protocol: measure_streamed(windows, models, Path(work), progress) for windows in corpora
            }
    else:
        model = subject.load(dtype)
        loaded = [model] if reference is None or not corpora else [reference.load(dtype), model]
        forwards = [in_memory(each) for each in loaded]
        results["perplexity"] = {windows.protocol: measure_any(windows, forwards, progress) for windows in corpora}
    if options.layers:
        results["layers"] = evaluate_layers(subject, reference, corpora[0], options.num_windows, dtype, progress)
    if options.tasks.tasks:
        model = model or subject.load(dtype)
        results |= evaluate_tasks(model, tokenizer, options.tasks, progress, samples_file=options.samples_file)
    return results


def evaluate_layers(
    subject: Subject,
    reference: Subject | None,
    held_out: EvaluationWindows,
    num_windows: int | None,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    """The errors of every quantized layer, on calibration text and on held-out text.

    Args:
        subject: a run.
        reference: the float model that it started from.
        held_out: what to measure on besides the calibration text; as many windows are taken of both.
        num_windows: at most so many; None means all.
        dtype: what the models compute in.
        progress: is told about every block.

    Returns:
        "texts" by name, "calibration" and "held_out", each with its "source", "windows", "sequence_length" and
        "token_sha256"; and "layers" as `measure_layers` describes them.

    Raises:
        UsageError: the subject is not a run.
        DataError: the calibration text is not as it was.
    """
    if subject.source is None or reference is None:
        raise UsageError(f"{subject.name} is not the folder of a run, so that its calibration text is not known")
    manifest = json.loads((subject.folder.parent / MANIFEST_NAME).read_text(encoding="utf-8"))
    asked = manifest["calibration"]
    tokenizer = load_tokenizer(subject.folder)
    calibration = calibration_windows(
        tokenizer, asked["name"], asked["num_samples"], asked["sequence_length"], manifest["seed"]
    )
    if calibration.sha256 != asked["token_sha256"]:
        raise DataError(
            f"the text {asked['name']} has changed since {subject.name} was calibrated on it (the standard library "
            "changes with the Python version), so that errors on calibration text cannot be measured"
        )
    count = min(len(calibration.ids), len(held_out.ids), num_windows or len(held_out.ids))
    texts = {
        "calibration": (calibration.source, calibration.ids[:count]),
        "held_out": (held_out.protocol, held_out.ids[torch.arange(count) * len(held_out.ids) // count]),
    }
    float_parts, quantized_parts = (
        FloatParts(reference.folder, dtype, reference.device),
        CheckpointParts(subject.folder, dtype, subject.device),
    )
    with tempfile.TemporaryDirectory(prefix="quantlab-") as work:
        ids = {name: ids for name, (_, ids) in texts.items()}
        layers = measure_layers(float_parts, quantized_parts, ids, Path(work), progress)
    described = {
        name: {
            "source": source,
            "windows": ids.shape[0],
            "sequence_length": ids.shape[1],
            "token_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        }
        for name, (source, ids) in texts.items()
    }
    return {"texts": described, "layers": layers}


def must_stream(subjects: Sequence[Subject], dtype: torch.dtype, memory_budget_bytes: int | None) -> bool:
    """Whether models are evaluated one block at a time: if there is a budget, or their device cannot hold them.

    Args:
        subjects: the models that are needed at the same time.
        dtype: what they compute in.
        memory_budget_bytes: None for no limit but the device's.
    """
    needed = sum(subject.memory_bytes(dtype) for subject in subjects)
    return memory_budget_bytes is not None or needed > MEMORY_SHARE * capacity_bytes(subjects[0].device)


def streamed_bytes(sizes: Sequence[ModelSizes], tokens: int) -> int:
    """The expected peak memory of a streamed evaluation.

    Args:
        sizes: of the models that are compared.
        tokens: of a batch.
    """
    outside = sum(size.outside_bytes for size in sizes)
    inside = max(2 * size.block_bytes + size.inside_bytes(tokens) for size in sizes)
    logits = LOGITS_COPIES * 4 * tokens * max(size.vocabulary for size in sizes)
    return RUNTIME_BYTES + outside + max(inside, logits)


def layer_errors_bytes(sizes: Sequence[ModelSizes], tokens: int) -> int:
    """The expected peak memory of measuring layer errors, where both models have a block in memory; as above."""
    models = sum(size.outside_bytes + 2 * size.block_bytes + size.inside_bytes(tokens) for size in sizes)
    return RUNTIME_BYTES + models + LAYER_COPIES * 4 * max(math.prod(shape) for size in sizes for shape in size.shapes)


def _require_budget(subjects: Sequence[Subject], dtype: torch.dtype, options: EvaluationOptions, length: int) -> None:
    budget = options.memory_budget_bytes
    if budget is None:
        return
    if options.tasks.tasks:
        raise UsageError("tasks need the whole model in memory, so a memory budget cannot be kept; evaluate them apart")
    sizes = [survey_model(read_config(subject.folder), dtype).sizes for subject in subjects]
    tokens = max(length, TOKENS_PER_BATCH)
    needed = max(streamed_bytes(sizes, tokens), layer_errors_bytes(sizes, tokens) if options.layers else 0)
    if needed > budget:
        raise UsageError(
            f"a memory budget of {budget / 2**20:,.0f} MiB is too small to evaluate these models; one block at a time "
            f"they need {needed / 2**20:,.0f} MiB (computing in bfloat16 needs less)"
        )


def tokenizer_sha256(folder: Path) -> str:
    """Identity of a tokenizer: hash of its vocabulary and merges."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
    digest = hashlib.sha256()
    for path in (folder / name for name in names):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
