"""The runs that a page is about, read from their folders and checked for what the sections need."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.compare import CELLS, COMMANDS, FAILURE_SUFFIX
from quantlab.errors import UsageError
from quantlab.report.layer_errors import by_role
from quantlab.report.markdown import provenance
from quantlab.report.record import RunRecord, read_record

_CELL = re.compile(r"(?P<variant>.+)-w(?P<bits>\d+)-s(?P<seed>\d+)")
_INTEGER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a manifest says about one quantized layer.

    Attributes:
        name: in the model.
        bits: code width.
        relative_loss: of the method.
        rtn_relative_loss: of round-to-nearest at the same budget.
        num_tokens: calibration tokens behind its Hessian; None in a manifest without them.
        in_features: width of its input; None in a manifest without shapes.
        diagnostics: numbers that the method reported.
    """

    name: str
    bits: int
    relative_loss: float
    rtn_relative_loss: float
    num_tokens: int | None = None
    in_features: int | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Its loss as a multiple of round-to-nearest's; NaN where that is zero."""
        return self.relative_loss / self.rtn_relative_loss if self.rtn_relative_loss else math.nan

    @property
    def block(self) -> int | None:
        """Number of its decoder block, the first number in its name."""
        numbers = [part for part in self.name.split(".") if _INTEGER.fullmatch(part)]
        return int(numbers[0]) if numbers else None

    @property
    def linear(self) -> str:
        """Its name inside the block; the numbers of experts become "*"."""
        parts = self.name.split(".")
        first = next((index for index, part in enumerate(parts) if _INTEGER.fullmatch(part)), -1)
        return ".".join("*" if _INTEGER.fullmatch(part) else part for part in parts[first + 1 :])


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        folder: its folder.
        label: its name on the page, different from that of every other run there.
        variant: what shares a colour and a marker in the plots.
        record: its two files as they are.
        layers: its layers, typed.
    """

    folder: Path
    label: str
    variant: str
    record: RunRecord
    layers: tuple[Layer, ...]

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of manifest.json."""
        return self.record.manifest

    @property
    def model(self) -> str:
        """The model as the recipe names it."""
        return str(self.manifest["model"]["path"])


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell of a comparison without a result.

    Attributes:
        label: its name.
        reason: why, in the words of the error.
    """

    label: str
    reason: str


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Failure]]:
    """The runs in some folders, each that of a run or of a comparison, whose runs come in order of merit.

    Raises:
        UsageError: a folder is neither, a file in it cannot be read or lacks something, or no run is finished.
    """
    runs: list[Run] = []
    failures: list[Failure] = []
    for folder in dict.fromkeys(folders):
        if (folder / CELLS).is_dir():
            cells = [_read_run(path.parent) for path in sorted((folder / CELLS).glob(f"*/{MANIFEST_NAME}"))]
            runs += sorted(cells, key=_place)
            failures += [_read_failure(path) for path in sorted((folder / CELLS).glob(f"*{FAILURE_SUFFIX}"))]
        else:
            runs.append(_read_run(folder))
    if not runs:
        raise UsageError(f"no run is finished in {', '.join(map(str, folders))}; `quantlab compare` continues them")
    return _with_distinct_labels(runs), failures


def _place(run: Run) -> tuple[int, float]:
    """Wide codes first, and at the same width what is closest to the float model."""
    divergences = (values.get("kl") for values in run.record.perplexity.values())
    known = next((float(value) for value in divergences if isinstance(value, int | float)), math.inf)
    return -int(run.manifest["bits"]), known


def find_commands(folders: Sequence[Path]) -> list[str]:
    """The command lines that made the comparisons among some folders.

    Raises:
        UsageError: a file cannot be read.
    """
    commands: list[str] = []
    for path in (folder / COMMANDS for folder in dict.fromkeys(folders)):
        try:
            commands += path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
    return list(dict.fromkeys(commands))


def _read_run(folder: Path) -> Run:
    try:
        record = read_record(folder)
        _require_numbers(record)
        layers = tuple(_layers(record.manifest["layers"]))
        label = record.label
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{folder} has a record that this version of quantlab cannot show: {problem}") from error
    cell = _CELL.fullmatch(folder.name) if folder.parent.name == CELLS else None
    if cell is None:
        return Run(folder=folder, label=label, variant=record.manifest["method"]["name"], record=record, layers=layers)
    return Run(
        folder=folder,
        label=f"{cell['variant']} {record.manifest['bits']}-bit",
        variant=cell["variant"],
        record=record,
        layers=layers,
    )


def _require_numbers(record: RunRecord) -> None:
    """Raise KeyError, TypeError or ValueError for what every section relies on."""
    manifest = record.manifest
    for name in ("source_bytes", "checkpoint_bytes", "bits_per_weight", "bits", "peak_rss_bytes", "wall_s"):
        _number(manifest[name], name)
    for name in ("parameters", "quantized_parameters"):
        _number(manifest["model"][name], f"model.{name}")
    for stage, seconds in manifest["stages_s"].items():
        _number(seconds, f"stages_s.{stage}")
    for part, seconds in manifest.get("engine_s", {}).items():
        _number(seconds, f"engine_s.{part}")
    if "memory" in manifest:
        memory = manifest["memory"]
        sizes = {name: memory[name] for name in ("expected_peak_bytes", "quantize_peak_rss_bytes")}
        budget = {} if memory["budget_bytes"] is None else {"budget_bytes": memory["budget_bytes"]}
        for name, size in {**sizes, **budget, **memory["parts"]}.items():
            _number(size, f"memory.{name}")
        _require_timeline(memory.get("timeline", {}))
    _ = manifest["stages_s"]["quantize"], provenance(record)
    for name, mapping in (("method.options", manifest["method"]["options"]), ("versions", manifest["versions"])):
        if not isinstance(mapping, dict):
            raise TypeError(f"{name} must be an object")
    if record.layer_errors is not None:
        by_role(record.layer_errors["layers"])
        for text in record.layer_errors["texts"].values():
            _ = text["source"], _number(text["windows"], "layers: windows"), text["sequence_length"]
    if not isinstance(manifest["files"], dict) or not isinstance(manifest["fallbacks"], list):
        raise TypeError("files must be an object, and fallbacks a list")
    if not isinstance(manifest["method"]["name"], str) or not isinstance(manifest["command"], str):
        raise TypeError("method.name and command must be texts")
    for model in ("float", "quantized"):
        _ = record.tokens_per_s(model)
        _number(record.mean_accuracy(model) or 0.0, "tasks: accuracy")
    for text, values in record.perplexity.items():
        for name in ("float", "quantized", "windows", "sequence_length"):
            _number(values[name], f"perplexity.{text}.{name}")


def _require_timeline(timeline: Mapping[str, Any]) -> None:
    if not timeline:
        return
    if _number(timeline["interval_s"], "memory.timeline.interval_s") <= 0:
        raise ValueError(f"memory.timeline.interval_s is {timeline['interval_s']}")
    for size in timeline["bytes"]:
        _number(size, "memory.timeline.bytes")
    for stage, start_s in timeline["stages"].items():
        _number(start_s, f"memory.timeline.stages.{stage}")


def _layers(entries: Sequence[Mapping[str, Any]]) -> Iterator[Layer]:
    for entry in entries:
        yield Layer(
            name=str(entry["name"]),
            bits=int(entry["bits"]),
            relative_loss=_number(entry["relative_loss"], "relative_loss"),
            rtn_relative_loss=_number(entry["rtn_relative_loss"], "rtn_relative_loss"),
            num_tokens=int(_number(entry["num_tokens"], "num_tokens")) if "num_tokens" in entry else None,
            in_features=int(_number(entry["shape"][1], "shape")) if "shape" in entry else None,
            diagnostics={name: _number(value, name) for name, value in entry.get("diagnostics", {}).items()},
        )


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r:.40}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    return value


def _read_failure(path: Path) -> Failure:
    label = path.name.removesuffix(FAILURE_SUFFIX)
    try:
        return Failure(label=label, reason=str(json.loads(path.read_text(encoding="utf-8"))["reason"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _with_distinct_labels(runs: Sequence[Run]) -> list[Run]:
    """Tell runs of the same label apart by seed, by folder, and if need be by their position."""
    labels = [run.label for run in runs]
    for detail in (
        lambda run: f"seed {run.manifest.get('seed', 0)}",
        lambda run: run.folder.name,
        lambda run: f"no. {runs.index(run) + 1}",
    ):
        repeated = {label for label in labels if labels.count(label) > 1}
        distinguishing = {
            label: len({detail(run) for run, own in zip(runs, labels, strict=True) if own == label}) > 1
            for label in repeated
        }
        labels = [
            f"{label}, {detail(run)}" if distinguishing.get(label) else label
            for run, label in zip(runs, labels, strict=True)
        ]
    return [
        Run(folder=run.folder, label=label, variant=run.variant, record=run.record, layers=run.layers)
        for run, label in zip(runs, labels, strict=True)
    ]
