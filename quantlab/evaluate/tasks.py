"""Zero-shot tasks over local files, in the layouts in which their data sets are published, and one built in.

Every document is brought into one of three shapes, which lm-eval scores without any code of its own:

- choices: `query`, `choices`, `gold`: which choice is likeliest after the query;
- contexts: `contexts`, `continuation`, `gold`: after which context is the continuation likeliest;
- cloze: `context`, `target`: is the target the greedy continuation.

The texts are those of lm-eval's own tasks of the same names, so that scores can be compared.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantlab.calibration.sources import load_documents
from quantlab.errors import DataError

BUILT_IN = "stdlib_continuation"

Document = Mapping[str, Any]
Shape = Literal["choices", "contexts", "cloze"]

_ITEMS = 200
_PASSAGES_PER_DOCUMENT = 8
_CONTEXT_CHARACTERS = 400
_CONTINUATION_CHARACTERS = (24, 120)
_CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the documents of a published data set look.

    Attributes:
        name: of the data set.
        fields: that tell it apart.
        shape: what the documents become.
        convert: one document to that shape.
    """

    name: str
    fields: frozenset[str]
    shape: Shape
    convert: Callable[[Document], Document]


def local_tasks(folder: Path) -> dict[str, list[Path]]:
    """The tasks of a folder, by name: files NAME.jsonl, and folders NAME with such files."""
    files = {path.stem: [path] for path in sorted(folder.glob("*.jsonl"))}
    folders = {path.name: sorted(path.glob("*.jsonl")) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {**files, **{name: paths for name, paths in folders.items() if paths}}


def write_task(name: str, paths: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Convert the files of a local task and describe it to lm-eval.

    Args:
        name: of the task.
        paths: its files.
        folder: where to put the converted documents.

    Returns:
        The task as a configuration of lm-eval.

    Raises:
        DataError: a file cannot be read, or has no known layout.
    """
    documents = [document for path in paths for document in _read_lines(path)]
    if not documents:
        raise DataError(f"{name}: {', '.join(map(str, paths))} contains no documents")
    layout = _layout_of(documents[0], paths[0])
    try:
        converted = [layout.convert(document) for document in documents]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"{name}: a document does not have the layout {layout.name} of the first one ({type(error).__name__}: "
            f"{error})"
        ) from error
    return _describe(name, layout.shape, converted, folder)


def write_built_in(folder: Path) -> dict[str, Any]:
    """The task that needs no data: choose the true continuation of held-out standard library text among four.

    Args:
        folder: where to put the documents.

    Returns:
        The task as a configuration of lm-eval.
    """
    return _describe(BUILT_IN, "choices", _stdlib_items(), folder, delimiter="")


def _describe(
    name: str, shape: Shape, documents: Iterable[Document], folder: Path, delimiter: str | None = None
) -> dict[str, Any]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    accuracy = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    scoring: dict[Shape, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": accuracy,
        },
        "contexts": {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
            "metric_list": accuracy[:1],
        },
        "cloze": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{target}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                *accuracy[:1],
            ],
        },
    }
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "target_delimiter": " " if delimiter is None else delimiter,
        "metadata": {"version": 1.0},
        **scoring[shape],
    }


def _read_lines(path: Path) -> Iterator[Document]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        documents = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines: {error}") from error
    for document in documents:
        if not isinstance(document, dict):
            raise DataError(f"{path}: every line must hold a JSON object, not {type(document).__name__}")
        yield document


def _layout_of(document: Document, path: Path) -> Layout:
    for layout in _LAYOUTS:
        if layout.fields <= document.keys():
            return layout
    known = "; ".join(f"{layout.name} ({', '.join(sorted(layout.fields))})" for layout in _LAYOUTS)
    raise DataError(f"{path}: no known layout has the fields {', '.join(document)}; known are {known}")


def _plain_choices(document: Document) -> Document:
    # lm-eval itself puts the space between query and choice.
    choices = [choice.removeprefix(" ") for choice in document["choices"]]
    return {"query": document["query"], "choices": choices, "gold": int(document["gold"])}


def _plain_contexts(document: Document) -> Document:
    return {
        "contexts": document["contexts"],
        "continuation": document["continuation"].removeprefix(" "),
        "gold": int(document["gold"]),
    }


def _plain_cloze(document: Document) -> Document:
    return {"context": document["context"], "target": document["target"].removeprefix(" ")}


def _arc(document: Document) -> Document:
    choices = document["choices"]
    return {
        "query": f"Question: {document['question']}\nAnswer:",
        "choices": choices["text"],
        "gold": choices["label"].index(document["answerKey"]),
    }


def _piqa(document: Document) -> Document:
    return {
        "query": f"Question: {document['goal']}\nAnswer:",
        "choices": [document["sol1"], document["sol2"]],
        "gold": int(document["label"]),
    }


def _winogrande(document: Document) -> Document:
    before, after = document["sentence"].split("_", maxsplit=1)
    return {
        "contexts": [before + document["option1"], before + document["option2"]],
        "continuation": after.strip(),
        "gold": int(document["answer"]) - 1,
    }


def _hellaswag(document: Document) -> Document:
    query = f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}"
    return {
        "query": _without_markup(query),
        "choices": [_without_markup(ending) for ending in document["endings"]],
        "gold": int(document["label"]),
    }


def _without_markup(text: str) -> str:
    """HellaSwag's texts carry marks such as [title] and [step] from the pages they were taken from."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _boolq(document: Document) -> Document:
    answer = document["label"] if "label" in document else document["answer"]
    return {
        "query": f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:",
        "choices": ["no", "yes"],
        "gold": int(answer),
    }


def _rte(document: Document) -> Document:
    premise = document["sentence1"] if "sentence1" in document else document["premise"]
    hypothesis = document["sentence2"] if "sentence2" in document else document["hypothesis"]
    named = {"entailment": 0, "not_entailment": 1}
    label = document["label"]
    return {
        "query": f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
        "choices": ["True", "False"],
        "gold": named[label] if isinstance(label, str) else int(label),
    }


def _lambada(document: Document) -> Document:
    context, target = document["text"].rsplit(" ", maxsplit=1)
    return {"context": context, "target": target}


def _layout(name: str, fields: str, shape: Shape, convert: Callable[[Document], Document]) -> Layout:
    return Layout(name=name, fields=frozenset(fields.split()), shape=shape, convert=convert)


_LAYOUTS = (
    _layout("choices", "query choices gold", "choices", _plain_choices),
    _layout("contexts", "contexts continuation gold", "contexts", _plain_contexts),
    _layout("cloze", "context target", "cloze", _plain_cloze),
    _layout("ARC", "question choices answerKey", "choices", _arc),
    _layout("PIQA", "goal sol1 sol2 label", "choices", _piqa),
    _layout("WinoGrande", "sentence option1 option2 answer", "contexts", _winogrande),
    _layout("HellaSwag", "activity_label ctx_a ctx_b endings label", "choices", _hellaswag),
    _layout("BoolQ", "passage question label", "choices", _boolq),
    _layout("BoolQ", "passage question answer", "choices", _boolq),
    _layout("RTE", "sentence1 sentence2 label", "choices", _rte),
    _layout("RTE", "premise hypothesis label", "choices", _rte),
    _layout("LAMBADA", "text", "cloze", _lambada),
)

PUBLISHED_LAYOUTS = tuple(dict.fromkeys(layout.name for layout in _LAYOUTS if layout.name[0].isupper()))
"""Data sets whose documents are understood as they are published."""


def _stdlib_items() -> list[Document]:
    """The same items for the same standard library."""
    generator = random.Random(0)
    passages = [passage for text in load_documents("stdlib", "test") for passage in _passages(text, generator)]
    generator.shuffle(passages)
    chosen = passages[:_ITEMS]
    items: list[Document] = []
    for context, continuation in chosen:
        others = [other for _, other in chosen if other != continuation]
        choices = [continuation, *generator.sample(others, _CHOICES - 1)]
        generator.shuffle(choices)
        items.append({"query": context, "choices": choices, "gold": choices.index(continuation)})
    return items


def _passages(text: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Random places in a document: the text before a line, and that line with the line break before it."""
    shortest, longest = _CONTINUATION_CHARACTERS
    ends = [match.end() for match in re.finditer(r"\S(?=\n)", text) if match.end() >= _CONTEXT_CHARACTERS]
    generator.shuffle(ends)
    for end in ends[:_PASSAGES_PER_DOCUMENT]:
        following = re.match(r"\n+[^\n]*", text[end:])
        continuation = following[0].rstrip() if following else ""
        if shortest <= len(continuation.strip()) <= longest:
            yield text[end - _CONTEXT_CHARACTERS : end], continuation
