"""The end table of a run: the float model above, the quantized model below."""

from rich.table import Table

from quantlab.report.record import RunRecord
from quantlab.report.units import format_bytes, format_duration

MARGIN = 0.01
"""Smaller differences from round-to-nearest are no result: rounding to storage precision alone makes some."""


def summary_table(record: RunRecord) -> Table:
    """The end table for the terminal."""
    header, *rows = summary_rows(record)
    table = Table(header_style="bold")
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def summary_rows(record: RunRecord) -> list[list[str]]:
    """The end table as text: the header, the float model, the quantized model."""
    manifest = record.manifest
    header = ["model", "bits/weight", "size"]
    reference = ["float", f"{record.source_bits_per_weight:.4g}", format_bytes(manifest["source_bytes"])]
    quantized = [record.label, f"{manifest['bits_per_weight']:.3f}", format_bytes(manifest["checkpoint_bytes"])]
    for corpus, values in record.perplexity.items():
        header += [f"perplexity {corpus}", "KL to float"]
        reference += [f"{values['float']:.3f}", ""]
        quantized += [
            f"{values['quantized']:.3f} ({values['quantized'] - values['float']:+.3f})",
            f"{values['kl']:.4f}",
        ]
    before, after = record.mean_accuracy("float"), record.mean_accuracy("quantized")
    if before is not None and after is not None:
        header.append("mean accuracy" if len(record.tasks) > 1 else f"accuracy {next(iter(record.tasks))}")
        reference.append(f"{before:.2%}")
        quantized.append(f"{after:.2%}")
    header += ["quantization", "peak memory"]
    reference += ["", ""]
    quantized += [format_duration(manifest["stages_s"]["quantize"]), format_bytes(manifest["peak_rss_bytes"])]
    return [header, reference, quantized]


def profile_line(record: RunRecord) -> str:
    """Where the time of quantizing went, the largest part first, for example "forward 61%, solve 31%, write 2%"."""
    parts = sorted(record.quantizing_s.items(), key=lambda part: -part[1])
    total_s = sum(seconds for _, seconds in parts) or 1.0
    return ", ".join(f"{name} {seconds / total_s:.0%}" for name, seconds in parts)


def verdict(record: RunRecord) -> str:
    """The result of a run in a few sentences."""
    manifest = record.manifest
    shrinkage = manifest["source_bytes"] / manifest["checkpoint_bytes"]
    storage = (
        f"{record.label} stores the quantized weights in {manifest['bits_per_weight']:.3f} bits each and makes the "
        f"checkpoint {shrinkage:.1f} times smaller"
    )
    changes = [_change(values["float"], values["quantized"], corpus) for corpus, values in record.perplexity.items()]
    perplexity = f"; perplexity goes from {', '.join(changes)}" if changes else "; perplexity was not measured"
    return f"{storage}{perplexity}. {_layers_verdict(record)}"


def _change(reference: float, quantized: float, corpus: str) -> str:
    return f"{reference:.3f} to {quantized:.3f} ({quantized / reference - 1:+.2%}) on {corpus}"


def _layers_verdict(record: RunRecord) -> str:
    layers = record.manifest["layers"]
    lower = sum(layer["relative_loss"] < (1 - MARGIN) * layer["rtn_relative_loss"] for layer in layers)
    higher = sum(layer["relative_loss"] > (1 + MARGIN) * layer["rtn_relative_loss"] for layer in layers)
    sentence = (
        f"Against round-to-nearest, the loss is more than {MARGIN:.0%} lower in {lower} of {len(layers)} layers "
        f"and more than {MARGIN:.0%} higher in {higher}."
    )
    fallbacks = record.manifest["fallbacks"]
    return f"{sentence} {len(fallbacks)} fallbacks were used." if fallbacks else sentence
