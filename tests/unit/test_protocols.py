import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantlab.calibration.corpora import CORPORA
from quantlab.calibration.prepare import prepare
from quantlab.calibration.prepared import write_split
from quantlab.calibration.sources import protocol_error
from quantlab.errors import DataError
from quantlab.evaluate.protocols import PROTOCOLS, WindowOptions, evaluation_windows, find_protocol
from quantlab.evaluate.scores import (
    TokenScores,
    negative_log_likelihood,
    pair_scores,
    perplexity,
    scored_positions,
)

WIKITEXT = Path(__file__).parents[3] / "shared/data/text/wikitext2/wiki.test.raw"
BOS, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character, <bos> in front of a text, and an end-of-text token."""
    vocabulary = {"<bos>": BOS, "<end>": END, "?": 2} | {chr(97 + i): 3 + i for i in range(26)} | {" ": 29, "\n": 30}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<end>", unk_token="?")


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    documents = ["abc", "", "defgh" * 8, "xyz" * 9]
    for name, split in [("wikitext2", "test"), ("c4", "validation"), ("ptb", "validation"), ("ptb", "test")]:
        write_split(name, split, documents, "test")
    return documents


def cut(tokenizer, name, **options):
    return evaluation_windows(tokenizer, find_protocol(name), WindowOptions(**options))


@pytest.mark.parametrize(
    ("name", "separator"), [("wikitext2", "\n\n"), ("ptb", "\n\n"), ("ptb-new", " "), ("c4-new", " ")]
)
def test_joined_protocols_tokenise_once_and_drop_the_remainder(tokenizer, corpora, name, separator):
    stream = tokenizer(separator.join(corpora)).input_ids
    windows = cut(tokenizer, name, sequence_length=7)
    assert stream[0] == BOS
    assert windows.ids.flatten().tolist() == stream[: len(stream) // 7 * 7]
    assert windows.first_target.tolist() == [1] * (len(stream) // 7)


def test_c4_new_takes_the_first_documents_and_windows_only(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    write_split("c4", "validation", ["a"] * 1100 + ["z"] * 100, "test")
    windows = cut(tokenizer, "c4-new", sequence_length=8)
    assert windows.ids.shape == (256, 8)
    assert not (cut(tokenizer, "c4-new", sequence_length=2199).ids == 28).any()  # "z"


def test_c4_windows_are_drawn_as_in_the_code_of_gptq(tokenizer, corpora):
    random.seed(0)
    expected = []
    for _ in range(256):
        while True:
            ids = tokenizer(corpora[random.randint(0, len(corpora) - 1)], return_tensors="pt").input_ids
            if ids.shape[1] > 6:
                break
        start = random.randint(0, ids.shape[1] - 6 - 1)
        expected.append(ids[:, start : start + 6])
    assert torch.equal(cut(tokenizer, "c4", sequence_length=6).ids, torch.cat(expected))


def test_plain_documents_are_closed_by_the_end_of_text_token(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc")
    windows = cut(tokenizer, f"file:{path}", sequence_length=4)
    assert windows.ids.tolist() == [[3, 4, 5, END]]
    assert windows.bos == "none"


def test_fewer_windows_are_spread_over_the_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 50 + "b" * 50)
    assert cut(tokenizer, f"file:{path}", sequence_length=10, num_windows=2).ids.tolist() == [[3] * 10, [4] * 10]


def test_each_window_can_begin_with_the_beginning_of_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdef")
    windows = cut(tokenizer, f"file:{path}", sequence_length=4, bos="each_window")
    assert windows.ids.tolist() == [[BOS, 3, 4, 5], [BOS, 6, 7, 8]]
    assert windows.first_target.tolist() == [1, 1]


def test_with_a_stride_every_token_is_scored_once(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijk")  # and the end token
    for bos, first in [("none", 1), ("each_window", 0)]:
        length = 6 + (bos == "each_window")
        windows = cut(tokenizer, f"file:{path}", sequence_length=length, stride=2, bos=bos)
        scored = windows.ids[:, 1:][scored_positions(windows)]
        assert scored.tolist() == [*range(3 + first, 14), END], bos


def test_what_contradicts_the_protocol_or_the_tokenizer_is_refused(tokenizer, corpora):
    with pytest.raises(DataError, match=r"stride=9 does not fit .* at most the 6 tokens"):
        cut(tokenizer, "wikitext2", sequence_length=6, stride=9)
    with pytest.raises(DataError, match="its windows are random"):
        cut(tokenizer, "c4", sequence_length=6, stride=3)
    with pytest.raises(DataError, match="shorter than one window of 1,000 tokens"):
        cut(tokenizer, "c4", sequence_length=1000)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="has no beginning-of-text token"):
        cut(plain, "wikitext2", sequence_length=6, bos="each_window")


def test_every_corpus_names_its_protocols():
    assert [name for corpus in CORPORA.values() for name in corpus.protocols] == list(PROTOCOLS)
    assert protocol_error("c4-new") is None
    assert "did you mean wikitext2?" in protocol_error("wikitext-2")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="the WikiText-2 test split is not beside the checkout")
@torch.inference_mode()
def test_perplexity_on_wikitext_equals_a_straightforward_loop(tokenizer, model, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path))
    excerpt = tmp_path / "wiki.test.raw"
    excerpt.write_text(WIKITEXT.read_text(encoding="utf-8")[:40_000].lower(), encoding="utf-8")
    prepare("wikitext2", excerpt)
    windows = cut(tokenizer, "wikitext2", sequence_length=512)
    values = negative_log_likelihood(model(windows.ids).logits, windows.ids)
    ours = perplexity(TokenScores(values=values, scored=scored_positions(windows)).estimate())

    rows = [line if line.strip() else "" for line in excerpt.read_text(encoding="utf-8").splitlines(keepends=True)]
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    losses = []
    for start in range(0, ids.shape[1] - 511, 512):
        batch = ids[:, start : start + 512]
        losses.append(model(batch, labels=batch).loss)
    assert len(losses) == len(windows.ids)
    assert ours.value == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)


def test_the_standard_error_is_that_of_the_mean_of_windows():
    values = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).double()
    estimate = TokenScores(values=values, scored=torch.ones(20, 7, dtype=torch.bool)).estimate()
    means = values.mean(dim=1)
    assert estimate.value == pytest.approx(means.mean().item())
    assert estimate.standard_error == pytest.approx(means.std().item() / math.sqrt(20))


def test_tokens_that_are_not_scored_do_not_count():
    scored = torch.tensor([[True, True], [False, True]])
    values = torch.tensor([[1.0, 2.0], [0.0, 6.0]]).double()
    assert TokenScores(values=values, scored=scored).estimate().value == pytest.approx(3.0)


def test_divergence_is_zero_for_equal_models_and_positive_in_the_right_direction():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3, 5, 11, generator=generator)
    ids = torch.randint(11, (3, 5), generator=generator)
    assert pair_scores(one, one, ids)["kl"].abs().max() < 1e-6
    p, q = one[:, :-1].softmax(-1).double(), other[:, :-1].softmax(-1).double()
    scores = pair_scores(one, other, ids)
    assert torch.allclose(scores["kl"], (p * (p / q).log()).sum(-1), atol=1e-5)
    assert torch.equal(scores["float"], negative_log_likelihood(one, ids))
    assert torch.equal(scores["quantized"], negative_log_likelihood(other, ids))
    assert pair_scores(one, one, ids)["top1_agreement"].min() == 1
    assert 0 <= scores["top1_agreement"].mean() < 1
