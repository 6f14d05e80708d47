"""Decode speed and memory of a synthetic Llama of 1.1 billion parameters: `python kernels/bench/decode.py`.

The model has the shape of TinyLlama (22 blocks, width 2048, inner width 5632, 32000 tokens) and random weights. It
runs with float32, with bfloat16, and with bfloat16 and every linear layer of the blocks quantized: each layer called
by itself, and those that share an input fused. Embeddings and output layer stay bfloat16. Each variant has a process of
its own, so that the memory that a process really occupies can be compared; the variants take turns for several rounds,
and the best round of each counts.

Memory is resident memory that the process gained since its imports. The target is for what holds data: weights,
caches, buffers, heap. The code of libraries that was read from files meanwhile is the same whatever the model is; it
has a column of its own.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quantlab.checkpoint.fusion import fuse_layers
from quantlab.runtime import LutLinear, ModuleSpec, storage_layout

SPEED_TARGET = 3.0  # times bfloat16
MEMORY_TARGET = 0.35  # of bfloat16
PROMPT_TOKENS = 16
VARIANTS = ("float32", "bfloat16", "quantized", "fused")


def main() -> None:
    """Run the variants in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=22, help="fewer blocks: a smaller model, and it is said so")
    parser.add_argument("--tokens", type=int, default=24, help="decoded per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_variant(arguments)))
        return
    rounds = [{variant: run_process(variant) for variant in VARIANTS} for _ in range(arguments.rounds)]
    best = {
        variant: max((measured[variant] for measured in rounds), key=lambda result: result["tokens_per_s"])
        for variant in rounds[0]
    }
    print_table(best, arguments)
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name not in ("json", "variant")}
        arguments.json.write_text(json.dumps({"options": options, "rounds": rounds}, indent=1) + "\n")


def run_process(variant: str) -> dict[str, float]:
    """One variant in a process of its own."""
    command = [sys.executable, *sys.argv, "--variant", variant]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def run_variant(arguments: argparse.Namespace) -> dict[str, float]:
    """Build a model, decode, and measure."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    data, code = resident_bytes("RssAnon"), resident_bytes("RssFile")
    dtype = torch.float32 if arguments.variant == "float32" else torch.bfloat16
    bits = arguments.bits if arguments.variant in ("quantized", "fused") else None
    model = build_model(dtype, arguments.blocks, bits)
    if arguments.variant == "fused":
        fuse_layers(model)
    with torch.no_grad():
        seconds = decode(model, arguments.tokens)
    return {
        "tokens_per_s": 1 / statistics.median(seconds),
        "resident_bytes": resident_bytes("RssAnon") - data,
        "library_bytes": resident_bytes("RssFile") - code,
        "tensor_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    }


def build_model(dtype: torch.dtype, blocks: int, bits: int | None) -> LlamaForCausalLM:
    """The model with random weights; with `bits`, its blocks are quantized."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    if bits is not None:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, random_lut_linear(module, bits))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=dtype).uniform_(-0.03, 0.03)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return model.eval()


def random_lut_linear(linear: nn.Linear, bits: int) -> LutLinear:
    """A quantized layer of the same size, with one codebook per row."""
    spec = ModuleSpec(linear.out_features, linear.in_features, bits, None, "lut", 0, linear.bias is not None)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in storage_layout(spec).items():
        if dtype.is_floating_point:
            tensors[name] = torch.empty(shape, dtype=dtype).uniform_(-0.03, 0.03)
        else:
            tensors[name] = torch.randint(-(2**31), 2**31, shape, dtype=dtype)
    return LutLinear(spec, tensors, None)


def decode(model: LlamaForCausalLM, tokens: int) -> list[float]:
    """Seconds per token after the prompt."""
    ids, cache, seconds = torch.arange(PROMPT_TOKENS)[None], None, []
    for _ in range(tokens + 2):
        start = time.perf_counter()
        output = model(ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        seconds.append(time.perf_counter() - start)
    return seconds[2:]  # the prompt and the first token warm up


def resident_bytes(kind: str) -> int:
    """Memory of one kind that this process occupies, after freed memory has been given back."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def print_table(best: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """Speeds and memory against bfloat16."""
    if arguments.blocks != 22:
        print(
            f"{arguments.blocks} of 22 blocks: shares of embeddings and output layer are larger than in the full model"
        )
    names = {"quantized": f"{arguments.bits}-bit", "fused": f"{arguments.bits}-bit, fused"}
    base = best["bfloat16"]
    print(f"{arguments.threads} threads, batch 1\n")
    print("| weights | tokens/s | x bfloat16 | resident GB | x bfloat16 | tensors GB | library code GB |")
    print("|---|---|---|---|---|---|---|")
    for variant, result in best.items():
        print(
            f"| {names.get(variant, variant)} | {result['tokens_per_s']:.2f} "
            f"| {result['tokens_per_s'] / base['tokens_per_s']:.2f} | {result['resident_bytes'] / 1e9:.3f} "
            f"| {result['resident_bytes'] / base['resident_bytes']:.3f} | {result['tensor_bytes'] / 1e9:.3f} "
            f"| {result['library_bytes'] / 1e9:.3f} |"
        )
    speed = best["quantized"]["tokens_per_s"] / base["tokens_per_s"]
    memory = best["quantized"]["resident_bytes"] / base["resident_bytes"]
    print(f"\nspeed >= {SPEED_TARGET}x bfloat16: {'met' if speed >= SPEED_TARGET else 'MISSED'}")
    print(f"resident memory <= {MEMORY_TARGET}x bfloat16: {'met' if memory <= MEMORY_TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
