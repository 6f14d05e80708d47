"""The bundled text: the Python standard library of the running interpreter.

Every Python installation carries some ten megabytes of source code with documentation strings, and the
language reference as prose (`pydoc_data.topics`). Reading it at run time gives every user a calibration and
a held-out corpus without a download and without shipping a word of text.

Whole documents are held out, chosen by a hash of their name, so that no text is on both sides and the split
does not depend on the order of files or on the Python version.
"""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from quantlab.calibration.corpora import Split
from quantlab.errors import DataError

HELD_OUT_ONE_IN = 16

# Test packages say little in natural code; `encodings` is generated tables; `site-packages` is not the
# standard library. `pydoc_data` is read as prose below.
_SKIPPED_FOLDERS = frozenset({"encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests", "__pycache__"})


def is_held_out(name: str) -> bool:
    """Whether the document of this name belongs to the held-out split."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def read_documents(split: Split) -> dict[str, str]:
    """The documents of one split, name to text, ordered by name; what is held out makes up the test split.

    Raises:
        DataError: the interpreter has no readable standard library sources.
    """
    documents = {
        name: text
        for name, read in (*_modules(), *_topics())
        if is_held_out(name) == (split == "test") and (text := read()).strip()
    }
    if not documents:
        raise DataError(
            f"the standard library at {_library_folder()} has no readable .py sources; "
            "use a Python installation with sources, or calibrate and evaluate on `file:PATH`"
        )
    return dict(sorted(documents.items()))


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> Iterator[tuple[str, Callable[[], str]]]:
    """Names of modules, and how to read their sources."""
    root = _library_folder()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS  # `site-packages` can be larger than the library itself
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                yield ".".join(path.relative_to(root).with_suffix("").parts), partial(_read_source, path)


def _read_source(path: Path) -> str:
    """The text of a module; nothing if it is not valid Python, as files added by a distribution may be."""
    try:
        with tokenize.open(path) as source:  # honours the file's own coding line
            return source.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _topics() -> Iterator[tuple[str, Callable[[], str]]]:
    """Names of the topics of the language reference, and how to read them."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield f"pydoc_data.topics:{topic}", partial(str, text)
