"""What the logits of a model, or of two, say about it: perplexity, and the divergence from the float model.

Perplexity is exp of the mean negative log-likelihood in nats over all scored tokens. Divergence sees what perplexity
hides: a quantized model may predict the text as well as the float model and still be another model.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.evaluate.protocols import EvaluationWindows


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over windows.

    Attributes:
        value: the mean over all scored tokens.
        standard_error: from the spread of the windows; NaN for a single window.
    """

    value: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """Scores of single tokens, zero where a token is not scored.

    Attributes:
        values: (windows, sequence_length - 1) float64.
        scored: (windows, sequence_length - 1) bool; entry t stands for the token at t + 1.
    """

    values: Tensor
    scored: Tensor

    def estimate(self) -> Estimate:
        """The mean over all scored tokens; windows count as independent samples."""
        weights = self.scored.sum(dim=1).double()
        windows = len(weights)
        mean = (self.values.sum() / weights.sum()).item()
        # Of a ratio of sums, by the delta method: windows may score different numbers of tokens.
        residual = (self.values.sum(dim=1) - mean * weights) / weights.mean()
        spread = residual.square().sum().item() / (windows * (windows - 1)) if windows > 1 else math.nan
        return Estimate(value=mean, standard_error=math.sqrt(spread))


def perplexity(likelihood: Estimate) -> Estimate:
    """Perplexity from the mean negative log-likelihood in nats."""
    value = math.exp(likelihood.value)
    return Estimate(value=value, standard_error=value * likelihood.standard_error)


def scored_positions(windows: EvaluationWindows) -> Tensor:
    """Which predictions count: (windows, sequence_length - 1) bool."""
    return torch.arange(1, windows.ids.shape[1]) >= windows.first_target[:, None]


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """How badly each next token was predicted, in nats: (windows, sequence_length - 1) float64.

    Args:
        logits: (windows, sequence_length, vocabulary).
        ids: (windows, sequence_length).
    """
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return flat.view(ids.shape[0], -1).double()


def pair_scores(float_logits: Tensor, quantized_logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """How two models predicted each next token, and how far the one is from the other.

    One window at a time, with the logarithms of each model's probabilities taken once: for large vocabularies they are
    what takes the time and the memory.

    Args:
        float_logits: (windows, sequence_length, vocabulary).
        quantized_logits: the same of the quantized model.
        ids: (windows, sequence_length).

    Returns:
        (windows, sequence_length - 1) float64 each: "float" and "quantized" are negative log-likelihoods and "kl" is
        KL(float || quantized), in nats; "top1_agreement" is 1 where both models find the same next token likeliest.
    """
    windows = [_pair_scores(*window) for window in zip(float_logits, quantized_logits, ids, strict=True)]
    return {name: torch.stack([scores[name] for scores in windows]).double() for name in windows[0]}


def _pair_scores(float_logits: Tensor, quantized_logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    reference = torch.log_softmax(float_logits[:-1].float(), dim=-1)
    other = torch.log_softmax(quantized_logits[:-1].float(), dim=-1)
    targets = ids[1:, None]
    return {
        "float": -reference.gather(1, targets)[:, 0],
        "quantized": -other.gather(1, targets)[:, 0],
        "kl": torch.nn.functional.kl_div(other, reference, log_target=True, reduction="none").sum(dim=-1),
        "top1_agreement": (float_logits[:-1].argmax(dim=-1) == quantized_logits[:-1].argmax(dim=-1)).float(),
    }
