"""Perplexity of a model on the windows of a protocol, and of a quantized model beside its float model.

Where the logits come from does not matter here: from a model in memory, or from one that is streamed block by block.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.evaluate.protocols import EvaluationWindows
from quantlab.evaluate.scores import (
    Estimate,
    TokenScores,
    negative_log_likelihood,
    pair_scores,
    perplexity,
    scored_positions,
)
from quantlab.progress import Progress

TOKENS_PER_BATCH = 4096

Forward = Callable[[int, Tensor], Tensor]
"""(number of the batch, ids (windows, tokens)) to logits (windows, tokens, vocabulary)."""


def in_memory(model: PreTrainedModel) -> Forward:
    """The logits of a model that is loaded as a whole."""

    def forward(_: int, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits

    return forward


def batches_of(windows: EvaluationWindows) -> tuple[Tensor, ...]:
    """The windows in the batches in which they are evaluated: (windows, tokens) each."""
    return torch.split(windows.ids, max(1, TOKENS_PER_BATCH // windows.ids.shape[1]))


def measure_any(windows: EvaluationWindows, forwards: Sequence[Forward], progress: Progress) -> dict[str, Any]:
    """`measure` for one model, `measure_pair` for a float and a quantized one."""
    progress.begin(f"perplexity on {windows.protocol}", windows.ids.shape[0], "windows")
    return combine(windows, _score(windows, forwards, progress))


def measure(windows: EvaluationWindows, forward: Forward, progress: Progress) -> dict[str, Any]:
    """Perplexity of one model.

    Returns:
        "perplexity" and its "standard_error", beside the description of the windows.
    """
    return combine(windows, _score(windows, [forward], progress))


def measure_pair(
    windows: EvaluationWindows, float_forward: Forward, quantized_forward: Forward, progress: Progress
) -> dict[str, Any]:
    """Perplexities of a float and a quantized model, and how far the one is from the other.

    Returns:
        "float" and "quantized" (perplexities) with "float_standard_error" and "quantized_standard_error"; "kl", the
        mean of KL(float || quantized) in nats per token, with "kl_standard_error"; "top1_agreement", the share of
        tokens for which both models find the same token likeliest; beside the description of the windows.
    """
    return combine(windows, _score(windows, [float_forward, quantized_forward], progress))


def batch_scores(logits: Sequence[Tensor], ids: Tensor) -> dict[str, Tensor]:
    """What is measured of every token of a batch, by name.

    Args:
        logits: of one model, or of the float and the quantized one: (windows, tokens, vocabulary) each.
        ids: (windows, tokens).

    Returns:
        In main memory.
    """
    device = logits[-1].device  # answers of the float model that were kept may be elsewhere
    first, ids = logits[0].to(device), ids.to(device)
    own = len(logits) == 1
    scores = {"own": negative_log_likelihood(first, ids)} if own else pair_scores(first, logits[1], ids)
    return {name: values.cpu() for name, values in scores.items()}


def combine(windows: EvaluationWindows, scores: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The result from the scores of all batches, in their order; see `measure` and `measure_pair`."""
    estimates = {name: _estimate(windows, [batch[name] for batch in scores]) for name in scores[0]}
    if "own" in estimates:
        own = perplexity(estimates["own"])
        return {"perplexity": own.value, "standard_error": own.standard_error, **_description(windows)}
    for name in ("float", "quantized"):
        estimates[name] = perplexity(estimates[name])
    return {
        **{name: estimate.value for name, estimate in estimates.items()},
        **{f"{name}_standard_error": estimate.standard_error for name, estimate in estimates.items()},
        **_description(windows),
    }


@torch.inference_mode()
def _score(windows: EvaluationWindows, forwards: Sequence[Forward], progress: Progress) -> list[dict[str, Tensor]]:
    scores = []
    for index, ids in enumerate(batches_of(windows)):
        scores.append(batch_scores([forward(index, ids) for forward in forwards], ids))
        progress.advance(len(ids))
    return scores


def _estimate(windows: EvaluationWindows, values: list[Tensor]) -> Estimate:
    scored = scored_positions(windows)
    return TokenScores(values=torch.cat(values) * scored, scored=scored).estimate()


def _description(windows: EvaluationWindows) -> dict[str, Any]:
    return {
        "protocol_version": windows.version,
        "bos": windows.bos,
        "stride": windows.stride,
        "tokens": windows.ids.numel(),
        "windows": windows.ids.shape[0],
        "sequence_length": windows.ids.shape[1],
        "token_sha256": windows.sha256,
    }
