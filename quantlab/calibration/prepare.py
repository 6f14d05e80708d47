"""Turning corpora from the hub, or local text, JSONL and parquet files, into the prepared format."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from quantlab.calibration.corpora import CORPORA, Corpus, Split
from quantlab.calibration.prepared import PreparedSplit, write_split
from quantlab.errors import DataError, UsageError

_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
_TEXT = frozenset({".txt", ".raw", ".tokens", ".md", ".py"})
_JSON = frozenset({".json", ".jsonl", ".ndjson"})
_PARQUET = frozenset({".parquet"})


def prepare(
    name: str, source: Path | None = None, *, split: Split | None = None, columns: Sequence[str] = ()
) -> dict[Split, PreparedSplit]:
    """Prepare a corpus.

    Args:
        name: one of `CORPORA`, or a name of your own.
        source: a file, or a folder of files; None downloads from the hub.
        split: which split the source is; None reads it from the names of the files.
        columns: fields of JSON and parquet documents that make up the text, joined without a separator; none means
            "text".

    Returns:
        What was prepared, by split.

    Raises:
        DataError: a file cannot be read or contains no text; the hub cannot be reached.
        UsageError: the corpus is unknown and no source is given, or the splits cannot be told apart.
    """
    corpus = CORPORA.get(name)
    if source is not None:
        return _from_files(name, corpus, source, split, columns or ("text",))
    if corpus is None or not corpus.hub_id:
        by_hand = f"; bring {corpus.by_hand}" if corpus else ""
        raise UsageError(f"{name} is not on the hub in a format that can be read without running code{by_hand} "
                         f"and run `quantlab data prepare {name} --from PATH`")  # fmt: skip
    return {part: write_split(name, part, _from_hub(corpus, part), f"hub:{corpus.hub_id}") for part in corpus.splits}


def _from_hub(corpus: Corpus, split: Split) -> Iterator[str]:
    import datasets  # takes seconds to import, and local files need it never

    files = {split: corpus.hub_files[split]} if corpus.hub_files else None
    try:
        rows = datasets.load_dataset(corpus.hub_id, corpus.hub_config, data_files=files, split=split)
    except Exception as error:  # the library's errors have no common base: network, cache, repository
        raise DataError(
            f"cannot get {corpus.hub_id} from the hub ({type(error).__name__}: {error})\n"
            f"  without network: bring {corpus.by_hand} and name the folder with --from"
        ) from error
    for row in rows:
        yield row["text"]


def _from_files(
    name: str, corpus: Corpus | None, source: Path, split: Split | None, columns: Sequence[str]
) -> dict[Split, PreparedSplit]:
    files: dict[Split, list[Path]] = {}
    for file in _files_of(source):
        files.setdefault(split or _split_of(file), []).append(file)

    def documents(paths: list[Path]) -> Iterator[str]:
        for path in paths:
            yield from _read(path, columns, per_line=corpus is not None and corpus.one_document_per_line)

    return {
        part: write_split(name, part, documents(paths), ", ".join(path.name for path in paths))
        for part, paths in files.items()
    }


def _files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    known = _TEXT | _JSON | _PARQUET
    files = sorted(path for path in source.rglob("*") if path.is_file() and _suffix(path) in known)
    if not files:
        raise DataError(
            f"{source} is no file and no folder with text, JSONL or parquet files ({', '.join(sorted(known))})"
        )
    return files


def _split_of(file: Path) -> Split:
    found = {split for word, split in _SPLIT_WORDS.items() if word in file.name.lower()}
    if len(found) != 1:
        raise UsageError(
            f"cannot tell from its name which split {file} is; say so with --split train, validation or test"
        )
    return found.pop()


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read(path: Path, columns: Sequence[str], per_line: bool) -> Iterator[str]:
    suffix = _suffix(path)
    read: Callable[[Path], Iterable[Any]] = _read_text
    if suffix in _JSON:
        read = _read_json
    elif suffix in _PARQUET:
        read = _read_parquet
    elif suffix not in _TEXT:
        raise DataError(f"{path}: files of type {suffix or '(none)'} are not read; use .txt, .jsonl or .parquet")
    try:
        for row in read(path):
            if suffix not in _TEXT:
                yield row if isinstance(row, str) else "".join(row[column] for column in columns)
            elif per_line:
                # As published: a line keeps its end, and a line of nothing but spaces is an empty document.
                yield from (line if line.strip() else "" for line in row.splitlines(keepends=True))
            else:
                yield row
    except KeyError as error:
        raise DataError(
            f"{path}: a document has no field {error}; name the fields of the text with --column"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as {suffix.removeprefix('.')}: {error}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_text(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield file.read()


def _read_json(path: Path) -> Iterator[Any]:
    """A list of documents, or one document per line."""
    with _open(path) as file:
        start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from json.load(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet  # comes with `datasets`; takes half a second to import

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()
