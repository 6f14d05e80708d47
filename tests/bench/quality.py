"""How good every method is, layer by layer and end to end, without learning by heart: `python tests/bench/quality.py`.

Each layer is solved with the Hessian of one text and measured with that of another, too. Figures are layer losses
relative to those of GPTQ, its default being act-order, as geometric means over layers: below 1 is better. Layers are
those of a model, on its calibration and held-out text, and synthetic ones, on two draws of the same inputs;
`--every-layer` prints each of them. `--end-to-end` adds what `quantlab compare` says about the whole model: divergence
from the float model and perplexity on held-out text. A method is written NAME, or NAME@PRESET.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from quantlab import registry
from quantlab.api import CodebookSpec, InputStatistics, LayerProblem, LayerQuantizer, Statistic, layer_loss
from quantlab.calibration.tokens import calibration_windows, load_tokenizer
from quantlab.engine.samples import LayerSample, layer_samples
from quantlab.evaluate.protocols import WindowOptions, evaluation_windows, find_protocol
from quantlab.models import resolve_model

REFERENCE, BASELINE = "gptq", "rtn"
SYNTHETIC_SHAPE = (128, 256)
TOKENS_PER_INPUT = 16

Kind = Literal["model", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of one method on one layer."""

    method: str
    bits: int
    kind: Kind
    layer: str
    calibration: float
    held_out: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on all layers of a kind.

    Attributes:
        calibration: geometric mean of the losses relative to GPTQ, on the text that layers were solved with.
        held_out: the same on the other text.
        worst_against_rtn: the largest held-out loss of a layer relative to round-to-nearest.
        worst_layer: which one that is.
    """

    kind: Kind
    bits: int
    method: str
    layers: int
    calibration: float
    held_out: float
    worst_against_rtn: float
    worst_layer: str
    seconds: float


def main() -> None:
    """Run, print, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=usable_methods())
    parser.add_argument("--seeds", type=int, default=3, help="synthetic layers, and runs end to end; 0 for neither")
    parser.add_argument("--model", default="demo", help="folder, hub id or alias; none for synthetic layers only")
    parser.add_argument("--text", default="stdlib", help="text source for the layers of the model")
    parser.add_argument("--samples", type=int, default=16, help="windows of each text")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--every-layer", action="store_true", help="print every layer of the model, too")
    parser.add_argument("--end-to-end", type=Path, metavar="FOLDER", help="compare whole models; runs are kept there")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    methods = list(dict.fromkeys([REFERENCE, BASELINE, *arguments.methods]))
    samples: list[tuple[Kind, LayerSample]] = [("synthetic", synthetic_layer(seed)) for seed in range(arguments.seeds)]
    if arguments.model != "none":
        texts = arguments.text, arguments.samples, arguments.sequence_length
        samples += [("model", sample) for sample in model_layers(arguments.model, *texts)]
    losses = [loss for bits in arguments.bits for loss in measure(samples, methods, bits)]
    rows = [row for bits in arguments.bits for kind in ("synthetic", "model") for row in summarize(losses, kind, bits)]
    if arguments.every_layer:
        print_layers([loss for loss in losses if loss.kind == "model"])
    print_rows(rows)
    if arguments.end_to_end and arguments.model != "none" and arguments.seeds:
        subprocess.run(comparison_command(arguments, methods), check=True)
    if arguments.json:
        record = {"rows": [asdict(row) for row in rows], "layers": [asdict(loss) for loss in losses]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def usable_methods() -> list[str]:
    """The installed methods that layers with Hessians are enough for."""
    return [name for name in registry.available() if Statistic.FISHER not in registry.load(name).info.needs]


def configured(method: str) -> LayerQuantizer:
    """A method by NAME or NAME@PRESET."""
    name, _, preset = method.partition("@")
    return registry.configure(name, preset=preset or None, options={})


def synthetic_layer(seed: int) -> LayerSample:
    """Heavy-tailed weights, and correlated inputs of unequal strength, drawn twice."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = SYNTHETIC_SHAPE
    factors = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1).rsqrt()
    mixing = factors * (0.5 * torch.randn(columns, 1, generator=generator)).exp()
    spread = torch.randn(5, rows, columns, generator=generator).square().mean(dim=0).sqrt()

    def draw() -> InputStatistics:
        tokens = TOKENS_PER_INPUT * columns
        inputs = torch.randn(tokens, columns, generator=generator) @ mixing.T
        return InputStatistics(hessian=inputs.T @ inputs / tokens, num_tokens=tokens)

    weight = torch.randn(rows, columns, generator=generator) / spread
    return LayerSample(name=f"seed {seed}", weight=weight, calibration=draw(), held_out=draw())


def model_layers(model: str, text: str, samples: int, sequence_length: int) -> Iterator[LayerSample]:
    """The layers of a model with the Hessians of its calibration and of its held-out text."""
    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    calibration = calibration_windows(tokenizer, text, samples, sequence_length, seed=0).ids
    options = WindowOptions(sequence_length=sequence_length, num_windows=samples)
    held_out = evaluation_windows(tokenizer, find_protocol(text), options).ids
    for sample in layer_samples(folder, calibration, held_out, torch.float32):
        yield LayerSample(
            name=sample.name,
            weight=sample.weight.clone(),
            calibration=sample.calibration,
            held_out=sample.held_out,
        )


def measure(samples: Iterable[tuple[Kind, LayerSample]], methods: Sequence[str], bits: int) -> Iterator[Losses]:
    """Solve every layer with every method that takes this code width."""
    spec = CodebookSpec(bits=bits)
    chosen = {name: configured(name) for name in methods}
    for kind, sample in samples:
        problem = LayerProblem(name=sample.name, weight=sample.weight, spec=spec, statistics=sample.calibration)
        for name, method in chosen.items():
            if bits not in method.info.bits:
                continue
            started = time.perf_counter()
            found = method.quantize(problem).dequantize()
            seconds = time.perf_counter() - started
            calibration, held_out = (
                layer_loss(sample.weight, found, statistics.hessian).sum().item()
                for statistics in (sample.calibration, sample.held_out)
            )
            yield Losses(
                method=name,
                bits=bits,
                kind=kind,
                layer=sample.name,
                calibration=calibration,
                held_out=held_out,
                seconds=seconds,
            )


def summarize(losses: Sequence[Losses], kind: Kind, bits: int) -> Iterator[Row]:
    """One row for every method on the layers of a kind."""
    by_method: dict[str, dict[str, Losses]] = {}
    for loss in losses:
        if (loss.kind, loss.bits) == (kind, bits):
            by_method.setdefault(loss.method, {})[loss.layer] = loss
    for name, layers in by_method.items():
        reference, baseline = by_method[REFERENCE], by_method[BASELINE]
        against_rtn = {layer: loss.held_out / baseline[layer].held_out for layer, loss in layers.items()}
        worst = max(against_rtn, key=against_rtn.__getitem__)
        yield Row(
            kind=kind,
            bits=bits,
            method=name,
            layers=len(layers),
            calibration=geometric_mean(loss.calibration / reference[key].calibration for key, loss in layers.items()),
            held_out=geometric_mean(loss.held_out / reference[key].held_out for key, loss in layers.items()),
            worst_against_rtn=against_rtn[worst],
            worst_layer=worst,
            seconds=sum(loss.seconds for loss in layers.values()),
        )


def comparison_command(arguments: argparse.Namespace, methods: Sequence[str]) -> list[str]:
    """`quantlab compare` of the same methods on the same texts."""
    samples, length = str(arguments.samples), str(arguments.sequence_length)
    command = [sys.executable, "-m", "quantlab", "compare", *methods, "--model", arguments.model, "--dtype", "float32"]
    command += ["--bits", ",".join(map(str, arguments.bits)), "--seeds", str(arguments.seeds)]
    command += ["--calibration", arguments.text, "--perplexity", arguments.text, "--num-samples", samples]
    command += ["--num-windows", samples, "--sequence-length", length, "--output-dir", str(arguments.end_to_end)]
    return [*command, "--quiet"]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def print_layers(losses: Sequence[Losses]) -> None:
    """Every layer: losses relative to those of GPTQ."""
    reference = {(loss.bits, loss.layer): loss for loss in losses if loss.method == REFERENCE}
    table = Table(header_style="bold")
    for title in ("layer", "method"):
        table.add_column(title, no_wrap=True)
    for title in ("bits", "calibration", "held-out"):
        table.add_column(title, justify="right", no_wrap=True)
    for loss in losses:
        gptq = reference[loss.bits, loss.layer]
        figures = (loss.calibration / gptq.calibration, loss.held_out / gptq.held_out)
        table.add_row(loss.layer, loss.method, str(loss.bits), *(f"{value:.3f}" for value in figures))
    Console(width=140).print(table)


def print_rows(rows: Sequence[Row]) -> None:
    """One table."""
    table = Table(header_style="bold")
    for title in ("layers", "method", "worst layer"):
        table.add_column(title, no_wrap=True)
    for title in ("bits", "calibration", "held-out", "worst vs rtn", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        figures = (f"{value:.3f}" for value in (row.calibration, row.held_out, row.worst_against_rtn))
        table.add_row(
            f"{row.layers} {row.kind}", row.method, row.worst_layer, str(row.bits), *figures, f"{row.seconds:.1f}"
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    with torch.no_grad():
        main()
