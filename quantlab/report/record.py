"""Reading the two records of a finished run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.checkpoint.names import MANIFEST_NAME
from quantlab.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        manifest: content of manifest.json: model, method, storage, timings, layers, provenance.
        perplexity: by protocol, what `quantlab.evaluate.perplexity.measure_pair` returns.
        tasks: by task, what `quantlab.evaluate.harness.compare_on_tasks` returns.
        layer_errors: what `quantlab.evaluate.evaluation.evaluate_layers` returns, if that was asked for.
    """

    manifest: dict[str, Any]
    perplexity: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    layer_errors: dict[str, Any] | None = None

    def mean_accuracy(self, model: str) -> float | None:
        """The mean accuracy over the tasks that have one, as papers report it; None without such tasks.

        Args:
            model: "float" or "quantized".
        """
        values = [task[model]["acc"]["value"] for task in self.tasks.values() if "acc" in task[model]]
        return sum(values) / len(values) if values else None

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
        UsageError: the folder is not that of a finished run.
    """
    manifest, evaluation = (_read(run_folder / name) for name in (MANIFEST_NAME, "eval.json"))
    return RunRecord(
        manifest=manifest,
        perplexity=evaluation["perplexity"],
        tasks=evaluation.get("tasks", {}),
        layer_errors=evaluation.get("layers"),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path.parent} is not the folder of a finished run: cannot read {path.name}: {error}"
        ) from error
    return content
