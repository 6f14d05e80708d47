"""`quantlab generate`: text from a model, shown while it comes."""

import sys
import time

import click

from quantlab.cli.options import Session, common_options, device_option, examples


@click.command(
    short_help="Let a model continue a text.",
    epilog=examples(
        'quantlab generate demo --prompt "import os" --max-new-tokens 32',
        'quantlab generate runs/ganq_w4-demo --prompt "def main" --temperature 0.8 --top-p 0.95 --seed 1',
    ),
)
@click.argument("model", metavar="PATH")
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue; - reads it from standard input.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most to generate.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token; more draws, the more freely the higher.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw among the likeliest tokens of this total probability.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as stored]")
@device_option
@common_options
@click.pass_obj
def generate(
    session: Session,
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str | None,
    device: str,
) -> None:
    """Continue a text with the model at PATH: the folder of a run or of a checkpoint, or any float model."""
    from quantlab.evaluate.generate import GenerateOptions, generate_text
    from quantlab.evaluate.subject import find_subject

    options = GenerateOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, dtype=dtype
    )
    subject = find_subject(model, device)
    text = sys.stdin.read() if prompt == "-" else prompt
    started = time.perf_counter()
    tokens = generate_text(subject, text, options, lambda piece: click.echo(piece, nl=False))
    click.echo()
    if not session.quiet:
        seconds = time.perf_counter() - started
        click.echo(f"{tokens} tokens in {seconds:.1f} s, loading included", err=True)
