"""Prepared corpora: text in one local, hashed format, so that results do not depend on where it came from.

A corpus is a folder below `data_home()`: `corpus.json` says what it is, and each split is a file of JSON lines,
one document `{"text": ...}` per line.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.calibration.corpora import CORPORA, Split
from quantlab.checkpoint.atomic import replacing
from quantlab.errors import DataError

FORMAT_VERSION = 1
HOME_VARIABLE = "QUANTLAB_DATA"
_DESCRIPTION = "corpus.json"


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """One split of a prepared corpus.

    Attributes:
        documents: how many there are.
        characters: their total length.
        sha256: of the file.
        origin: what it was made from, for the record.
    """

    documents: int
    characters: int
    sha256: str
    origin: str


def data_home() -> Path:
    """The folder of all prepared corpora: $QUANTLAB_DATA, or quantlab/data in the user's cache."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "quantlab" / "data"


def prepared_corpora() -> list[str]:
    """Names of the corpora that are ready to be read."""
    return sorted(path.parent.name for path in data_home().glob(f"*/{_DESCRIPTION}"))


def prepared_splits(name: str) -> dict[Split, PreparedSplit]:
    """The splits of a corpus that are ready to be read.

    Raises:
        DataError: the description of the corpus is damaged.
    """
    path = data_home() / name / _DESCRIPTION
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version is {content['format_version']}, this quantlab reads {FORMAT_VERSION}; "
                f"prepare the corpus again with `quantlab data prepare {name}`"
            )
        return {split: PreparedSplit(**values) for split, values in content["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove {path.parent} and prepare the corpus again"
        ) from error


def write_split(name: str, split: Split, documents: Iterable[str], origin: str) -> PreparedSplit:
    """Add a split to a prepared corpus, or replace it.

    Raises:
        DataError: there is no text in it.
    """
    folder = data_home() / name
    known = prepared_splits(name)
    folder.mkdir(parents=True, exist_ok=True)
    digest, count, characters = hashlib.sha256(), 0, 0
    with replacing(_split_file(name, split)) as path:
        with path.open("wb") as file:
            for text in documents:
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
                count += 1
                characters += len(text)
        if not characters:
            raise DataError(f"{origin} contains no text")
    written = PreparedSplit(documents=count, characters=characters, sha256=digest.hexdigest(), origin=origin)
    splits = {key: asdict(value) for key, value in sorted({**known, split: written}.items())}
    with replacing(folder / _DESCRIPTION) as path:
        path.write_text(json.dumps({"format_version": FORMAT_VERSION, "name": name, "splits": splits}, indent=2) + "\n")
    return written


def read_split(name: str, split: Split) -> list[str]:
    """The documents of a split of a prepared corpus.

    Raises:
        DataError: the corpus or the split is not there, or its file was changed.
    """
    splits = prepared_splits(name)
    if split not in splits:
        found = f"only its splits {', '.join(splits)} are" if splits else "it is not"
        raise DataError(f"the {split} split of {name} is needed, but {found} prepared on this machine\n{_advice(name)}")
    path = _split_file(name, split)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; prepare the corpus again") from error
    if hashlib.sha256(content).hexdigest() != splits[split].sha256:
        raise DataError(f"{path} is not the file that was prepared: its hash differs; prepare the corpus again")
    return [json.loads(line)["text"] for line in content.splitlines()]


def _split_file(name: str, split: Split) -> Path:
    return data_home() / name / f"{split}.jsonl"


def _advice(name: str) -> str:
    corpus = CORPORA.get(name)
    if corpus is None:
        return f"  run `quantlab data prepare {name} --from PATH` with your text, JSONL or parquet files"
    with_network = f"  with network: `quantlab data prepare {name}`\n" if corpus.hub_id else ""
    return (
        f"{with_network}  without: bring {corpus.by_hand} in a folder, then "
        f"`quantlab data prepare {name} --from FOLDER`"
    )
