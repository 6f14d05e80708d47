"""Memory and time of the streaming engine on Llama-shaped checkpoints of random weights, every linear layer quantized.

    python tests/bench/streaming.py                        # the table: 1B, 7B and 70B shapes
    python tests/bench/streaming.py 1b --blocks 16         # all of it
    python tests/bench/streaming.py 7b --method gptq       # another method, NAME or NAME:PRESET
    python tests/bench/streaming.py 7b --device cuda       # on a GPU, whose memory is bounded and measured then

A row is measured in a process of its own on some blocks of the shape. Blocks are streamed, so memory does not grow
with their number; the size of the whole model is that of the measured blocks, extrapolated per block, and of the
weights outside the blocks. "expected" is the peak memory that `quantlab plan` states, "peak" the largest resident
memory of the process. "overhead" is the share of the wall time outside forward passes and solving; solving includes
measuring every layer against its Hessian. Methods are the heaviest that a benchmark has the time for.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from quantlab.api import CodebookSpec
from quantlab.checkpoint.serialize import write_safetensors
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.device import peak_device_bytes
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
    method: str
    solve: str = ""

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
    "narrow": Shape(1024, 2816, 8, 2, 4096, 200, 200, "1GiB", "rtn", r"layers\.(0|199)\.|k_proj"),
    "1b": Shape(2048, 8192, 32, 8, 128256, 16, 1, "4GiB", "ganq:paper"),
    "7b": Shape(4096, 11008, 32, 32, 32000, 32, 1, "8GiB", "gptq"),
    "70b": Shape(8192, 28672, 64, 8, 128256, 80, 1, "16GiB", "rtn"),
}


def write_checkpoint(folder: Path, shape: Shape, blocks: int) -> int:
    """Random bfloat16 weights, one file per block, every tensor from the same numbers; returns their bytes."""
    model = build_skeleton(shape.config(blocks), torch.bfloat16)
    prefix = find_blocks(model)[0]
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        parts.setdefault(inside[1] if inside else "rest", {})[name] = parameter.shape
    weight_map: dict[str, str] = {}
    total = 0
    for part, shapes in parts.items():
        tensors = {}
        for name, size in shapes.items():
            count = size.numel()
            tensors[name] = numbers.repeat(-(-count // len(numbers)))[:count].view(size)
        write_safetensors(folder / f"model-{part}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"model-{part}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model.config.save_pretrained(folder)
    return total


@dataclass(frozen=True)
class Job:
    """One measurement: the engine at work on the checkpoint in `folder`."""

    folder: str
    method: str
    solve: str
    budget: str
    tokens: int
    enforced: bool
    device: str


def measure(job: Job) -> dict[str, float]:
    """Stream a checkpoint in this process; with `enforced`, allocations beyond the budget fail."""
    budget, folder, device = parse_size(job.budget), Path(job.folder), torch.device(job.device)
    bounded = "memory_budget_bytes" if device.type == "cpu" else "device_memory_budget_bytes"
    if job.enforced:
        resource.setrlimit(resource.RLIMIT_DATA, (budget, budget))
    name, _, preset = job.method.partition(":")
    quantizer = configure(name, preset=preset or None, options={})
    options = SolveOptions(quantizer=quantizer, spec=CodebookSpec(bits=4))
    request = StreamRequest(
        source=folder / "source",
        calibration_ids=torch.randint(1000, (4, job.tokens // 4), generator=torch.Generator().manual_seed(0)),
        dtype=torch.bfloat16,
        options_of=lambda layer: options if re.search(job.solve, layer) else None,
        engine=EngineOptions(device=device, **{bounded: budget}),
    )
    target = folder / "target"
    target.mkdir()
    start = time.monotonic()
    with Journal.opened(target) as journal:
        writer = CheckpointWriter(target / "model")
        result = quantize_model(request, writer, journal, target / "work", NoProgress())
    wall = time.monotonic() - start
    return {
        "seconds": wall,
        "overhead": 1 - (result.seconds["forward"] + result.seconds["solve"]) / wall,
        "peak_bytes": peak_device_bytes(device) or peak_rss_bytes(),
        "expected_bytes": result.memory.device_peak_bytes or result.memory.peak_bytes,
        **{f"{part}_s": result.seconds[part] for part in PARTS},
    }


def measure_apart(name: str, blocks: int, job: Job) -> dict[str, float]:
    """Write a checkpoint into the folder of the job and measure it in a process of its own."""
    source = Path(job.folder) / "source"
    source.mkdir()
    total = write_checkpoint(source, SHAPES[name], blocks)
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(job))]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return {"blocks": blocks, "source_bytes": total, "budget_bytes": parse_size(job.budget), **measured}


def table_row(name: str, method: str, result: dict[str, float]) -> str:
    shape, blocks = SHAPES[name], result["blocks"]
    outside = 2 * 2 * shape.hidden * shape.vocabulary
    whole = outside + (result["source_bytes"] - outside) / blocks * shape.blocks
    sizes = (result["source_bytes"], whole, result["budget_bytes"], result["expected_bytes"], result["peak_bytes"])
    parts = "".join(f"{result[f'{part}_s']:11.1f}" for part in PARTS)
    return (
        f"{name:7}{method:12}{blocks:3.0f}/{shape.blocks:<4}"
        + "".join(f"{size / GIB:9.2f}" for size in sizes)
        + f"{result['seconds']:9.1f}{parts}{result['overhead']:10.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["1b", "7b", "70b"], help=", ".join(SHAPES))
    parser.add_argument("--blocks", type=int, help="blocks to measure")
    parser.add_argument("--budget", help="memory budget, such as 4GiB")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--method", help="NAME or NAME:PRESET")
    parser.add_argument("--solve", help="pattern of the layers to quantize; the others are written unchanged")
    parser.add_argument("--enforced", action="store_true", help="let allocations beyond the budget fail")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, whose memory the budget is for")
    parser.add_argument("--json", action="store_true", help="print one JSON object per shape")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Job(**json.loads(options.measure)))))
        return
    if not options.json:
        print(f"{'':26}GiB{'':43}seconds")
        titles = ("measured", "whole", "budget", "expected", "peak")
        heading = "".join(f"{title:>9}" for title in titles) + f"{'wall':>9}" + "".join(f"{part:>11}" for part in PARTS)
        print(f"{'shape':7}{'method':12}{'blocks':8}{heading}{'overhead':>10}")
    for name in options.shapes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                folder=folder,
                method=options.method or shape.method,
                solve=options.solve or shape.solve,
                budget=options.budget or shape.budget,
                tokens=options.tokens,
                enforced=options.enforced,
                device=options.device,
            )
            result = measure_apart(name, options.blocks or shape.measured, job)
        print(json.dumps(result) if options.json else table_row(name, job.method, result), flush=True)


if __name__ == "__main__":
    main()
