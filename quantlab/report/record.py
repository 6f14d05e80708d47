"""Reading the two records of a finished run."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.checkpoint.names import EVALUATION_NAME, MANIFEST_NAME, PROFILE_FILE
from quantlab.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        folder: of the run.
        manifest: content of manifest.json: model, method, storage, timings, layers, provenance.
        perplexity: by protocol, what `quantlab.evaluate.perplexity.measure_pair` returns.
        tasks: by task, what `quantlab.evaluate.harness.side_by_side` returns.
        profile: what `quantlab.evaluate.profile.profile_subjects` returned for it; None if it was not measured.
        layer_errors: what `quantlab.evaluate.evaluation.evaluate_layers` returns, if that was asked for.
    """

    folder: Path
    manifest: dict[str, Any]
    perplexity: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    layer_errors: dict[str, Any] | None = None

    @property
    def quantizing_s(self) -> dict[str, float]:
        """Seconds of quantizing by part of the engine's work, and what no part accounts for as "other"."""
        parts: dict[str, float] = self.manifest.get("engine_s", {})
        return {**parts, "other": max(0.0, self.manifest["stages_s"]["quantize"] - sum(parts.values()))}

    def mean_accuracy(self, model: str) -> float | None:
        """The mean accuracy over the tasks that have one, as papers report it; None without such tasks.

        Args:
            model: "float" or "quantized".
        """
        values = [task[model]["acc"]["value"] for task in self.tasks.values() if "acc" in task[model]]
        return sum(values) / len(values) if values else None

    def accuracy_error(self, model: str) -> float:
        """Standard error of the mean accuracy over the questions; NaN if that of a task is not known.

        Args:
            model: "float" or "quantized".
        """
        errors = [task[model]["acc"]["standard_error"] for task in self.tasks.values() if "acc" in task[model]]
        return math.hypot(*errors) / len(errors) if errors and None not in errors else math.nan

    def tokens_per_s(self, model: str) -> float:
        """Speed of generation; NaN if it was not measured.

        Args:
            model: "float" or "quantized".

        Raises:
            UsageError: the profile is damaged.
        """
        if self.profile is None:
            return math.nan
        try:
            models = self.profile["models"]
            measured = models.get(self.manifest["model"]["path"]) if model == "float" else [*models.values()][-1]
            return math.nan if measured is None else float(measured["tokens_per_s"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise damaged_profile(self.folder, error) from error

    @property
    def label(self) -> str:
        """Method and width, for example "ganq 4-bit" or "rtn 4-bit g128"."""
        group = self.manifest["group_size"]
        suffix = "" if group is None else f" g{group}"
        return f"{self.manifest['method']['name']} {self.manifest['bits']}-bit{suffix}"

    @property
    def source_bits_per_weight(self) -> float:
        """Stored bits per parameter of the float model; file headers, below 2 %, are not counted."""
        bits = 8 * self.manifest["source_bytes"] / self.manifest["model"]["parameters"]
        nominal = min((8, 16, 32, 64), key=lambda width: abs(width - bits))
        return nominal if abs(bits / nominal - 1) < 0.02 else bits


def read_record(run_folder: Path) -> RunRecord:
    """Read the records of a run.

    Raises:
        UsageError: the folder is not that of a finished run, or its profile is damaged.
    """
    manifest, evaluation = (_read(run_folder / name) for name in (MANIFEST_NAME, EVALUATION_NAME))
    return RunRecord(
        folder=run_folder,
        manifest=manifest,
        perplexity=evaluation["perplexity"],
        tasks=evaluation.get("tasks", {}),
        profile=_read_profile(run_folder),
        layer_errors=evaluation.get("layers"),
    )


def damaged_profile(run_folder: Path, error: Exception) -> UsageError:
    """What to say if the profile of a run is not as it was written."""
    return UsageError(
        f"cannot read {run_folder / PROFILE_FILE}: {error}; `quantlab profile {run_folder}` writes it anew"
    )


def _read_profile(run_folder: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((run_folder / PROFILE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise damaged_profile(run_folder, error) from error
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path.parent} is not the folder of a finished run: cannot read {path.name}: {error}"
        ) from error
    return content
