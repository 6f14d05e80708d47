"""The corpora of the quantization literature: where each comes from, and how its files divide into documents."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A published text corpus.

    Attributes:
        note: one line for tables.
        hub_id: dataset repository on the Hugging Face hub; empty if the hub has it only as a loading script, which
            is code and is not run.
        hub_config: configuration of that repository, or None.
        hub_files: the files to take by split, where the whole repository is too large.
        splits: what there is.
        protocols: names of the perplexity protocols that read it.
        one_document_per_line: whether a plain text file of it holds a document in every line.
        separator: what joins the documents before calibration windows are drawn at random places; None draws each
            window within one document. The convention of GPTQ's code.
        by_hand: which files to bring on a machine without network, for messages.
    """

    note: str
    splits: tuple[Split, ...]
    protocols: tuple[str, ...]
    by_hand: str
    hub_id: str = ""
    hub_config: str | None = None
    hub_files: Mapping[str, str] = field(default_factory=dict)
    one_document_per_line: bool = False
    separator: str | None = None


CORPORA = {
    "wikitext2": Corpus(
        note="WikiText-2 raw, encyclopedia articles",
        hub_id="Salesforce/wikitext",
        hub_config="wikitext-2-raw-v1",
        splits=("train", "validation", "test"),
        protocols=("wikitext2",),
        one_document_per_line=True,
        separator="\n\n",
        by_hand="wiki.train.raw and wiki.test.raw, or the parquet files of Salesforce/wikitext, wikitext-2-raw-v1",
    ),
    "c4": Corpus(
        note="C4 English web text, first training and first validation file",
        hub_id="allenai/c4",
        hub_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        splits=("train", "validation"),
        protocols=("c4", "c4-new"),
        by_hand="en/c4-train.00000-of-01024.json.gz and en/c4-validation.00000-of-00008.json.gz of allenai/c4",
    ),
    "ptb": Corpus(
        note="Penn Treebank newspaper text; meaningless for LLaMA models",
        splits=("train", "validation", "test"),
        protocols=("ptb", "ptb-new"),
        one_document_per_line=True,
        separator=" ",
        by_hand="ptb.train.txt, ptb.valid.txt and ptb.test.txt",
    ),
}
