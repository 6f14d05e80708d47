import json
from pathlib import Path

import pytest
import torch

from quantlab.calibration.tokens import load_tokenizer
from quantlab.evaluate.perplexity import in_memory, measure
from quantlab.evaluate.protocols import WindowOptions, evaluation_windows, find_protocol
from quantlab.models import resolve_model
from quantlab.progress import NoProgress
from quantlab.skeleton import build_skeleton, load_model, read_config

FOLDER = resolve_model("demo")


def test_it_is_small_enough_to_ship_and_large_enough_to_be_a_language_model():
    model = build_skeleton(read_config(FOLDER), torch.float32)
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000
    assert 2e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    assert read_config(FOLDER).dtype == torch.bfloat16


def test_it_has_grouped_query_attention_and_tied_embeddings():
    config = read_config(FOLDER)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings


def test_its_tokenizer_is_lossless():
    tokenizer = load_tokenizer(FOLDER)
    text = "def f(x):\n\treturn 'é→' + x  # \x00 \U0001f600\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == read_config(FOLDER).vocab_size


def test_it_predicts_held_out_code_as_well_as_its_card_says():
    options = WindowOptions(sequence_length=512, num_windows=16)
    windows = evaluation_windows(load_tokenizer(FOLDER), find_protocol("stdlib"), options)
    card = json.loads((FOLDER / "training.json").read_text())
    measured = measure(windows, in_memory(load_model(FOLDER, torch.float32)), NoProgress())
    assert measured["perplexity"] == pytest.approx(
        card["held_out_perplexity"], rel=0.25
    )  # a sample of another Python's text


def test_its_card_quotes_the_record_of_its_training():
    record = json.loads((FOLDER / "training.json").read_text())
    card = (Path(FOLDER).parent / "MODEL_CARD.md").read_text()
    for value in (
        f"{record['steps']:,} steps",
        f"{record['parameters']:,} parameters",
        f"perplexity {record['held_out_perplexity']:.2f}",
        f"{record['held_out_bits_per_byte']:.3f} bits per byte",
    ):
        assert value in card
