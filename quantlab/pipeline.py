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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from quantlab import registry
from quantlab._version import __version__
from quantlab.api import CodebookSpec, LayerQuantizer
from quantlab.calibration.tokens import TokenWindows, calibration_windows, evaluation_windows, load_tokenizer
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.linears import find_linears, require_quantizable, weight_of
from quantlab.engine.solve import SolveOptions
from quantlab.engine.stream import StreamResult, quantize_model
from quantlab.errors import ModelError, QualityError, RecipeError, UsageError
from quantlab.evaluate.perplexity import perplexity
from quantlab.models import model_label, resolve_model
from quantlab.progress import NoProgress, Progress
from quantlab.recipe import LoadedRecipe, Recipe, check_method, dump_recipe, load_recipe
from quantlab.report.markdown import write_markdown
from quantlab.skeleton import build_skeleton, find_blocks, load_model, read_config, weight_files

MODEL_FOLDER = "model"

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, known before any weight is read."""

    architecture: str
    num_blocks: int
    num_layers: int
    parameters: int
    quantized_parameters: int
    bits: int
    group_size: int | None
    calibration_tokens: int
    largest_hessian_bytes: int
    source_bytes: int

    def rows(self) -> list[tuple[str, str]]:
        """The plan for display, as (what, value)."""
        share = self.quantized_parameters / self.parameters
        return [
            ("architecture", self.architecture),
            ("decoder blocks", str(self.num_blocks)),
            ("layers to quantize", str(self.num_layers)),
            ("parameters", f"{self.parameters:,} ({share:.1%} quantized)"),
            ("bits", str(self.bits)),
            ("codebooks", "per row" if self.group_size is None else f"per group of {self.group_size}"),
            ("calibration tokens", f"{self.calibration_tokens:,}"),
            ("largest Hessian", f"{self.largest_hessian_bytes / 2**20:.1f} MiB"),
            ("size of the source weights", f"{self.source_bytes / 2**20:.1f} MiB"),
        ]


def plan_run(recipe: Recipe, model_folder: Path) -> Plan:
    """Examine recipe and model together without reading weights.

    Raises:
        ModelError: the model cannot be streamed.
        RecipeError: recipe and model do not fit together.
    """
    config = read_config(model_folder)
    _require_fitting_windows(recipe, config)
    _require_separate_texts(recipe)
    model = build_skeleton(config, _compute_dtype(recipe, config))
    prefix, blocks = find_blocks(model)
    shapes = []
    for index, block in enumerate(blocks):
        require_quantizable(block, f"{prefix}.{index}")
        for name, linear in find_linears(block).items():
            shapes.append(tuple(weight_of(linear).shape))
            _require_fitting_groups(recipe, f"{prefix}.{index}.{name}", shapes[-1][1])
    return Plan(
        architecture=type(model).__name__,
        num_blocks=len(blocks),
        num_layers=len(shapes),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantized_parameters=sum(math.prod(shape) for shape in shapes),
        bits=recipe.method.bits,
        group_size=recipe.method.group_size,
        calibration_tokens=recipe.calibration.num_samples * recipe.calibration.sequence_length,
        largest_hessian_bytes=4 * max(shape[1] for shape in shapes) ** 2,
        source_bytes=sum(file.stat().st_size for file in weight_files(model_folder)),
    )


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
        calibration = run.timed("calibration_text", run.read_calibration)
        stream, files = run.timed("quantize", lambda: run.quantize(calibration))
        evaluation = run.timed("evaluate", lambda: run.evaluate(stream))
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
        self.dtype = _compute_dtype(recipe, self.config)
        self.tokenizer = load_tokenizer(model_folder)
        self.started = time.monotonic()
        self.stages_s: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[[], Result]) -> Result:
        """Do the work and note how long it took."""
        start = time.monotonic()
        result = work()
        self.stages_s[stage] = round(time.monotonic() - start, 3)
        return result

    def read_calibration(self) -> TokenWindows:
        """The token windows that layers are calibrated on."""
        section = self.recipe.calibration
        return calibration_windows(
            self.tokenizer, section.name, section.num_samples, section.sequence_length, self.recipe.seed
        )

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

    def evaluate(self, stream: StreamResult) -> dict[str, Any]:
        """Perplexity of the float and of the reloaded quantized model on every corpus of the recipe."""
        section = self.recipe.evaluation
        corpora = [
            evaluation_windows(self.tokenizer, name, section.sequence_length, section.num_windows)
            for name in section.perplexity
        ]
        quantized = self._perplexities("quantized", lambda: self._reload(stream), corpora)
        reference = self._perplexities("float", lambda: load_model(self.model_folder, self.dtype), corpora)
        return {
            "perplexity": {
                corpus.source: {
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

    def _perplexities(
        self, label: str, load_model: Callable[[], PreTrainedModel], corpora: list[TokenWindows]
    ) -> list[float]:
        model = load_model()
        values = []
        for corpus in corpora:
            self.progress.begin(f"perplexity of the {label} model on {corpus.source}", corpus.ids.shape[0], "windows")
            values.append(perplexity(model, corpus.ids, self.progress))
        del model
        gc.collect()  # one model in memory at a time
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
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.replace(output_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _compute_dtype(recipe: Recipe, config: PretrainedConfig) -> torch.dtype:
    """The dtype a recipe asks for; "auto" is that of the source model."""
    if recipe.model.dtype == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype: torch.dtype = getattr(torch, recipe.model.dtype)
    return dtype


def _options(quantizer: LayerQuantizer) -> dict[str, Any]:
    return asdict(cast(Any, quantizer))  # the registry admits dataclasses only


def _require_fitting_windows(recipe: Recipe, config: PretrainedConfig) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    sections = {"calibration": recipe.calibration.sequence_length, "evaluation": recipe.evaluation.sequence_length}
    for section, length in sections.items():
        if limit is not None and length > limit:
            raise RecipeError(
                f"{section}.sequence_length={length} is longer than the model's context of {limit} tokens; "
                f"use --set {section}.sequence_length={limit} or less"
            )


def _require_separate_texts(recipe: Recipe) -> None:
    shared = recipe.calibration.name
    if shared.startswith("file:") and shared in recipe.evaluation.perplexity:
        raise RecipeError(
            f"calibration and evaluation both read {shared}; evaluate on text that the method has not seen"
        )


def _require_fitting_groups(recipe: Recipe, layer: str, in_features: int) -> None:
    size = recipe.method.group_size
    if size is not None and in_features % size:
        raise ModelError(
            f"{layer}: in_features={in_features} is not a multiple of method.group_size={size}; "
            "choose a divisor, or group_size: null for one codebook per row"
        )


def _peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
