import gzip
import json

import pytest

from quantlab.calibration.prepare import prepare
from quantlab.calibration.prepared import data_home, prepared_corpora, prepared_splits, read_split
from quantlab.calibration.sources import load_documents, source_error
from quantlab.cli.app import invoke
from quantlab.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_DATA", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def test_lines_of_wikitext_become_documents_as_published(folder):
    (folder / "wiki.test.raw").write_text(" \n = Title = \n \n A line .\n")
    prepare("wikitext2", folder)
    assert read_split("wikitext2", "test") == ["", " = Title = \n", "", " A line .\n"]


def test_json_lines_parquet_and_compressed_files_give_the_same_documents(folder):
    import pyarrow
    import pyarrow.parquet

    texts = ["one\u2028line", "two", ""]
    rows = [{"text": text, "url": "x"} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a-train.jsonl").write_text(lines)
    (folder / "c4-validation.json.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test.parquet")
    prepared = prepare("mine", folder)
    assert [read_split("mine", split) for split in ("train", "validation", "test")] == [texts] * 3
    assert len({values.sha256 for values in prepared.values()}) == 1


def test_several_columns_make_up_one_text(folder):
    (folder / "x.jsonl").write_text(json.dumps({"title": "A. ", "body": "B."}) + "\n")
    prepare("mine", folder / "x.jsonl", split="train", columns=["title", "body"])
    assert load_documents("mine", "train") == ["A. B."]


def test_a_list_of_strings_is_a_list_of_documents(folder):
    (folder / "dev.json").write_text(json.dumps(["one", "two"]))
    prepare("mine", folder / "dev.json")
    assert read_split("mine", "validation") == ["one", "two"]


def test_splits_are_added_to_those_that_are_there(folder):
    (folder / "train.txt").write_text("first")
    (folder / "test.txt").write_text("second")
    prepare("mine", folder / "train.txt")
    prepare("mine", folder / "test.txt")
    assert list(prepared_splits("mine")) == ["test", "train"]
    assert prepared_corpora() == ["mine"]
    assert source_error("mine") is None


def test_a_corpus_that_is_not_prepared_says_what_to_fetch_and_where_to_put_it():
    with pytest.raises(DataError, match=r"wiki.train.raw and wiki.test.raw.*prepare wikitext2 --from FOLDER"):
        load_documents("wikitext2", "train")
    with pytest.raises(DataError, match=r"ptb.valid.txt.*--from FOLDER") as caught:
        load_documents("ptb", "validation")
    assert "with network" not in str(caught.value)


def test_a_missing_split_names_those_that_are_there(folder):
    (folder / "train.txt").write_text("text")
    prepare("mine", folder)
    with pytest.raises(DataError, match="the test split of mine is needed, but only its splits train are prepared"):
        load_documents("mine", "test")


def test_a_changed_file_is_noticed(folder):
    (folder / "train.txt").write_text("text")
    prepare("mine", folder)
    (data_home() / "mine" / "train.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match="its hash differs"):
        load_documents("mine", "train")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format_version": 9}', '{"format_version": 1, "splits": {"test": {}}}']
)
def test_a_damaged_description_is_one_clear_error(folder, content):
    (folder / "train.txt").write_text("text")
    prepare("mine", folder)
    (data_home() / "mine" / "corpus.json").write_text(content)
    with pytest.raises(DataError, match=r"corpus.json.*prepare the corpus again"):
        load_documents("mine", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"body": "x"}\n', "no field 'text'; name the fields of the text with --column"),
        ("train.jsonl", b"{", "cannot be read as jsonl"),
        ("train.jsonl", b'{"text": 3}\n', "cannot be read as jsonl"),
        ("train.parquet", b"PAR1", "cannot be read as parquet"),
        ("train.txt", b"\xff\xfe", "cannot be read as txt"),
        ("train.txt", b"", "contains no text"),
        ("train.pkl", b"x", "files of type .pkl are not read"),
    ],
)
def test_an_unusable_file_is_one_clear_error_and_leaves_nothing(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare("mine", folder / name)
    assert prepared_corpora() == []
    assert not list(data_home().rglob("*.jsonl"))


def test_a_file_whose_split_cannot_be_told_asks_for_it(folder):
    (folder / "texts.txt").write_text("text")
    with pytest.raises(UsageError, match="say so with --split"):
        prepare("mine", folder)


def test_an_unreachable_hub_says_what_to_bring(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"cannot get allenai/c4 .*no network.*\n.*bring en/c4-train.00000-of-01024"):
        prepare("c4")


def test_the_hub_is_asked_for_the_published_files(monkeypatch):
    import datasets

    asked = []

    def answer(repository, config, *, data_files, split):
        asked.append((repository, config, data_files, split))
        return [{"text": f"{split} text"}]

    monkeypatch.setattr(datasets, "load_dataset", answer)
    prepare("c4")
    assert read_split("c4", "validation") == ["validation text"]
    assert asked[0] == ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train")


def test_the_command_prepares_and_lists(folder, capsys):
    (folder / "train.txt").write_text("some text")
    assert invoke(["data", "prepare", "mine", "--from", str(folder)]) == 0
    assert "train       1 documents, 9 characters from train.txt" in capsys.readouterr().out
    assert invoke(["ls", "datasets"]) == 0
    assert "mine" in capsys.readouterr().out
    assert invoke(["data", "prepare", "ptb"]) == 2
    assert "quantlab data prepare ptb --from PATH" in capsys.readouterr().err
