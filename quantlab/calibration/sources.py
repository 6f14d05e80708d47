"""Named text sources: `stdlib`, the standard library of the running Python, and `file:PATH`, a text file."""

from pathlib import Path

from quantlab.calibration.stdlib import Split, read_documents
from quantlab.errors import DataError

FILE_PREFIX = "file:"


def source_error(name: str) -> str | None:
    """What is wrong with the name of a source, or None; says nothing about whether it can be read."""
    if name == "stdlib" or (name.startswith(FILE_PREFIX) and name != FILE_PREFIX):
        return None
    return f"is {name!r}; the text sources are stdlib and file:PATH, for example file:notes.txt"


def load_documents(name: str, split: Split) -> list[str]:
    """The documents of a source, in a fixed order.

    A file is one document and has no splits of its own; use different files for calibration and evaluation.

    Raises:
        DataError: the source is unknown, missing, unreadable or empty.
    """
    error = source_error(name)
    if error is not None:
        raise DataError(f"the text source {error}")
    if name.startswith(FILE_PREFIX):
        return [_read_file(Path(name.removeprefix(FILE_PREFIX)).expanduser())]
    return list(read_documents(split).values())


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    if not text.strip():
        raise DataError(f"{path} contains no text")
    return text
