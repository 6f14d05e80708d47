"""Token windows of equal length, cut from a text source with the model's own tokenizer."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from quantlab.calibration.corpora import CORPORA
from quantlab.calibration.sources import load_documents
from quantlab.errors import DataError, ModelError

DEFAULT_LENGTH = 2048
"""Tokens per window in the literature, where the model's context holds as many."""

_POOL = 4
"""Windows are drawn from this many times as many tokens, out of documents in random order."""

_HOPELESS = 20
"""So many draws per document in a row without one that is long enough: there is none, or next to none."""


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


def context_length(config: PretrainedConfig) -> int | None:
    """The longest text that a model takes, in tokens; None if its configuration does not say."""
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def window_length(asked: int | None, config: PretrainedConfig) -> int:
    """Tokens per window: as asked for, or 2048, or the model's context if that is shorter."""
    return asked or min(DEFAULT_LENGTH, context_length(config) or DEFAULT_LENGTH)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, num_samples: int, sequence_length: int, seed: int
) -> TokenWindows:
    """Windows of the training split at random places.

    From the corpora of the literature they are drawn as GPTQ's code (arXiv:2210.17323) draws them, so that equal seeds
    give equal windows. From other sources they are drawn out of shuffled documents without special tokens.

    Raises:
        DataError: the source is missing or shorter than one window.
    """
    documents = load_documents(source, "train")
    if source in CORPORA:
        ids = _drawn_as_published(tokenizer, CORPORA[source].separator, documents, num_samples, sequence_length, seed)
    else:
        ids = _drawn_from_shuffled(tokenizer, documents, num_samples, sequence_length, seed)
    if ids is None:
        raise DataError(
            f"the text source {source!r} has no stretch of {sequence_length:,} tokens; use a longer text or a smaller "
            "calibration.sequence_length"
        )
    return TokenWindows(source=source, ids=ids, sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def sample_within_documents(
    encode: Callable[[str], list[int]], documents: Sequence[str], count: int, length: int, seed: int
) -> Tensor | None:
    """Random windows of random documents, in the order of draws of GPTQ's code.

    Returns:
        (count, length) int64, or None if hardly any document is long enough.
    """
    generator = random.Random(seed)
    windows: list[list[int]] = []
    misses = 0
    while len(windows) < count and misses < _HOPELESS * len(documents):
        ids = encode(documents[generator.randint(0, len(documents) - 1)])
        if len(ids) <= length:
            misses += 1
            continue
        misses = 0
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
    return torch.tensor(windows) if len(windows) == count else None


def _drawn_as_published(
    tokenizer: PreTrainedTokenizerBase,
    separator: str | None,
    documents: Sequence[str],
    count: int,
    length: int,
    seed: int,
) -> Tensor | None:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    if separator is None:
        return sample_within_documents(encode, documents, count, length, seed)
    stream = torch.tensor(encode(separator.join(documents)))
    if len(stream) <= length:
        return None
    generator = random.Random(seed)
    starts = torch.tensor([generator.randint(0, len(stream) - length - 1) for _ in range(count)])
    return stream[starts[:, None] + torch.arange(length)]


def _drawn_from_shuffled(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], count: int, length: int, seed: int
) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        stream += tokenizer(documents[index], add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(stream) >= _POOL * count * length:
            break
    if len(stream) < length:
        return None
    starts = torch.randint(len(stream) - length + 1, (count, 1), generator=generator)
    return torch.tensor(stream)[starts + torch.arange(length)]
