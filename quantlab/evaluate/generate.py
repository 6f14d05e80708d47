"""Text from a model, handed on piece by piece while it is generated."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from quantlab.calibration.tokens import load_tokenizer
from quantlab.errors import UsageError
from quantlab.evaluate.subject import Subject


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a text is continued.

    Attributes:
        max_new_tokens: generation ends here, or at the end-of-text token.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before a token is drawn.
        top_p: tokens are drawn among the likeliest ones of this total probability.
        seed: of the draws.
        dtype: what the model computes in, or None for what it is stored in.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str | None = None


def generate_text(subject: Subject, prompt: str, options: GenerateOptions, write: Callable[[str], None]) -> int:
    """Continue a text.

    Args:
        subject: the model.
        prompt: what to continue.
        options: how.
        write: takes the prompt and its continuation in pieces, which end where words end.

    Returns:
        The number of tokens generated.

    Raises:
        UsageError: the prompt has no tokens, or prompt and continuation do not fit into the model's context.
        QuantlabError: the model cannot be loaded.
    """
    tokenizer = load_tokenizer(subject.folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
    if not ids.numel():
        raise UsageError("the prompt has no tokens; give some text")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = subject.load(dtype)
    context: int | None = getattr(model.config, "max_position_embeddings", None)
    if context is not None and ids.shape[1] + options.max_new_tokens > context:
        raise UsageError(
            f"the prompt has {ids.shape[1]} tokens, and with {options.max_new_tokens} more it exceeds the model's "
            f"context of {context}; shorten it, or ask for fewer with --max-new-tokens"
        )
    torch.manual_seed(options.seed)
    output = model.generate(  # type: ignore[operator]  # torch declares every unknown attribute a Tensor or Module
        ids.to(subject.device),
        attention_mask=torch.ones_like(ids, device=subject.device),
        generation_config=_generation_config(model.generation_config, options),
        streamer=_Writer(tokenizer, write),
    )
    return int(output.shape[1] - ids.shape[1])


def _generation_config(own: GenerationConfig | None, options: GenerateOptions) -> GenerationConfig:
    """Only the special tokens are the model's own: what else it recommends would override what was asked for."""
    end = None if own is None else own.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    draws = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        eos_token_id=end,
        pad_token_id=0 if first_end is None else first_end,  # one sequence is never padded, but transformers asks
        **(draws if options.temperature > 0 else {"do_sample": False}),
    )


class _Writer(TextStreamer):
    """Hands decoded text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
