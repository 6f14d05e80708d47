"""JSON files and safetensors headers, read with suspicion.

Both are parsed here once more than their libraries do, because those accept an object that names a key twice and
keep the last value: what is checked must be what is used.
"""

import json
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

from quantlab.checkpoint.limits import MAX_JSON_BYTES
from quantlab.errors import CheckpointError

_LENGTH_BYTES: Final = 8
_DTYPES: Final = frozenset(
    {"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"}
)  # the rest of the safetensors types is never written


class TensorEntry(NamedTuple):
    """What the header of a shard says about one tensor.

    Attributes:
        dtype: the safetensors name, such as "F16".
        shape: of any number of dimensions.
    """

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, not an ordinary file, unreadable, too large, not a JSON object, or names
            a key twice.
    """
    require_ordinary(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB, the most that is read as JSON")
    return _parse(path, text)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """What a safetensors file says it holds, by tensor name; offsets are left to the library, which checks them.

    Raises:
        CheckpointError: it is not an ordinary file with a well-formed header.
    """
    require_ordinary(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path}: announces a header of {length} bytes; at most {MAX_JSON_BYTES} are read: "
                    "not a readable safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if len(text) < max(length, 2):
        raise CheckpointError(f"{path}: ends inside its header; not a readable safetensors file")
    header = _parse(path, text)
    header.pop("__metadata__", None)
    return {name: _entry(path, name, value) for name, value in header.items()}


def require_ordinary(path: Path) -> None:
    """Check that reading cannot block and that there is something to read.

    Raises:
        CheckpointError: the file is missing, or a folder, pipe or device.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; {path.parent} is not a complete quantlab checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not an ordinary file")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise CheckpointError(f"{path}: names {name!r} twice")
            content[name] = value
        return content

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}; expected a JSON object")
    return content


def _entry(path: Path, name: str, value: object) -> TensorEntry:
    dtype, shape = (value.get("dtype"), value.get("shape")) if isinstance(value, dict) else (None, None)
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise CheckpointError(f"{path}: the header describes tensor {name!r} as {str(value)[:200]!r}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} is of type {str(dtype)[:20]!r}; known are {sorted(_DTYPES)}")
    return TensorEntry(dtype, tuple(shape))
