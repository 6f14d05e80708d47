"""Perplexity protocols: which text, cut into which windows. Two perplexities compare only if these agree.

`wikitext2`, `c4`, `c4-new`, `ptb` and `ptb-new` follow the code of the GPTQ paper (arXiv:2210.17323), which later
papers share. Any other text source has the plain protocol: its held-out documents one after the other.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantlab.calibration.corpora import Split
from quantlab.calibration.sources import load_documents, protocol_error
from quantlab.calibration.tokens import sample_within_documents
from quantlab.errors import DataError

Bos = Literal["none", "tokenizer", "each_window"]
"""`none`: no special tokens; `tokenizer`: what the tokenizer puts around a text, once per tokenised text;
`each_window`: every window begins with the beginning-of-text token."""

_SAMPLED_WINDOWS = 256
_C4_NEW_DOCUMENTS = 1100

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Text:
    """What there is to cut windows from.

    Attributes:
        documents: in order.
        encode: text to token ids, special tokens as the policy wants them.
        end: token that closes a document, if the tokenizer has one.
    """

    documents: Sequence[str]
    encode: Encode
    end: int | None


Cut = Callable[[Text, int, int], Tensor]
"""(text, length, stride) to windows (windows, length)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A perplexity protocol.

    Attributes:
        name: as used in recipes and tables.
        version: raised whenever a result would change.
        source: name of the text source.
        split: which split of it.
        summary: one line for tables.
        bos: its policy.
        cut: how the text becomes windows.
        overlaps: whether a stride below the length of the windows makes sense.
    """

    name: str
    version: int
    source: str
    split: Split
    summary: str
    bos: Bos
    cut: Cut
    overlaps: bool = True


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """What a protocol leaves open.

    Attributes:
        sequence_length: tokens per window, beginning-of-text token included.
        stride: tokens from one window to the next; a window is scored only where no earlier one was. None means
            windows that do not overlap.
        bos: None means as the protocol does.
        num_windows: how many, evenly spread over those of the protocol; None means all.
    """

    sequence_length: int
    stride: int | None = None
    bos: Bos | None = None
    num_windows: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationWindows:
    """Windows to evaluate on, and how they came about.

    Attributes:
        protocol: the name of the protocol.
        version: its version.
        bos: the policy that was followed.
        stride: tokens from one window to the next.
        ids: (windows, sequence_length) int64.
        first_target: (windows,) int64, the position of the first token of each window that is scored.
    """

    protocol: str
    version: int
    bos: Bos
    stride: int
    ids: Tensor
    first_target: Tensor

    @property
    def sha256(self) -> str:
        """Hash of the ids, so that two results can be known to come from the same tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, protocol: Protocol, options: WindowOptions
) -> EvaluationWindows:
    """Cut the text of a protocol into windows.

    Raises:
        DataError: the text is missing or shorter than one window, or the options contradict the protocol or the
            tokenizer.
    """
    bos = options.bos or protocol.bos
    begin = _begin(tokenizer, protocol, bos)
    length = options.sequence_length - len(begin)  # of the text in a window
    stride = options.stride or length
    if stride > length or (stride < length and not protocol.overlaps):
        rule = f"at most the {length} tokens of a window" if protocol.overlaps else "left out: its windows are random"
        raise DataError(f"evaluation.stride={stride} does not fit the protocol {protocol.name}; it must be {rule}")
    text = Text(
        documents=load_documents(protocol.source, protocol.split),
        encode=lambda text: tokenizer(text, add_special_tokens=bos == "tokenizer", verbose=False)["input_ids"],
        end=tokenizer.eos_token_id,
    )
    windows = protocol.cut(text, length, stride)
    if not len(windows):
        raise DataError(
            f"the text of {protocol.name} is shorter than one window of {options.sequence_length:,} tokens; use a "
            "longer text or a smaller evaluation.sequence_length"
        )
    first_target = torch.full((len(windows),), options.sequence_length - stride)
    first_target[0] = 0
    count = min(options.num_windows or len(windows), len(windows))
    chosen = torch.arange(count) * len(windows) // count
    return EvaluationWindows(
        protocol=protocol.name,
        version=protocol.version,
        bos=bos,
        stride=stride,
        ids=torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), windows[chosen]], dim=1),
        first_target=first_target[chosen].clamp(min=1),  # nothing predicts the first token
    )


def _begin(tokenizer: PreTrainedTokenizerBase, protocol: Protocol, bos: Bos) -> list[int]:
    """What every window begins with."""
    if bos != "each_window":
        return []
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"evaluation.bos=each_window cannot be followed for {protocol.name}: the model's tokenizer has no "
            "beginning-of-text token; use none or tokenizer"
        )
    return [tokenizer.bos_token_id]


def _unfolded(stream: list[int], length: int, stride: int) -> Tensor:
    ids = torch.tensor(stream, dtype=torch.int64)
    return ids.unfold(0, length, stride) if len(ids) >= length else ids.new_empty(0, length)


def _joined(separator: str, *, documents: int | None = None, windows: int | None = None) -> Cut:
    def cut(text: Text, length: int, stride: int) -> Tensor:
        return _unfolded(text.encode(separator.join(text.documents[:documents])), length, stride)[:windows]

    return cut


def _one_by_one(text: Text, length: int, stride: int) -> Tensor:
    end = [] if text.end is None else [text.end]
    return _unfolded([token for document in text.documents for token in text.encode(document) + end], length, stride)


def _sampled(text: Text, length: int, stride: int) -> Tensor:
    windows = sample_within_documents(text.encode, text.documents, _SAMPLED_WINDOWS, length, seed=0)
    return torch.empty(0, length) if windows is None else windows


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="wikitext2",
            version=1,
            source="wikitext2",
            split="test",
            summary="WikiText-2 raw test, joined by blank lines",
            bos="tokenizer",
            cut=_joined("\n\n"),
        ),
        Protocol(
            name="c4",
            version=1,
            source="c4",
            split="validation",
            summary="256 random windows of random C4 validation documents",
            bos="tokenizer",
            cut=_sampled,
            overlaps=False,
        ),
        Protocol(
            name="c4-new",
            version=1,
            source="c4",
            split="validation",
            summary="the first 1100 C4 validation documents, joined by spaces, 256 windows",
            bos="tokenizer",
            cut=_joined(" ", documents=_C4_NEW_DOCUMENTS, windows=256),
        ),
        Protocol(
            name="ptb",
            version=1,
            source="ptb",
            split="validation",
            summary="Penn Treebank validation, joined by blank lines",
            bos="tokenizer",
            cut=_joined("\n\n"),
        ),
        Protocol(
            name="ptb-new",
            version=1,
            source="ptb",
            split="test",
            summary="Penn Treebank test, joined by spaces",
            bos="tokenizer",
            cut=_joined(" "),
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """The protocol of this name; for a text source without one of its own, the plain protocol.

    Raises:
        DataError: there is no such protocol or text source.
    """
    if error := protocol_error(name):
        raise DataError(f"the evaluation text {error}")
    return PROTOCOLS.get(name) or Protocol(
        name=name,
        version=1,
        source=name,
        split="test",
        summary="held-out documents, each closed by the end-of-text token",
        bos="none",
        cut=_one_by_one,
    )
