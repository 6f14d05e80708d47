"""The page of a run, `report.md`: verdict, table, layers, provenance, and the command that repeats it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.report.record import RunRecord, read_record
from quantlab.report.summary import profile_line, summary_rows, verdict
from quantlab.report.units import format_bytes, format_count, format_duration

FILE_NAME = "report.md"

_MARKUP = re.compile(r"[\\`*<>|\[\]]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is none


def write_markdown(run_folder: Path) -> Path:
    """Write `report.md` into a run folder from its `manifest.json` and `eval.json`.

    Returns:
        The file.

    Raises:
        UsageError: the folder is not that of a finished run.
    """
    path = run_folder / FILE_NAME
    path.write_text(render_markdown(read_record(run_folder)), encoding="utf-8")
    return path


def render_markdown(record: RunRecord) -> str:
    """The page as Markdown text."""
    model = record.manifest["model"]
    header, *rows = summary_rows(record)
    sections = [
        f"# {_escape(record.label)} on {_escape(model['path'])}",
        _escape(verdict(record)),
        _table(header, rows),
        "## Layers",
        "Relative loss is tr(E H Eᵀ) / tr(W H Wᵀ): the squared error of the layer's output as a share of the output "
        "itself, on the calibration text. The last column compares it with round-to-nearest at the same bits.",
        _layers(record.manifest["layers"]),
        *_fallbacks(record.manifest["fallbacks"]),
        "## Provenance",
        _table(["what", "value"], provenance(record)),
        "## Repeat this run",
        "\n".join(f"    {line}" for line in record.manifest["command"].splitlines()),
    ]
    return "\n\n".join(sections) + "\n"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for layer in layers:
        loss, baseline = layer["relative_loss"], layer["rtn_relative_loss"]
        ratio = f"{loss / baseline:.3f}" if baseline else "–"
        rows.append([layer["name"], str(layer["bits"]), f"{loss:.3e}", f"{baseline:.3e}", ratio])
    return _table(["layer", "bits", "relative loss", "round-to-nearest", "ratio"], rows)


def _device_memory(memory: Mapping[str, Any]) -> list[list[str]]:
    if not memory.get("device_peak_bytes"):
        return []
    expected = format_bytes(memory["expected_device_peak_bytes"])
    return [["peak GPU memory", f"{format_bytes(memory['device_peak_bytes'])} of tensors, expected {expected} in all"]]


def _fallbacks(fallbacks: Sequence[object]) -> list[str]:
    return ["## Fallbacks", "\n".join(f"- {_escape(str(item))}" for item in fallbacks)] if fallbacks else []


def provenance(record: RunRecord) -> list[list[str]]:
    """What a run was made of and with: names with their values."""
    manifest = record.manifest
    model, method, calibration = manifest["model"], manifest["method"], manifest["calibration"]
    options = ", ".join(f"{name}={value}" for name, value in method["options"].items()) or "none"
    parameters = f"{format_count(model['parameters'])}, {format_count(model['quantized_parameters'])} quantized"
    text = (
        f"{calibration['name']}, {calibration['num_samples']} x {calibration['sequence_length']} tokens, "
        f"sha256 {calibration['token_sha256']}"
    )
    stages = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in manifest["stages_s"].items())
    return [
        ["model", f"{model['path']} ({model['architecture']})"],
        ["parameters", parameters],
        ["method", f"{method['name']} ({method['distribution']} {method['version']})"],
        ["options", options],
        ["calibration", text],
        *([f"evaluation {name}", _corpus(values)] for name, values in record.perplexity.items()),
        ["time", f"{format_duration(manifest['wall_s'])} in all; {stages}"],
        ["quantizing", profile_line(record)],
        ["peak memory", format_bytes(manifest["peak_rss_bytes"])],
        *_device_memory(manifest.get("memory", {})),
        ["versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())],
    ]


def _corpus(values: Mapping[str, Any]) -> str:
    return f"{values['windows']} x {values['sequence_length']} tokens, sha256 {values['token_sha256']}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)] if len(header) > 2 else ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: a model path must not become markup."""
    escaped = _MARKUP.sub(r"\\\g<0>", text)
    return " ".join(escaped.split())
