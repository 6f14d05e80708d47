"""Train the bundled demo model: `python -m quantlab.demo.train --output-dir DIR --minutes 90`.

A small Llama is trained on the standard library of the running interpreter (`quantlab.calibration.stdlib`),
as long as the given time allows. Quantization hurts a model in proportion to what it has learned, so a
comparison of methods needs a model trained to where its held-out loss is flat: the learning rate stays
constant for most of the budget and then falls linearly to zero.

The matrices inside the blocks are trained with Muon (orthogonalised momentum), everything else with AdamW.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantlab.calibration.stdlib import read_documents

CONTEXT = 512
VOCABULARY = 1024
END_OF_TEXT = "<|endoftext|>"
BATCH = 8
DECAY_SHARE = 0.4  # of the time budget
WARMUP_STEPS = 50
MATRIX_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 0.004
EVALUATE_EVERY_S = 180.0
QUICK_WINDOWS = 24


def main() -> None:
    """Train, measure and save the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    train_documents = read_documents("train")
    held_out_documents = read_documents("test")
    tokenizer = train_tokenizer(train_documents)
    train_ids = encode(tokenizer, train_documents)
    held_out_ids = encode(tokenizer, held_out_documents)
    held_out_bytes = sum(len(text.encode()) for text in held_out_documents.values())
    print(f"{train_ids.numel():,} training and {held_out_ids.numel():,} held-out tokens", flush=True)

    model = LlamaForCausalLM(model_config(tokenizer))
    history = train(model, train_ids, held_out_ids, arguments.minutes * 60.0, arguments.seed)
    model.bfloat16()
    loss = held_out_loss(model, held_out_ids)
    history |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": train_ids.numel(),
        "held_out_tokens": held_out_ids.numel(),
        "held_out_perplexity": math.exp(loss),
        "held_out_bits_per_byte": loss / math.log(2) * held_out_ids.numel() / held_out_bytes,
        "python": platform.python_version(),
    }

    model.config.bos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    (arguments.output_dir / "training.json").write_text(json.dumps(history, indent=2) + "\n")
    print(json.dumps({k: v for k, v in history.items() if k != "curve"}, indent=2))


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Grouped-query attention and tied embeddings, as in the small Llamas of the field."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_tokenizer(documents: dict[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from the training documents alone."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents.values(), vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: dict[str, str]) -> Tensor:
    """All documents as one sequence of token ids, each document closed by the end-of-text token."""
    ids: list[int] = []
    for encoded in tokenizer(list(documents.values()), verbose=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


def train(
    model: LlamaForCausalLM, train_ids: Tensor, held_out_ids: Tensor, budget_s: float, seed: int
) -> dict[str, object]:
    """Train in place until the time budget is spent; returns steps, tokens, time and the held-out curve."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]

    generator = torch.Generator().manual_seed(seed)
    curve: list[dict[str, float]] = []
    start = last_report = time.monotonic()
    step = 0
    while (elapsed := time.monotonic() - start) < budget_s:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        decay = min(1.0, (1.0 - elapsed / budget_s) / DECAY_SHARE)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warmup * decay
        batch = sample_windows(train_ids, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1

        if time.monotonic() - last_report > EVALUATE_EVERY_S:
            last_report = time.monotonic()
            quick = held_out_loss(model, held_out_ids[: QUICK_WINDOWS * CONTEXT])
            curve.append({"step": step, "held_out_loss": round(quick, 4)})
            print(f"step {step}  {elapsed:.0f} s  loss {loss.item():.3f}  held out {quick:.4f}", flush=True)
    return {
        "steps": step,
        "tokens_seen": step * BATCH * CONTEXT,
        "wall_s": round(time.monotonic() - start),
        "curve": curve,
    }


def sample_windows(ids: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of windows at random places: (BATCH, CONTEXT)."""
    starts = torch.randint(ids.numel() - CONTEXT, (BATCH, 1), generator=generator)
    return ids[starts + torch.arange(CONTEXT)]


def next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every token given those before it in its window."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean loss over non-overlapping windows of the context length."""
    windows = ids[: ids.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [next_token_loss(model, batch).item() * len(batch) for batch in windows.split(BATCH)]
    return sum(losses) / len(windows)


if __name__ == "__main__":
    main()
