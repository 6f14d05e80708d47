"""Perplexity over non-overlapping windows, the protocol of the quantization literature.

Every window is a separate forward pass without special tokens; a window of n tokens gives n - 1 predictions.
Perplexity is exp of the mean negative log-likelihood in nats over all predictions.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.progress import Progress

TOKENS_PER_BATCH = 4096


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor, progress: Progress) -> float:
    """Perplexity of a causal LM.

    Args:
        model: in evaluation mode.
        ids: (windows, sequence_length) token ids.
        progress: is told about every finished window.
    """
    total = 0.0
    for batch in ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1])):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += loss.item()
        progress.advance(len(batch))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))
