"""Token windows of equal length, cut from a text source with the model's own tokenizer."""

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantlab.calibration.sources import load_documents
from quantlab.errors import DataError, ModelError

POOL = 4
"""Calibration windows are drawn from this many times as many tokens, out of documents in random order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWindows:
    """Windows of a token stream.

    Attributes:
        source: name of the text source.
        ids: (windows, sequence_length) int64.
        sha256: hash of the ids, so that two results can be known to come from the same tokens.
    """

    source: str
    ids: Tensor
    sha256: str


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder.

    Raises:
        ModelError: the folder has none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot load the tokenizer: {error}") from error


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, num_samples: int, sequence_length: int, seed: int
) -> TokenWindows:
    """Windows at random places of random documents of the training split.

    Raises:
        DataError: the source is missing or shorter than one window.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = load_documents(source, "train")
    shuffled = (documents[index] for index in torch.randperm(len(documents), generator=generator).tolist())
    stream = _token_stream(tokenizer, shuffled, POOL * num_samples * sequence_length)
    _require_one_window(source, stream, sequence_length)
    starts = torch.randint(stream.numel() - sequence_length + 1, (num_samples, 1), generator=generator)
    return _windows(source, stream[starts + torch.arange(sequence_length)])


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, sequence_length: int, num_windows: int | None
) -> TokenWindows:
    """Non-overlapping windows of the held-out split; the remainder is dropped.

    Args:
        tokenizer: of the evaluated model.
        source: name of the text source.
        sequence_length: tokens per window.
        num_windows: how many, evenly spread over the text; None takes all.

    Raises:
        DataError: the source is missing or shorter than one window.
    """
    stream = _token_stream(tokenizer, load_documents(source, "held_out"), sys.maxsize)
    _require_one_window(source, stream, sequence_length)
    windows = stream[: stream.numel() // sequence_length * sequence_length].view(-1, sequence_length)
    if num_windows is not None and num_windows < len(windows):
        windows = windows[torch.arange(num_windows) * len(windows) // num_windows]
    return _windows(source, windows)


def _token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], enough: int) -> Tensor:
    """Documents as one stream, each closed by the end-of-text token if the tokenizer has one.

    Stops after the document with which the stream has enough tokens.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(stream) >= enough:
            break
    return torch.tensor(stream)


def _require_one_window(source: str, stream: Tensor, sequence_length: int) -> None:
    if stream.numel() < sequence_length:
        raise DataError(
            f"the text source {source!r} has {stream.numel():,} tokens, fewer than one window of {sequence_length:,}; "
            "use a longer text or a smaller sequence_length"
        )


def _windows(source: str, ids: Tensor) -> TokenWindows:
    return TokenWindows(source=source, ids=ids, sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest())
