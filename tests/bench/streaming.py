"""Peak memory of the streaming engine on Llama-shaped checkpoints of random weights, method `rtn`.

    python tests/bench/streaming.py                          # the table: 1B, 7B and 70B shapes
    python tests/bench/streaming.py 1b --blocks 16 --solve . # all of it

A row is measured in a process of its own on some blocks of the shape. Blocks are streamed, so memory does not grow
with their number; the size of the whole model is that of the measured blocks, extrapolated per block, and of the
weights outside the blocks.

Round-to-nearest is the cheapest method, but each layer is also measured against its Hessian in float64, which is most
of the time at these widths. `--solve` names the layers to quantize; the others are streamed and written unchanged.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from quantlab.api import CodebookSpec
from quantlab.checkpoint.serialize import write_safetensors
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.journal import Journal
from quantlab.engine.options import EngineOptions
from quantlab.engine.profile import PARTS
from quantlab.engine.solve import SolveOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.memory import peak_rss_bytes
from quantlab.progress import NoProgress
from quantlab.recipe.size import parse_size
from quantlab.registry import configure
from quantlab.skeleton import build_skeleton, find_blocks

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama model by its sizes: `blocks` of the whole model, of which `measured` are written and streamed."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    blocks: int
    measured: int
    budget: str
    solve: str

    def config(self, blocks: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            dtype="bfloat16",
        )


SHAPES = {
    "narrow": Shape(1024, 2816, 8, 2, 4096, 200, 200, "1GiB", r"layers\.(0|199)\.|k_proj"),
    "1b": Shape(2048, 8192, 32, 8, 128256, 16, 2, "4GiB", "down_proj|k_proj"),
    "7b": Shape(4096, 11008, 32, 32, 32000, 32, 1, "8GiB", "k_proj"),
    "70b": Shape(8192, 28672, 64, 8, 128256, 80, 1, "24GiB", "k_proj"),
}


def write_checkpoint(folder: Path, shape: Shape, blocks: int) -> int:
    """Random bfloat16 weights, the same in every block, one file per block; returns their bytes."""
    model = build_skeleton(shape.config(blocks), torch.bfloat16)
    prefix = find_blocks(model)[0]
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        parts.setdefault(inside[1] if inside else "rest", {})[name] = parameter.shape
    weight_map: dict[str, str] = {}
    total = 0
    values: dict[str, torch.Tensor] = {}
    for part, shapes in parts.items():
        tensors = {}
        for name, size in shapes.items():
            role = re.sub(r"\.\d+\.", ".*.", name)
            if role not in values:
                values[role] = torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            tensors[name] = values[role]
        write_safetensors(folder / f"model-{part}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"model-{part}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model.config.save_pretrained(folder)
    return total


def measure(source: Path, target: Path, budget: int, tokens: int, solve: str, *, enforced: bool) -> dict[str, float]:
    """Stream a checkpoint in this process; with `enforced`, allocations beyond the budget fail."""
    if enforced:
        resource.setrlimit(resource.RLIMIT_DATA, (budget, budget))
    options = SolveOptions(quantizer=configure("rtn", preset=None, options={}), spec=CodebookSpec(bits=4))
    request = StreamRequest(
        source=source,
        calibration_ids=torch.randint(1000, (4, tokens // 4), generator=torch.Generator().manual_seed(0)),
        dtype=torch.bfloat16,
        options_of=lambda layer: options if re.search(solve, layer) else None,
        engine=EngineOptions(memory_budget_bytes=budget),
    )
    target.mkdir()
    start = time.monotonic()
    with Journal.opened(target) as journal:
        writer = CheckpointWriter(target / "model")
        result = quantize_model(request, writer, journal, target / "work", NoProgress())
    return {
        "seconds": time.monotonic() - start,
        "peak_bytes": peak_rss_bytes(),
        "expected_bytes": result.memory.peak_bytes,
        **{f"{part}_s": result.seconds[part] for part in PARTS},
    }


def measure_apart(name: str, blocks: int, budget: str, tokens: int, solve: str, *, enforced: bool) -> dict[str, float]:
    """Write a checkpoint and measure it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        total = write_checkpoint(source, SHAPES[name], blocks)
        arguments = ["--measure", folder, "--budget", budget, "--tokens", str(tokens), "--solve", solve]
        command = [sys.executable, __file__, *arguments, *(["--enforced"] if enforced else [])]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return {"blocks": blocks, "source_bytes": total, "budget_bytes": parse_size(budget), **measured}


def table_row(name: str, result: dict[str, float]) -> str:
    shape, blocks = SHAPES[name], result["blocks"]
    outside = 2 * 2 * shape.hidden * shape.vocabulary
    whole = outside + (result["source_bytes"] - outside) / blocks * shape.blocks
    sizes = (result["source_bytes"], whole, result["budget_bytes"], result["expected_bytes"], result["peak_bytes"])
    parts = ", ".join(f"{part} {result[f'{part}_s']:.1f}" for part in PARTS)
    return f"{name:7}{blocks:3}/{shape.blocks:<4}" + "".join(f"{size / GIB:10.2f}" for size in sizes) + f"   {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["1b", "7b", "70b"], help=", ".join(SHAPES))
    parser.add_argument("--blocks", type=int, help="blocks to measure")
    parser.add_argument("--budget", help="memory budget, such as 4GiB")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--solve", help="pattern of the layers to quantize")
    parser.add_argument("--enforced", action="store_true", help="let allocations beyond the budget fail")
    parser.add_argument("--json", action="store_true", help="print one JSON object per shape")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        source, target = options.measure / "source", options.measure / "target"
        budget = parse_size(options.budget)
        print(json.dumps(measure(source, target, budget, options.tokens, options.solve, enforced=options.enforced)))
        return
    if not options.json:
        print("shape   blocks    measured     whole    budget  expected      peak   GiB; where the time goes, s")
    for name in options.shapes:
        shape = SHAPES[name]
        result = measure_apart(
            name,
            options.blocks or shape.measured,
            options.budget or shape.budget,
            options.tokens,
            options.solve or shape.solve,
            enforced=options.enforced,
        )
        print(json.dumps(result) if options.json else table_row(name, result), flush=True)


if __name__ == "__main__":
    main()
