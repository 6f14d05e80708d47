import json

import pytest

from quantlab.cli.app import invoke

TINY = ("--num-windows", "2", "--sequence-length", "64", "-q")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run: the demo model rounded to 4 bits."""
    folder = tmp_path_factory.mktemp("run") / "rtn"
    settings = ["calibration.num_samples=1", "calibration.sequence_length=32", "evaluation.perplexity=[]"]
    assert invoke(["run", "rtn_w4", *(f"--set={item}" for item in settings), "--output-dir", str(folder), "-q"]) == 0
    return folder


def test_a_run_is_compared_with_the_model_it_started_from(run_folder, capsys):
    assert invoke(["eval", str(run_folder), *TINY, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["perplexity"]["stdlib"]
    assert values["float"] < values["quantized"]
    assert values["kl"] > 0
    assert (values["windows"], values["sequence_length"], values["stride"], values["bos"]) == (2, 64, 64, "none")


def test_a_checkpoint_alone_has_a_perplexity_and_with_a_float_model_a_divergence(run_folder, capsys):
    assert invoke(["eval", str(run_folder / "model"), *TINY]) == 0
    alone = capsys.readouterr().out
    assert "perplexity on stdlib" in alone
    assert "KL to float" not in alone
    assert invoke(["eval", str(run_folder / "model"), "--against", "demo", *TINY]) == 0
    assert "KL to float" in capsys.readouterr().out


def test_results_go_to_a_file(run_folder, tmp_path):
    target = tmp_path / "eval.json"
    assert invoke(["eval", "demo", *TINY, "--stride", "32", "--output", str(target)]) == 0
    results = json.loads(target.read_text())
    assert results["perplexity"]["stdlib"]["stride"] == 32
    assert len(results["tokenizer_sha256"]) == 64


def test_models_with_different_tokenizers_are_not_compared(run_folder, tmp_path, capsys):
    from shutil import copytree

    other = tmp_path / "other"
    copytree(run_folder / "model", other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert invoke(["eval", str(other), "--against", "demo", *TINY]) == 2
    assert "have different tokenizers" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_tasks_are_printed_with_their_spread(run_folder, capsys):
    assert invoke(["eval", str(run_folder), "--tasks", "stdlib_continuation", "--limit", "4", "-q"]) == 0
    assert "task stdlib_continuation  (4 questions, 0-shot, version 1.0)" in capsys.readouterr().out


def test_profile_takes_turns_with_the_float_model(run_folder, capsys):
    assert invoke(["profile", str(run_folder), "--new-tokens", "4", "--repeats", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    float_model, quantized = results["models"].values()
    assert list(results["models"]) == ["demo", str(run_folder)]
    assert float_model["speedup"] == 1
    assert quantized["weight_bytes"] < float_model["weight_bytes"]
    assert quantized["text"].startswith("import os\n")
    low, high = quantized["speedup_range"]
    assert low <= quantized["speedup"] <= high


def test_profile_prints_a_table_and_both_texts(run_folder, capsys):
    assert invoke(["profile", str(run_folder), "--new-tokens", "3", "--repeats", "1", "-q"]) == 0
    assert capsys.readouterr().out.count("import os") == 2


def test_an_unknown_model_is_one_clear_error(capsys):
    assert invoke(["eval", "no-such-model", "-q"]) == 78
    assert "no model no-such-model" in capsys.readouterr().err
