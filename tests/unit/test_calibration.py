import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlab.calibration.prepared import write_split
from quantlab.calibration.sources import load_documents
from quantlab.calibration.stdlib import is_held_out, read_documents
from quantlab.calibration.tokens import calibration_windows
from quantlab.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character a-z, and an end-of-text token."""
    vocabulary = {"<end>": 0, "?": 1} | {chr(97 + i): 2 + i for i in range(26)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="?")


@pytest.fixture
def text(tmp_path):
    """A file of 26 * 40 letters in alphabetical order, repeated."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(26 * 40)))
    return f"file:{path}"


def test_no_standard_library_document_is_in_both_splits():
    train, held_out = read_documents("train"), read_documents("test")
    assert train.keys().isdisjoint(held_out)
    assert all(is_held_out(name) for name in held_out)
    assert 0.02 < len(held_out) / len(train) < 0.15


def test_the_standard_library_holds_code_and_prose_but_no_tests():
    names = {*read_documents("train"), *read_documents("test")}
    assert {"json.decoder", "argparse", "pydoc_data.topics:assignment"} <= names
    assert not [name for name in names if "test" in name.split(".") or "site-packages" in name]


def test_the_order_of_documents_is_fixed():
    assert list(read_documents("test")) == sorted(read_documents("test"))


def test_calibration_windows_are_stretches_of_the_text_chosen_by_the_seed(tokenizer, text):
    first = calibration_windows(tokenizer, text, num_samples=50, sequence_length=8, seed=0)
    again = calibration_windows(tokenizer, text, num_samples=50, sequence_length=8, seed=0)
    other = calibration_windows(tokenizer, text, num_samples=50, sequence_length=8, seed=1)
    assert first.ids.shape == (50, 8)
    steps = first.ids.diff(dim=1)
    assert ((steps == 1) | (steps == -25) | (first.ids[:, 1:] == 0)).all()
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the text file"), (b"", "contains no text"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_an_unusable_text_file_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_documents(f"file:{path}", "train")


def test_an_unknown_text_source_names_the_known_ones():
    with pytest.raises(DataError, match=r"is 'wikitext'; did you mean wikitext2\?; there are stdlib, wikitext2"):
        load_documents("wikitext", "train")


def test_a_text_without_one_window_is_refused(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abc")
    with pytest.raises(DataError, match="no stretch of 100 tokens"):
        calibration_windows(tokenizer, f"file:{path}", num_samples=2, sequence_length=100, seed=0)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Stand-ins for C4 and WikiText-2."""
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    documents = ["ab", "".join(chr(97 + i % 26) for i in range(60)), "xyz" * 20, "q" * 10]
    write_split("c4", "train", documents, "test")
    write_split("wikitext2", "train", documents, "test")
    return documents


def test_c4_windows_are_drawn_as_in_the_code_of_gptq(tokenizer, published):
    random.seed(5)
    expected = []
    for _ in range(7):
        while True:
            document = random.randint(0, len(published) - 1)
            ids = tokenizer(published[document], return_tensors="pt").input_ids
            if ids.shape[1] > 8:
                break
        start = random.randint(0, ids.shape[1] - 8 - 1)
        expected.append(ids[:, start : start + 8])
    windows = calibration_windows(tokenizer, "c4", num_samples=7, sequence_length=8, seed=5)
    assert torch.equal(windows.ids, torch.cat(expected))


def test_wikitext_windows_are_drawn_as_in_the_code_of_gptq(tokenizer, published):
    random.seed(5)
    ids = tokenizer("\n\n".join(published), return_tensors="pt").input_ids
    starts = [random.randint(0, ids.shape[1] - 8 - 1) for _ in range(7)]
    windows = calibration_windows(tokenizer, "wikitext2", num_samples=7, sequence_length=8, seed=5)
    assert torch.equal(windows.ids, torch.cat([ids[:, start : start + 8] for start in starts]))


def test_documents_that_are_all_too_short_end_the_search(tokenizer, published):
    with pytest.raises(DataError, match="no stretch of 100 tokens"):
        calibration_windows(tokenizer, "c4", num_samples=2, sequence_length=100, seed=0)
