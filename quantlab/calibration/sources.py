"""Text by name: the standard library, a file, or a prepared corpus."""

from pathlib import Path

from quantlab.calibration.corpora import CORPORA, Split
from quantlab.calibration.prepared import prepared_corpora, read_split
from quantlab.calibration.stdlib import read_documents
from quantlab.errors import DataError, did_you_mean

FILE_PREFIX = "file:"


def source_error(name: str) -> str | None:
    """What is wrong with the name of a source, or None; says nothing about whether it can be read."""
    if name.startswith(FILE_PREFIX):
        return None if name != FILE_PREFIX else "is 'file:'; add the path of a text file, for example file:notes.txt"
    known = ["stdlib", *CORPORA, *prepared_corpora()]
    if name in known:
        return None
    hint = did_you_mean(name, known)
    return (
        f"is {name!r}{hint}; there are {', '.join(dict.fromkeys(known))}, text files such as file:notes.txt, and what "
        "`quantlab data prepare` makes"
    )


def protocol_error(name: str) -> str | None:
    """What is wrong with the name of a text to evaluate on, or None: a protocol of the literature, or a source."""
    protocols = [protocol for corpus in CORPORA.values() for protocol in corpus.protocols]
    if name in protocols:
        return None
    error = source_error(name)
    return None if error is None else f"{error}; evaluation also knows {', '.join(protocols)}"


def load_documents(name: str, split: Split) -> list[str]:
    """The documents of a source, in a fixed order.

    A file is one document and has no splits of its own; use different files for calibration and evaluation.

    Raises:
        DataError: the source is unknown, not prepared, unreadable or empty.
    """
    error = source_error(name)
    if error is not None:
        raise DataError(f"the text source {error}")
    if name.startswith(FILE_PREFIX):
        return [_read_file(Path(name.removeprefix(FILE_PREFIX)).expanduser())]
    if name == "stdlib":
        return list(read_documents(split).values())
    return read_split(name, split)


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
