"""The pipeline as a whole, on a tiny random model."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quantlab
from quantlab import pipeline
from quantlab.checkpoint.serialize import write_safetensors
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import DataError, QualityError, RecipeError, UsageError
from quantlab.evaluate import subject
from quantlab.plan import plan_run
from quantlab.recipe import load_recipe
from quantlab.recipe.layers import assign_methods
from quantlab.skeleton import read_config

TEXT = "def area(radius):\n    return 3.14159 * radius ** 2  # of a circle\n\n" * 200


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model_folder, tmp_path):
    """A function that writes a recipe, with changes, and returns its path."""
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text(TEXT[:4000])

    def write(**changes):
        content = {
            "version": 1,
            "model": {"path": str(model_folder)},
            "calibration": {"name": f"file:{tmp_path / 'train.txt'}", "num_samples": 4, "sequence_length": 32},
            "method": {"name": "ganq", "bits": 3, "iterations": 2},
            "evaluation": {"perplexity": [f"file:{tmp_path / 'test.txt'}"], "sequence_length": 16},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_run_leaves_a_complete_folder(recipe, tmp_path):
    folder = quantlab.run(recipe(), output_dir=tmp_path / "run")
    assert folder == tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("recipe.yaml", "recipe.resolved.yaml", "manifest.json", "eval.json", "report.md", "log.txt", "model")
    }
    manifest = read(folder, "manifest.json")
    assert len(manifest["layers"]) == 2 * 7
    assert manifest["fallbacks"] == []
    assert manifest["method"]["options"]["iterations"] == 2
    assert manifest["drive_mode"] == "record"
    assert sum(manifest["engine_s"].values()) <= manifest["stages_s"]["quantize"]
    assert manifest["calibration"]["tokens"] == 4 * 32
    (result,) = read(folder, "eval.json")["perplexity"].values()
    assert result["float"] != result["quantized"]
    assert result["tokens"] == result["windows"] * 16


def test_recorded_hashes_are_those_of_the_files(recipe, tmp_path):
    folder = quantlab.run(recipe(), output_dir=tmp_path / "run")
    recorded = read(folder, "manifest.json")["files"]
    actual = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "model").iterdir()}
    assert recorded == actual


def test_the_same_run_twice_gives_identical_checkpoints(recipe, tmp_path):
    folders = [quantlab.run(recipe(), output_dir=tmp_path / name) for name in ("first", "second")]
    first, second = (read(folder, "manifest.json")["files"] for folder in folders)
    assert first == second


def test_bits_per_weight_counts_codes_and_codebooks(recipe, tmp_path):
    folder = quantlab.run(recipe(), output_dir=tmp_path / "run")
    # Rows of 32 and of 64 weights: 3 bits each, and 8 levels of 16 bits per row.
    shapes = [layer["shape"] for layer in read(folder, "manifest.json")["layers"]]
    bits = sum(rows * (3 * columns + 8 * 16) for rows, columns in shapes)
    assert read(folder, "manifest.json")["bits_per_weight"] == bits / sum(rows * columns for rows, columns in shapes)


def test_the_resolved_recipe_repeats_the_run(recipe, tmp_path):
    first = quantlab.run(recipe(), output_dir=tmp_path / "first")
    second = quantlab.run(first / "recipe.resolved.yaml", output_dir=tmp_path / "second")
    assert read(first, "manifest.json")["files"] == read(second, "manifest.json")["files"]


def test_evaluation_can_be_left_out(recipe, tmp_path):
    folder = quantlab.run(recipe(evaluation={"perplexity": [], "sequence_length": 16}), output_dir=tmp_path / "run")
    assert read(folder, "eval.json")["perplexity"] == {}


def test_an_occupied_output_folder_is_refused_and_untouched(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        quantlab.run(recipe(), output_dir=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": {"name": "rtn", "bits": 3, "group_size": 48}}, RecipeError, "q_proj and 11 more: .*=48"),
        (
            {"evaluation": {"sequence_length": 64}},
            RecipeError,
            "evaluation.sequence_length=64 is longer than the model's context of 32 tokens",
        ),
        ({"calibration": {"name": "file:absent.txt", "sequence_length": 32}}, DataError, "absent.txt"),
        ({"evaluation": {"perplexity": ["file:absent.txt"], "sequence_length": 16}}, DataError, "absent.txt"),
    ],
    ids=["groups", "context", "calibration", "evaluation"],
)
def test_a_run_that_cannot_succeed_ends_before_the_work_and_leaves_nothing(
    recipe, tmp_path, monkeypatch, changes, error, message
):
    monkeypatch.setattr(pipeline, "quantize_model", None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        quantlab.run(recipe(**changes), output_dir=tmp_path / "runs" / "deep" / "run")
    assert sorted(tmp_path.iterdir()) == sorted({*before, tmp_path / "recipe.yaml"})


def test_calibrating_and_evaluating_on_the_same_file_is_refused(recipe, tmp_path):
    same = f"file:{tmp_path / 'train.txt'}"
    with pytest.raises(RecipeError, match="text that the method has not seen"):
        quantlab.run(recipe(evaluation={"perplexity": [same], "sequence_length": 16}), output_dir=tmp_path / "run")


def test_a_checkpoint_that_does_not_reproduce_the_model_fails_the_run(recipe, tmp_path, monkeypatch):
    def damaged(folder, **options):
        model = quantlab.load(folder, **options)
        model.model.norm.weight += 0.01
        return model

    monkeypatch.setattr(subject, "load", damaged)
    with pytest.raises(QualityError, match="does not reproduce the quantized model"):
        quantlab.run(recipe(), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_within_a_memory_budget_the_evaluation_is_streamed_and_finds_the_same(recipe, tmp_path, monkeypatch):
    budget = {"memory_budget": "1GiB"}
    in_memory = quantlab.run(recipe(), output_dir=tmp_path / "in_memory")
    monkeypatch.setattr(subject, "load", None)
    monkeypatch.setattr(subject, "load_model", None)
    streamed = quantlab.run(recipe(engine=budget), output_dir=tmp_path / "streamed")
    assert read(streamed, "eval.json") == read(in_memory, "eval.json")
    assert read(streamed, "manifest.json")["memory"]["budget_bytes"] == 2**30
    assert not (streamed / "work").exists()


def test_a_damaged_checkpoint_fails_the_streamed_check_too(recipe, tmp_path, monkeypatch):
    finish = CheckpointWriter.finish

    def damage(writer, *args):
        finish(writer, *args)
        tensors = load_file(writer.path("quantlab-rest.safetensors"))
        write_safetensors(writer.path("quantlab-rest.safetensors"), {key: t + 0.01 for key, t in tensors.items()})

    monkeypatch.setattr(CheckpointWriter, "finish", damage)
    with pytest.raises(QualityError, match="does not reproduce the quantized model"):
        quantlab.run(recipe(engine={"memory_budget": "1GiB"}), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_deterministic_runs_do_not_depend_on_the_number_of_threads(recipe, tmp_path, model_folder):
    wide = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=1, max_position_embeddings=32
    )
    shutil.copytree(model_folder, tmp_path / "wide")
    torch.manual_seed(0)
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    changes = {
        "model": {"path": str(tmp_path / "wide")},
        "method": {"name": "gptq", "bits": 3},
        "engine": {"deterministic": True},
    }
    threads = torch.get_num_threads()
    files = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            folder = quantlab.run(recipe(**changes), output_dir=tmp_path / str(number))
            assert torch.get_num_threads() == number
            files.append(read(folder, "manifest.json")["files"])
    finally:
        torch.set_num_threads(threads)
    assert files[0] == files[1]


def test_statistics_that_contradict_each_other_are_refused(recipe, tmp_path):
    section = yaml.safe_load(recipe().read_text())["calibration"] | {"inputs": "float", "target_alpha": 1}
    with pytest.raises(RecipeError, match=r"section calibration: target_alpha=1\.0"):
        quantlab.run(recipe(calibration=section), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_tied_weights_once(recipe, model_folder):
    plan = plan_run(assign_methods(load_recipe(recipe())), read_config(model_folder))
    block = 4 * 32 * 32 + 3 * 32 * 64
    assert plan.quantized_parameters == 2 * block
    assert plan.parameters == 2 * (block + 2 * 32) + 300 * 32 + 32
    assert len(plan.quantized) == 14
