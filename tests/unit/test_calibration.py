import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlab.calibration.sources import load_documents
from quantlab.calibration.stdlib import is_held_out, read_documents
from quantlab.calibration.tokens import calibration_windows, evaluation_windows
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
    train, held_out = read_documents("train"), read_documents("held_out")
    assert train.keys().isdisjoint(held_out)
    assert all(is_held_out(name) for name in held_out)
    assert 0.02 < len(held_out) / len(train) < 0.15


def test_the_standard_library_holds_code_and_prose_but_no_tests():
    names = {*read_documents("train"), *read_documents("held_out")}
    assert {"json.decoder", "argparse", "pydoc_data.topics:assignment"} <= names
    assert not [name for name in names if "test" in name.split(".") or "site-packages" in name]


def test_the_order_of_documents_is_fixed():
    assert list(read_documents("held_out")) == sorted(read_documents("held_out"))


def test_evaluation_windows_do_not_overlap_and_follow_the_text(tokenizer, text):
    windows = evaluation_windows(tokenizer, text, sequence_length=26, num_windows=None)
    assert windows.ids.shape == (40, 26)
    assert (windows.ids == torch.arange(2, 28)).all()


def test_fewer_evaluation_windows_are_spread_over_the_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 50 + "b" * 50)
    windows = evaluation_windows(tokenizer, f"file:{path}", sequence_length=10, num_windows=2)
    assert windows.ids.tolist() == [[2] * 10, [3] * 10]


def test_calibration_windows_are_stretches_of_the_text_chosen_by_the_seed(tokenizer, text):
    first = calibration_windows(tokenizer, text, num_samples=50, sequence_length=8, seed=0)
    again = calibration_windows(tokenizer, text, num_samples=50, sequence_length=8, seed=0)
    other = calibration_windows(tokenizer, text, num_samples=50, sequence_length=8, seed=1)
    assert first.ids.shape == (50, 8)
    steps = first.ids.diff(dim=1)
    assert ((steps == 1) | (steps == -25) | (first.ids[:, 1:] == 0)).all()
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256


def test_documents_are_closed_by_the_end_of_text_token(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc")
    windows = evaluation_windows(tokenizer, f"file:{path}", sequence_length=4, num_windows=None)
    assert windows.ids.tolist() == [[2, 3, 4, 0]]


def test_a_text_shorter_than_one_window_is_refused(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abc")
    with pytest.raises(DataError, match=r"has 4 tokens, fewer than one window of 100"):
        evaluation_windows(tokenizer, f"file:{path}", sequence_length=100, num_windows=None)


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
    with pytest.raises(DataError, match="the text sources are stdlib and file:PATH"):
        load_documents("wikitext", "train")
