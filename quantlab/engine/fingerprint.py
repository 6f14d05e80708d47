"""What a run depends on, so that an unfinished run is only continued as the run that it was."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError
from quantlab.skeleton import weight_files

SAMPLES_PER_FILE = 256
SAMPLE_BYTES = 1 << 16

Fingerprint = Mapping[str, Any]


def recipe_fingerprint(recipe: Any) -> dict[str, Any]:
    """Every value of a recipe by its path, such as "method.bits", in a form that JSON keeps as it is.

    Where hidden states are kept is left out: it has no influence on the result.
    """
    values: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{path}.{key}" if path else key, child)
        else:
            values[path] = list(value) if isinstance(value, tuple) else value

    visit("", dataclasses.asdict(recipe))
    del values["engine.activations"]
    return values


def source_fingerprint(folder: Path) -> dict[str, str]:
    """A hash of config.json and of each weight file of a model folder.

    Of a weight file the header, the size and evenly spread samples are hashed, all of it up to 16 MiB: reading a
    model of 140 GB in full would delay every start by minutes.
    """
    files = [folder / "config.json", *weight_files(folder)]
    return {f"weights.{file.name}": _sampled_sha256(file) for file in files}


def require_same_run(recorded: Fingerprint, current: Fingerprint, folder: Path) -> None:
    """Refuse to continue a run as another one.

    Raises:
        UsageError: naming every difference.
    """
    different = sorted(key for key in recorded.keys() | current.keys() if recorded.get(key) != current.get(key))
    if different:
        changes = "\n".join(f"  {key}: was {recorded.get(key)!r}, is {current.get(key)!r}" for key in different)
        raise UsageError(
            f"{folder} holds an unfinished run that differs from this one in\n{changes}\n"
            "  Continue with what it was started with, choose another --output-dir, or remove the folder to start anew"
        )


def require_same_recipe(recorded: Fingerprint, recipe: Any, folder: Path) -> None:
    """Refuse to take a run for that of another recipe, whatever else has changed since.

    Raises:
        UsageError: naming every difference.
    """
    current = recipe_fingerprint(recipe)
    require_same_run({key: recorded.get(key) for key in current}, current, folder)


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(0)
        digest.update(file.read(min(8 + header_bytes, SAMPLES_PER_FILE * SAMPLE_BYTES)))
        step = max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
