"""One run from a recipe to a run folder: quantize, reload, check, evaluate, report.

The folder appears under its final name only when it is complete; a run that fails leaves nothing behind.
"""

import gc
import json
import math
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import torch
import transformers
from transformers import PreTrainedModel

from quantlab import registry
from quantlab._version import __version__
from quantlab.api import CodebookSpec, LayerQuantizer
from quantlab.calibration.tokens import TokenWindows, calibration_windows, load_tokenizer
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.solve import SolveOptions
from quantlab.engine.stream import StreamResult, quantize_model
from quantlab.errors import QualityError, UsageError
from quantlab.evaluate.perplexity import perplexity
from quantlab.evaluate.protocols import EvaluationWindows, WindowOptions, evaluation_windows, find_protocol
from quantlab.models import model_label, resolve_model
from quantlab.plan import Plan, compute_dtype, plan_run
from quantlab.progress import NoProgress, Progress
from quantlab.recipe import LoadedRecipe, Recipe, check_method, dump_recipe, load_recipe
from quantlab.report.markdown import write_markdown
from quantlab.skeleton import load_model, read_config

MODEL_FOLDER = "model"

Result = TypeVar("Result")


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
        output_dir: the run folder to create; None means runs/RECIPE-MODEL.
        progress: is told about every stage.

    Returns:
        The run folder.

    Raises:
        QuantlabError: anything that keeps the run from completing; nothing is left behind.
    """
    loaded = load_recipe(source, overrides, model=model)
    arguments = ["run", str(source), *(["--model", model] if model else []), *(f"--set={item}" for item in overrides)]
    return execute(
        loaded,
        check_method(loaded),
        resolve_model(loaded.recipe.model.path),
        output_dir or default_output_dir(loaded),
        progress or NoProgress(),
        shlex.join(["quantlab", *arguments]),
    )


def default_output_dir(loaded: LoadedRecipe) -> Path:
    """runs/RECIPE-MODEL."""
    return Path("runs") / f"{loaded.path.stem}-{model_label(loaded.recipe.model.path)}"


def execute(
    loaded: LoadedRecipe,
    quantizer: LayerQuantizer,
    model_folder: Path,
    output_dir: Path,
    progress: Progress,
    command: str,
) -> Path:
    """Carry out a recipe.

    Args:
        loaded: the recipe.
        quantizer: the configured method of the recipe.
        model_folder: local folder of the float model.
        output_dir: the run folder to create; must not exist, or be empty.
        progress: is told about every stage.
        command: the command line that reproduces the run, for the record.

    Returns:
        The run folder.

    Raises:
        QuantlabError: anything that keeps the run from completing; nothing is left behind.
    """
    require_free(output_dir)
    plan = plan_run(loaded.recipe, model_folder)
    with _staged(output_dir) as folder, (folder / "log.txt").open("w") as log:
        run = _Run(loaded.recipe, quantizer, model_folder, folder, _LoggedProgress(progress, log))
        (folder / "recipe.yaml").write_text(loaded.text)
        (folder / "recipe.resolved.yaml").write_text(dump_recipe(loaded.recipe))
        calibration, corpora = run.timed("read_text", run.read_text)
        stream, files = run.timed("quantize", lambda: run.quantize(calibration))
        evaluation = run.timed("evaluate", lambda: run.evaluate(stream, corpora))
        _write_json(folder / "eval.json", evaluation)
        _write_json(folder / "manifest.json", run.manifest(plan, calibration, stream, files, command))
        write_markdown(folder)
    return output_dir


def require_free(output_dir: Path) -> None:
    """Check that a run folder may be created.

    Raises:
        UsageError: something is there already.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(
            f"the output folder {output_dir} exists and is not empty; choose another with --output-dir, or remove it"
        )


class _Run:
    """The stages of one run, with what they share."""

    def __init__(
        self, recipe: Recipe, quantizer: LayerQuantizer, model_folder: Path, folder: Path, progress: Progress
    ) -> None:
        self.recipe = recipe
        self.quantizer = quantizer
        self.model_folder = model_folder
        self.folder = folder
        self.progress = progress
        self.config = read_config(model_folder)
        self.dtype = compute_dtype(recipe, self.config)
        self.tokenizer = load_tokenizer(model_folder)
        self.started = time.monotonic()
        self.stages_s: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[[], Result]) -> Result:
        """Do the work and note how long it took."""
        start = time.monotonic()
        result = work()
        self.stages_s[stage] = round(time.monotonic() - start, 3)
        return result

    def read_text(self) -> tuple[TokenWindows, list[EvaluationWindows]]:
        """The windows to calibrate on, and those of every corpus to evaluate on; early, since texts may be missing."""
        section, evaluation = self.recipe.calibration, self.recipe.evaluation
        calibration = calibration_windows(
            self.tokenizer, section.name, section.num_samples, section.sequence_length, self.recipe.seed
        )
        options = WindowOptions(sequence_length=evaluation.sequence_length, num_windows=evaluation.num_windows)
        corpora = [evaluation_windows(self.tokenizer, find_protocol(name), options) for name in evaluation.perplexity]
        return calibration, corpora

    def quantize(self, calibration: TokenWindows) -> tuple[StreamResult, dict[str, str]]:
        """Write the quantized checkpoint; returns what is reported and the hashes of its files."""
        recipe = self.recipe
        writer = CheckpointWriter(self.folder / MODEL_FOLDER)
        options = SolveOptions(
            quantizer=self.quantizer,
            spec=CodebookSpec(bits=recipe.method.bits, group_size=recipe.method.group_size),
            seed=recipe.seed,
            allow_fallbacks=recipe.allow_fallbacks,
        )
        stream = quantize_model(self.model_folder, writer, options, calibration.ids, self.dtype, self.progress)
        method = {"name": self.quantizer.info.name, "options": _options(self.quantizer)}
        producer = {"name": "quantlab-ptq", "version": __version__}
        config = json.loads((self.model_folder / "config.json").read_text())
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        writer.finish(
            self.model_folder, config, QuantizationConfig(method=method, producer=producer, modules=stream.modules)
        )
        return stream, writer.files()

    def evaluate(self, stream: StreamResult, corpora: list[EvaluationWindows]) -> dict[str, Any]:
        """Check the written checkpoint, and measure the perplexity of it and of the float model on every corpus."""
        quantized = self._perplexities("quantized", self._reload(stream), corpora)
        gc.collect()  # one model in memory at a time
        reference = self._perplexities("float", load_model(self.model_folder, self.dtype), corpora) if corpora else []
        return {
            "perplexity": {
                corpus.protocol: {
                    "float": float_value,
                    "quantized": quantized_value,
                    "tokens": corpus.ids.numel(),
                    "windows": corpus.ids.shape[0],
                    "sequence_length": corpus.ids.shape[1],
                    "token_sha256": corpus.sha256,
                }
                for corpus, float_value, quantized_value in zip(corpora, reference, quantized, strict=True)
            }
        }

    def _perplexities(self, label: str, model: PreTrainedModel, corpora: list[EvaluationWindows]) -> list[float]:
        values = []
        for corpus in corpora:
            self.progress.begin(f"perplexity of the {label} model on {corpus.protocol}", corpus.ids.shape[0], "windows")
            values.append(perplexity(model, corpus.ids, self.progress))
        return values

    def _reload(self, stream: StreamResult) -> PreTrainedModel:
        """Load the written checkpoint and check that it computes what the engine computed."""
        model = load(self.folder / MODEL_FOLDER)
        with torch.inference_mode():
            logits = model(input_ids=stream.check_ids, use_cache=False).logits
        if not torch.equal(logits, stream.check_logits):
            difference = (logits - stream.check_logits).abs().max().item()
            raise QualityError(
                f"the written checkpoint does not reproduce the quantized model: logits differ by up to "
                f"{difference:.3g} on a batch of calibration text"
            )
        return model

    def manifest(
        self, plan: Plan, calibration: TokenWindows, stream: StreamResult, files: dict[str, str], command: str
    ) -> dict[str, Any]:
        """Everything that is needed to understand and to repeat the run."""
        entry = registry.available()[self.quantizer.info.name]
        weights = sum(math.prod(layer.shape) for layer in stream.layers)
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
            "checkpoint_bytes": sum(file.stat().st_size for file in (self.folder / MODEL_FOLDER).glob("*.safetensors")),
            "source_bytes": plan.source_bytes,
            "peak_rss_bytes": _peak_rss_bytes(),
            "wall_s": round(time.monotonic() - self.started, 3),
            "stages_s": self.stages_s,
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
            "versions": {
                "quantlab": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "threads": torch.get_num_threads(),
            "command": command,
            "files": files,
        }


class _LoggedProgress:
    """Passes progress on and writes every event to the run's log."""

    def __init__(self, progress: Progress, log: TextIO) -> None:
        self._progress = progress
        self._log = log

    def begin(self, stage: str, total: int, unit: str) -> None:
        self._write(f"{stage}: {total} {unit}")
        self._progress.begin(stage, total, unit)

    def advance(self, count: int = 1, detail: str = "") -> None:
        if detail:
            self._write(detail)
        self._progress.advance(count, detail)

    def _write(self, line: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=self._log, flush=True)


@contextmanager
def _staged(output_dir: Path) -> Iterator[Path]:
    """A folder beside the final one that takes its name on success and disappears on failure."""
    new_parents = [parent for parent in output_dir.parents if not parent.exists()]  # the innermost first
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.replace(output_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # another run may have put its folder there by now
            for parent in new_parents:
                parent.rmdir()
        raise


def _options(quantizer: LayerQuantizer) -> dict[str, Any]:
    return asdict(cast(Any, quantizer))  # the registry admits dataclasses only


def _peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
