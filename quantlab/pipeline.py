"""One run from a recipe to a run folder: quantize, reload, check, evaluate, report.

The folder is worked on in place. While it holds a journal it is unfinished, and the same run continues it; a run
that cannot succeed leaves nothing behind.
"""

import hashlib
import json
import math
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from quantlab import registry
from quantlab._version import __version__
from quantlab.api import LayerQuantizer
from quantlab.calibration.tokens import TokenWindows, calibration_windows, load_tokenizer, window_length
from quantlab.checkpoint.atomic import replacing
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.names import (
    EVALUATION_NAME,
    LOG_NAME,
    MANIFEST_NAME,
    MODEL_FOLDER,
    RECIPE_NAME,
    RESOLVED_RECIPE_NAME,
)
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.device import peak_device_bytes, require_device
from quantlab.engine.fingerprint import (
    recipe_fingerprint,
    require_same_recipe,
    require_same_run,
    source_fingerprint,
)
from quantlab.engine.options import single_threaded
from quantlab.engine.solve import SolveOptions
from quantlab.engine.statistics import StatisticsOptions, statistics_bytes
from quantlab.engine.stream import StreamRequest, StreamResult, quantize_model
from quantlab.errors import QualityError
from quantlab.evaluate.evaluation import must_stream, tokenizer_sha256
from quantlab.evaluate.harness import TaskOptions, evaluate_tasks, require_tasks, side_by_side
from quantlab.evaluate.perplexity import in_memory, measure_any
from quantlab.evaluate.protocols import EvaluationWindows, WindowOptions, evaluation_windows, find_protocol
from quantlab.evaluate.spread import measure_spread
from quantlab.evaluate.streamed import measure_streamed, streamed_forward
from quantlab.evaluate.subject import Subject
from quantlab.executors import Executor, LocalExecutor
from quantlab.memory import MemoryTimeline, peak_rss_bytes
from quantlab.models import model_label, resolve_model
from quantlab.plan import Plan, compute_dtype, engine_options, plan_run, statistics_options
from quantlab.progress import LoggedProgress, NoProgress, Progress
from quantlab.recipe import LoadedRecipe, Recipe, dump_recipe, load_recipe
from quantlab.recipe.layers import MethodAssignment, assign_methods
from quantlab.report.markdown import write_markdown
from quantlab.report.units import format_bytes
from quantlab.skeleton import CPU, read_config, weight_files
from quantlab.workspace import Workspace, memory_shortage_explained, working_in

Result = TypeVar("Result")

DISK_SHARE = 0.5
"""Of the free disk, what statistics that runs share may take; otherwise each run collects its own."""


class FloatReference(Protocol):
    """What the float model says, remembered for several runs that start from it."""

    def __call__(self, index: int, ids: Tensor) -> Tensor:
        """Its logits, as those of a `quantlab.evaluate.perplexity.Forward`."""
        ...

    def on_tasks(self, options: TaskOptions, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `evaluate` returns, its results on the tasks that the options name."""
        ...

    def folder(self, key: str) -> Path:
        """Where runs with the same key share what they measure in the float model."""
        ...


def run(
    source: str | Path,
    *,
    model: str | None = None,
    overrides: Sequence[str] = (),
    output_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Carry out a recipe, as `quantlab run` does.

    Args:
        source: a recipe file, or the name of a built-in recipe.
        model: replaces the recipe's model: a folder, a hub id or an alias.
        overrides: assignments such as "method.bits=3".
        output_dir: the run folder to create, or to continue in; None means runs/RECIPE-MODEL.
        progress: is told about every stage.

    Returns:
        The run folder.

    Raises:
        ResumableError: the run ended early, and the same call continues it.
        QuantlabError: anything else that keeps the run from completing; nothing new is left behind.
    """
    loaded = load_recipe(source, overrides, model=model)
    arguments = ["run", str(source), *(["--model", model] if model else []), *(f"--set={item}" for item in overrides)]
    return execute(
        assign_methods(loaded),
        resolve_model(loaded.recipe.model.path),
        output_dir or default_output_dir(loaded),
        progress or NoProgress(),
        shlex.join(["quantlab", *arguments]),
    )


def default_output_dir(loaded: LoadedRecipe) -> Path:
    """runs/RECIPE-MODEL."""
    return Path("runs") / f"{loaded.path.stem}-{model_label(loaded.recipe.model.path)}"


def execute(
    assignment: MethodAssignment,
    model_folder: Path,
    output_dir: Path,
    progress: Progress,
    command: str,
    stop: Callable[[], bool] = lambda: False,
    reference: FloatReference | None = None,
    executor: Executor | None = None,
) -> Path:
    """Carry out a recipe, or continue what a former process began.

    Args:
        assignment: the recipe and its methods.
        model_folder: local folder of the float model.
        output_dir: the run folder; must not exist, be empty, or hold the same run unfinished.
        progress: is told about every stage.
        command: the command line that reproduces the run, for the record.
        stop: asked after every block and evaluated window; a true answer ends the run there.
        reference: the answers of the float model, if they are shared with other runs; None loads it to evaluate.
        executor: where layers are solved; None for this process.

    Returns:
        The run folder.

    Raises:
        ResumableError: the run ended early, and can be continued.
        QuantlabError: anything else that keeps the run from completing; nothing new is left behind.
    """
    recipe = assignment.loaded.recipe
    with (
        working_in(output_dir) as workspace,
        (output_dir / LOG_NAME).open("a") as log,
        single_threaded(recipe.engine.deterministic),
        memory_shortage_explained(),
        MemoryTimeline() as timeline,
    ):
        if workspace.complete:
            require_same_recipe(workspace.journal.entries[0]["fingerprint"], recipe, output_dir)
            return output_dir
        require_device(engine_options(recipe).device)
        plan = plan_run(assignment, read_config(model_folder))
        logged = LoggedProgress(progress, log, stop)
        executor = executor or LocalExecutor()
        executor.require_shared(model_folder, output_dir)
        executor.link(logged, stop)
        run = _Run(assignment, model_folder, workspace, logged, timeline, reference, executor)
        calibration, corpora = run.timed("read_text", run.read_text)
        run.identify(calibration)
        stream, files = run.timed("quantize", lambda: run.quantize(plan, calibration, stop))
        logged.stoppable = True
        evaluation = run.timed("evaluate", lambda: run.evaluate(stream, corpora))
        _write_json(output_dir / EVALUATION_NAME, evaluation)
        _write_json(output_dir / MANIFEST_NAME, run.manifest(plan, calibration, stream, files, command))
        write_markdown(output_dir)
    return output_dir


class _Run:
    """The stages of one run, with what they share."""

    def __init__(
        self,
        assignment: MethodAssignment,
        model_folder: Path,
        workspace: Workspace,
        progress: Progress,
        timeline: MemoryTimeline,
        reference: FloatReference | None,
        executor: Executor,
    ) -> None:
        self.assignment = assignment
        self.recipe = recipe = assignment.loaded.recipe
        self.quantizer = assignment.default.quantizer
        self.timeline = timeline
        self.reference = reference
        self.executor = executor
        self.model_folder = model_folder
        self.workspace = workspace
        self.folder = workspace.folder
        self.progress = progress
        self.config = read_config(model_folder)
        self.dtype = compute_dtype(recipe, self.config)
        self.tokenizer = load_tokenizer(model_folder)
        device = engine_options(recipe).device
        self.float_model = Subject(name="float", folder=model_folder, is_quantized=False, device=device)
        self.quantized_model = Subject(
            name="quantized", folder=self.folder / MODEL_FOLDER, is_quantized=True, device=device
        )
        self.started = time.monotonic()
        self.stages_s: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[[], Result]) -> Result:
        """Do the work and note how long it took."""
        self.timeline.begin(stage)
        start = time.monotonic()
        result = work()
        self.stages_s[stage] = round(time.monotonic() - start, 3)
        return result

    def read_text(self) -> tuple[TokenWindows, list[EvaluationWindows]]:
        """The windows to calibrate on, and those of every corpus to evaluate on; early, since texts may be missing."""
        section, evaluation = self.recipe.calibration, self.recipe.evaluation
        length = window_length(section.sequence_length, self.config)
        calibration = calibration_windows(self.tokenizer, section.name, section.num_samples, length, self.recipe.seed)
        options = WindowOptions(
            sequence_length=window_length(evaluation.sequence_length, self.config),
            stride=evaluation.stride,
            bos=evaluation.bos,
            num_windows=evaluation.num_windows,
        )
        corpora = [evaluation_windows(self.tokenizer, find_protocol(name), options) for name in evaluation.perplexity]
        if evaluation.tasks:
            require_tasks(task_options(self.recipe))
        return calibration, corpora

    def identify(self, calibration: TokenWindows) -> None:
        """Note in the journal what the run depends on, or check that it is still the same.

        Raises:
            UsageError: a former process began a different run in the folder.
        """
        entry = registry.available()[self.quantizer.info.name]
        current = {
            **recipe_fingerprint(self.recipe),
            **source_fingerprint(self.model_folder),
            "calibration.token_sha256": calibration.sha256,
            f"versions.{entry.distribution}": entry.version,
            **{f"versions.{name}": version for name, version in versions().items()},
        }
        journal = self.workspace.journal
        if journal.entries:
            require_same_run(journal.entries[0]["fingerprint"], current, self.folder)
            return
        _write_text(self.folder / RECIPE_NAME, self.assignment.loaded.text)
        _write_text(self.folder / RESOLVED_RECIPE_NAME, dump_recipe(self.recipe))
        journal.append({"kind": "run", "fingerprint": current})

    def quantize(
        self, plan: Plan, calibration: TokenWindows, stop: Callable[[], bool]
    ) -> tuple[StreamResult, dict[str, str]]:
        """Write the quantized checkpoint; returns what is reported and the hashes of its files."""
        recipe, workspace, assignment = self.recipe, self.workspace, self.assignment
        statistics = statistics_options(recipe, assignment.methods)
        request = StreamRequest(
            source=self.model_folder,
            calibration_ids=calibration.ids,
            dtype=self.dtype,
            options_of=self.solve_options,
            statistics=statistics,
            engine=engine_options(recipe),
            gradients=self._shared_gradients(calibration, statistics),
            shared_statistics=self._shared_statistics(plan, calibration, statistics),
        )
        writer = CheckpointWriter(self.folder / MODEL_FOLDER)
        stream = quantize_model(request, writer, workspace.journal, workspace.work, self.progress, stop, self.executor)
        self.quantize_peak_rss_bytes = peak_rss_bytes()
        config = json.loads((self.model_folder / "config.json").read_text())
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        quantization = QuantizationConfig(
            method={"name": self.quantizer.info.name, "options": _options(self.quantizer)},
            producer={"name": "quantlab-ptq", "version": __version__},
            modules=stream.modules,
            unfused_experts=stream.unfused_experts,
        )
        writer.finish(self.model_folder, config, quantization)
        return stream, writer.files()

    def _shared_gradients(self, calibration: TokenWindows, statistics: StatisticsOptions) -> Path | None:
        if self.reference is None:
            return None
        wanted = f"{'fisher' if statistics.fisher else 'no-fisher'}-{statistics.saliency_groups}"
        return self.reference.folder(f"gradients-{calibration.sha256[:16]}-{wanted}")

    def _shared_statistics(self, plan: Plan, calibration: TokenWindows, statistics: StatisticsOptions) -> Path | None:
        """Where runs share what they measure of the float model's inputs, unless that would fill the disk."""
        if self.reference is None or statistics.inputs != "float":
            return None
        engine = engine_options(self.recipe)
        depends_on = [
            calibration.sha256,
            statistics.saliency_groups,
            [layer.name for layer in plan.quantized],
            [engine.memory_budget_bytes, engine.calibration_shards],  # in which order sums are added
            torch.get_num_threads(),
        ]
        key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
        folder = self.reference.folder(f"statistics-{key}")
        most = sum(statistics_bytes(layer.shape[1], 1, statistics) for layer in plan.quantized)
        if not folder.exists() and most > DISK_SHARE * shutil.disk_usage(folder.parent).free:
            self.progress.advance(
                0,
                f"every run collects its statistics: to share them would take up to {format_bytes(most)} of disk",
            )
            return None
        return folder

    def solve_options(self, layer: str) -> SolveOptions | None:
        """How a layer is solved, by its full name; None keeps it in floating point."""
        method = self.assignment.of(layer)
        if method is None:
            return None
        return SolveOptions(
            quantizer=method.quantizer,
            spec=method.spec,
            seed=self.recipe.seed,
            allow_fallbacks=self.recipe.allow_fallbacks,
        )

    def evaluate(self, stream: StreamResult, corpora: list[EvaluationWindows]) -> dict[str, Any]:
        """Check the written checkpoint, and measure it beside the float model on every corpus and task."""
        options = engine_options(self.recipe)
        budget = options.memory_budget_bytes or options.device_memory_budget_bytes
        streamed = must_stream([self.float_model, self.quantized_model], self.dtype, budget)
        measure = self._evaluate_streamed if streamed else self._evaluate_in_memory
        if self.executor.remote:
            measure = partial(self._evaluate_spread, streamed=streamed)
        return {
            "perplexity": measure(stream, corpora),
            "tokenizer_sha256": tokenizer_sha256(self.model_folder),
            **self._evaluate_tasks(),
        }

    def _evaluate_in_memory(self, stream: StreamResult, corpora: list[EvaluationWindows]) -> dict[str, Any]:
        quantized = self._reload(stream)
        if not corpora:
            return {}
        forwards = [self.reference or in_memory(self.float_model.load(self.dtype)), in_memory(quantized)]
        return {corpus.protocol: measure_any(corpus, forwards, self.progress) for corpus in corpora}

    def _evaluate_spread(
        self, stream: StreamResult, corpora: list[EvaluationWindows], *, streamed: bool
    ) -> dict[str, Any]:
        """The same on the machines of the executor, after the check on this one."""
        (self._evaluate_streamed if streamed else self._evaluate_in_memory)(stream, [])
        models = [replace(model, folder=model.folder.absolute()) for model in (self.float_model, self.quantized_model)]
        return {
            corpus.protocol: measure_spread(corpus, models, self.dtype, self.executor, self.progress, streamed=streamed)
            for corpus in corpora
        }

    def _reload(self, stream: StreamResult) -> PreTrainedModel:
        """Load the written checkpoint and check that it computes what the engine computed."""
        model = self.quantized_model.load()
        with torch.inference_mode():
            _require_reproduced(in_memory(model)(0, stream.check_ids), stream)
        return model

    def _evaluate_streamed(self, stream: StreamResult, corpora: list[EvaluationWindows]) -> dict[str, Any]:
        """The same with one block in memory at a time."""
        work, progress = self.workspace.work, self.progress
        float_parts, quantized_parts = (
            partial(model.open_parts, self.dtype) for model in (self.float_model, self.quantized_model)
        )
        what = "the check through the quantized model"
        with streamed_forward(quantized_parts, (stream.check_ids,), what, work / "check", progress) as forward:
            _require_reproduced(forward(0, stream.check_ids), stream)
        models = {"the float model": float_parts, "the quantized model": quantized_parts}
        return {corpus.protocol: measure_streamed(corpus, models, work / "evaluation", progress) for corpus in corpora}

    def _evaluate_tasks(self) -> dict[str, Any]:
        options = task_options(self.recipe)
        if not options.tasks:
            return {}

        def evaluate(model: Subject) -> dict[str, Any]:
            stage = f"tasks, {model.name} model"
            return evaluate_tasks(model.load(self.dtype), self.tokenizer, options, self.progress, stage)

        on_float = partial(evaluate, self.float_model)
        reference = on_float() if self.reference is None else self.reference.on_tasks(options, on_float)
        return side_by_side({"float": reference, "quantized": evaluate(self.quantized_model)})

    def manifest(
        self, plan: Plan, calibration: TokenWindows, stream: StreamResult, files: dict[str, str], command: str
    ) -> dict[str, Any]:
        """Everything that is needed to understand and to repeat the run."""
        entry = registry.available()[self.quantizer.info.name]
        weights = sum(math.prod(layer.shape) for layer in stream.layers)
        quantize_s = self.stages_s["quantize"] + self.workspace.earlier_s + stream.borrowed_s
        return {
            "model": {
                "path": self.recipe.model.path,
                "architecture": plan.architecture,
                "parameters": plan.parameters,
                "quantized_parameters": plan.quantized_parameters,
            },
            "method": {
                "name": entry.name,
                "options": _options(self.quantizer),
                "distribution": entry.distribution,
                "version": entry.version,
            },
            "bits": self.recipe.method.bits,
            "group_size": self.recipe.method.group_size,
            "bits_per_weight": sum(layer.storage_bits for layer in stream.layers) / weights,
            "checkpoint_bytes": self.quantized_model.bytes_on_disk,
            "written_bytes": self.quantized_model.bytes_on_disk + plan.hidden_states_written,
            "source_bytes": sum(file.stat().st_size for file in weight_files(self.model_folder)),
            "peak_rss_bytes": peak_rss_bytes(),
            "wall_s": round(time.monotonic() - self.started, 3),
            "stages_s": {**self.stages_s, "quantize": round(quantize_s, 3)},
            "continued": self.workspace.continued,
            "engine_s": stream.seconds,
            "drive_mode": stream.drive_mode,
            "memory": {
                "budget_bytes": engine_options(self.recipe).memory_budget_bytes,
                "expected_peak_bytes": stream.memory.peak_bytes,
                "expected_device_peak_bytes": stream.memory.device_peak_bytes,
                "device_peak_bytes": peak_device_bytes(engine_options(self.recipe).device),
                "quantize_peak_rss_bytes": self.quantize_peak_rss_bytes,
                **asdict(stream.memory),
                "timeline": self.timeline.record(),
            },
            "layers": [asdict(layer) for layer in stream.layers],
            "fallbacks": [layer.name for layer in stream.layers if layer.diagnostics.get("fallbacks", 0) > 0],
            "calibration": {
                "name": calibration.source,
                "num_samples": calibration.ids.shape[0],
                "sequence_length": calibration.ids.shape[1],
                "tokens": calibration.ids.numel(),
                "token_sha256": calibration.sha256,
            },
            "seed": self.recipe.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version(), **versions()},
            "threads": torch.get_num_threads(),
            "command": command,
            "files": files,
        }


def task_options(recipe: Recipe) -> TaskOptions:
    """The tasks of a recipe."""
    section = recipe.evaluation
    return TaskOptions(
        tasks=section.tasks,
        num_fewshot=section.num_fewshot,
        limit=section.limit,
        tasks_dir=None if section.tasks_dir is None else Path(section.tasks_dir).expanduser(),
    )


def _require_reproduced(logits: Tensor, stream: StreamResult) -> None:
    if not torch.equal(logits.to(CPU), stream.check_logits):
        difference = (logits - stream.check_logits).abs().max().item()
        raise QualityError(
            f"the written checkpoint does not reproduce the quantized model: logits differ by up to "
            f"{difference:.3g} on a batch of calibration text"
        )


def versions() -> dict[str, str]:
    """Of everything that the result depends on besides the method."""
    return {"quantlab": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _options(quantizer: LayerQuantizer) -> dict[str, Any]:
    return asdict(cast(Any, quantizer))  # the registry admits dataclasses only


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
