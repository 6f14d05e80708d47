"""Zero-shot and few-shot tasks through lm-eval, on a model in memory."""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantlab.errors import DataError, did_you_mean
from quantlab.evaluate.tasks import BUILT_IN, PUBLISHED_LAYOUTS, local_tasks, write_built_in, write_task
from quantlab.progress import NoProgress, Progress

GROUPS = {
    "ganq-zeroshot": ("hellaswag", "boolq", "rte", "winogrande", "arc_easy", "arc_challenge"),
}
"""Sets of tasks that papers report together: the zero-shot tasks of GANQ (arXiv:2501.12956, Table 3)."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is evaluated.

    Attributes:
        tasks: names of lm-eval tasks, of local tasks, of `GROUPS`, or `stdlib_continuation`.
        num_fewshot: solved examples before each question; None means as the task does.
        limit: at most so many questions per task; None means all.
        batch_size: questions at a time.
        tasks_dir: folder of local tasks, which take precedence over lm-eval's of the same name.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    tasks_dir: Path | None = None


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TaskOptions,
    progress: Progress,
    stage: str = "tasks",
    samples_file: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        options: what to evaluate.
        progress: is told about every answer of the model.
        stage: what the work is called there.
        samples_file: receives one JSON line per question, or None.

    Returns:
        "lm_eval_version", and by task its "version", "num_fewshot", "samples", whether its data are "local", and by
        metric the "value" and its "standard_error".

    Raises:
        DataError: a task is unknown, or its data cannot be had.
    """
    import lm_eval  # takes seconds to import, and most commands need it never
    from lm_eval.models.huggingface import HFLM

    with _reporting_to(progress, stage), _configured(options) as tasks, _data_explained(tasks.names):
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=tasks.specifications,
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            log_samples=samples_file is not None,
            bootstrap_iters=1000,
        )
    if samples_file is not None:
        _write_samples(samples_file, results["samples"])
    return {
        "lm_eval_version": version("lm-eval"),
        "tasks": {name: _summarize(name, results, is_local=name in tasks.local) for name in results["results"]},
    }


def require_tasks(options: TaskOptions) -> None:
    """Make sure that tasks can be evaluated, so that a long run does not fail at its end.

    Raises:
        DataError: a task is unknown, or its data cannot be had.
    """
    with _reporting_to(NoProgress(), ""), _configured(options) as tasks, _data_explained(tasks.names):
        tasks.manager.load(tasks.specifications)


def side_by_side(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What several models answered to the same tasks.

    Args:
        results: by model, what `evaluate_tasks` returned.

    Returns:
        As `evaluate_tasks`, but in place of the "metrics" of a task those of every model under its name.
    """
    first = next(iter(results.values()))
    tasks = {
        task: {key: value for key, value in description.items() if key != "metrics"}
        | {name: result["tasks"][task]["metrics"] for name, result in results.items()}
        for task, description in first["tasks"].items()
    }
    return {"lm_eval_version": first["lm_eval_version"], "tasks": tasks}


@dataclass(frozen=True, kw_only=True)
class _Tasks:
    """Tasks as lm-eval wants them: `local` are the names of those that are described here rather than by lm-eval."""

    names: list[str]
    local: set[str]
    specifications: list[str | dict[str, Any]]
    manager: Any


@contextmanager
def _reporting_to(progress: Progress, stage: str) -> Iterator[None]:
    """Inside, lm-eval and what it is built on show no bars and no remarks; `progress` counts the answers."""
    from datasets import utils as datasets
    from lm_eval.models import huggingface

    def bar(iterable: Iterable[Any] | None = None, total: int = 0, **_: object) -> Any:
        return _Bar(progress, stage, total) if iterable is None else iterable

    def hide_bar(self: object, *args: object, **kwargs: object) -> None:
        make_bar(self, *args, **kwargs | {"disable": True})

    logger, tqdm = logging.getLogger("lm_eval"), huggingface.tqdm
    make_bar, level, with_bars = tqdm.__init__, logger.level, not datasets.are_progress_bars_disabled()
    try:
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        tqdm.__init__ = hide_bar
        huggingface.tqdm = bar
        yield
    finally:
        huggingface.tqdm, tqdm.__init__ = tqdm, make_bar
        logger.setLevel(level)
        if with_bars:
            datasets.enable_progress_bars()


class _Bar:
    """In the place of the bar that lm-eval would show over the requests to a model."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress = progress
        progress.begin(stage, total, "answers")

    def update(self, count: int) -> None:
        self._progress.advance(count)

    def close(self) -> None:
        """A stage ends by itself."""


@contextmanager
def _configured(options: TaskOptions) -> Iterator[_Tasks]:
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(name for task in options.tasks for name in GROUPS.get(task, (task,))))
    files = local_tasks(options.tasks_dir) if options.tasks_dir is not None else {}
    local = {BUILT_IN, *files}
    manager = TaskManager(include_defaults=not local.issuperset(names))
    _require_known(names, [*local, *manager.all_tasks])
    with tempfile.TemporaryDirectory() as folder:
        specifications = [_configure(name, files, Path(folder)) for name in names]
        yield _Tasks(names=names, local=local, specifications=specifications, manager=manager)


@contextmanager
def _data_explained(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:  # of `datasets`, for data that are not on this machine
        raise DataError(
            f"the data of one of {', '.join(names)} cannot be had ({type(error).__name__}: {error})\n"
            f"  Without network: those of {', '.join(PUBLISHED_LAYOUTS)} may lie as JSON lines in a folder, NAME.jsonl "
            "or NAME/*.jsonl,\n  that --tasks-dir, or evaluation.tasks_dir in a recipe, names; tasks of other layouts, "
            "such as gsm8k, have to be loaded once\n  on a machine with network, whose cache (the folder HF_HOME, "
            "~/.cache/huggingface) is then copied here"
        ) from error


def _configure(name: str, local: dict[str, list[Path]], folder: Path) -> str | dict[str, Any]:
    if name in local:
        return write_task(name, local[name], folder)
    return write_built_in(folder) if name == BUILT_IN else name


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"no task {unknown[0]}{did_you_mean(unknown[0], [*known, *GROUPS])}; there are lm-eval's tasks, "
            f"{', '.join(GROUPS)}, {BUILT_IN}, and those of the folder of local tasks"
        )


def _summarize(name: str, results: dict[str, Any], *, is_local: bool) -> dict[str, Any]:
    values = results["results"][name]
    # lm-eval names a metric "acc,none": the metric and the filter that the answers went through.
    metrics = {key: value for key, value in values.items() if "," in key and "_stderr," not in key}
    return {
        "version": results["versions"].get(name),
        "num_fewshot": results["n-shot"].get(name),
        "samples": results["n-samples"].get(name, {}).get("effective"),
        "local": is_local,
        "metrics": {
            key.removesuffix(",none"): {
                "value": value,
                "standard_error": _number(values.get(key.replace(",", "_stderr,", 1))),
            }
            for key, value in metrics.items()
        },
    }


def _number(value: object) -> float | None:
    """The standard error; lm-eval writes "N/A" where there is none."""
    return value if isinstance(value, float) else None


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for task, questions in samples.items():
            for question in questions:
                file.write(json.dumps({"task": task, **question}, default=str) + "\n")
