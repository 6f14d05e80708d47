"""A run that ends early, in whatever way, is continued by the same call and ends with the same files."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig, PreTrainedTokenizerFast

import quantlab
from quantlab import pipeline
from quantlab.cli.app import invoke
from quantlab.engine import stream
from quantlab.errors import CheckpointError, NumericalError, ResumableError, UsageError
from quantlab.recipe import load_recipe
from quantlab.recipe.layers import assign_methods
from quantlab.workspace import working_in

TEXT = "def area(radius):\n    return 3.14159 * radius ** 2  # of a circle\n\n" * 40
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}

# Imports once, then forks a process per trial, which dies or is told to stop at one of its own calls of fsync: these
# separate everything that a crash can separate.
TRIALS = """
import os, signal, sys
from pathlib import Path
import quantlab
from quantlab.engine import stream
recipe, folder, *points = sys.argv[1:]
fsync = os.fsync
for point in points:
    child = os.fork()
    if child == 0:
        remaining = int(point)
        def counted(descriptor):
            global remaining
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)
        os.fsync = counted
        quantlab.run(recipe, output_dir=Path(folder) / point)
        os._exit(0)
    print(point, os.waitpid(child, 0)[1])
"""


def save_tiny(folder, config):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def write_recipe(tmp_path_factory):
    """A function that writes a recipe for a model folder and returns its path."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "train.txt").write_text(TEXT)
    (folder / "test.txt").write_text(TEXT[:2000])

    def write(model, **changes):
        content = {
            "version": 1,
            "model": {"path": str(model)},
            "calibration": {"name": f"file:{folder / 'train.txt'}", "num_samples": 4, "sequence_length": 16},
            "method": {"name": "gptq", "bits": 3},
            "evaluation": {"perplexity": [f"file:{folder / 'test.txt'}"], "sequence_length": 16, "num_windows": 2},
            "engine": {"deterministic": True},
        }
        path = folder / f"{model.name}-{len(list(folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


@pytest.fixture(scope="module")
def recipe(tiny_llama, write_recipe):
    return write_recipe(tiny_llama)


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    return contents(quantlab.run(recipe, output_dir=tmp_path_factory.mktemp("whole") / "run"))


def contents(folder):
    """Hashes of the checkpoint, and the names of everything in the run folder."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "model").iterdir()}
    return files, sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def at_fsync(monkeypatch, number, act, *, of_any_thread=True):
    """Do something at one of the coming calls of fsync, of any thread or of the main thread alone."""
    fsync, calls = os.fsync, iter(range(1, 10**6))

    def counted(descriptor):
        counts = of_any_thread or threading.current_thread() is threading.main_thread()
        if counts and next(calls) == number:
            act()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)


def fail(error):
    def act(*_, **__):
        raise error

    return act


def killed_runs(recipe, folder, points):
    """Kill a run at each of the points; returns the run folders of those that were killed before their end."""
    arguments = [sys.executable, "-c", TRIALS, str(recipe), str(folder), *map(str, points)]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    states = dict(map(str.split, result.stdout.splitlines()))
    assert set(states.values()) <= {"0", str(int(signal.SIGKILL))}, result.stderr
    return [folder / point for point in states if (folder / point / "journal.jsonl").exists()]


def test_a_killed_run_is_continued_and_ends_with_the_same_files(recipe, uninterrupted, tmp_path):
    killed = killed_runs(recipe, tmp_path, [18, 30])
    assert len(killed) == 2
    for folder in killed:
        assert contents(quantlab.run(recipe, output_dir=folder)) == uninterrupted


@pytest.mark.slow
def test_a_run_may_be_killed_anywhere_and_more_than_once(recipe, uninterrupted, tmp_path):
    killed = killed_runs(recipe, tmp_path, range(1, 60))
    assert len(killed) >= 20
    complete = [tmp_path / str(point) for point in range(1, 60) if tmp_path / str(point) not in killed]
    assert all(contents(folder) == uninterrupted for folder in complete)
    again = [tmp_path / "again" / str(point) for point in range(1, len(killed) + 1)]
    again[0].parent.mkdir()
    for folder, moved in zip(killed, again, strict=True):
        folder.rename(moved)
    unfinished = killed_runs(recipe, tmp_path / "again", range(1, len(killed) + 1))
    assert len(unfinished) >= 10
    for folder in unfinished:
        quantlab.run(recipe, output_dir=folder)
    assert all(contents(folder) == uninterrupted for folder in again)


def test_finished_blocks_are_not_solved_again(recipe, uninterrupted, tmp_path, monkeypatch):
    solved = []
    quantize_block = stream.quantize_block
    monkeypatch.setattr(stream, "quantize_block", lambda job: solved.append(job.place.index) or quantize_block(job))
    answers = iter([False, True])
    with pytest.raises(ResumableError, match="stopped after block 2 of 3"):
        run(recipe, tmp_path / "run", stop=lambda: next(answers))
    folder = run(recipe, tmp_path / "run")
    assert solved == [0, 1, 2]
    assert contents(folder) == uninterrupted
    assert len(json.loads((folder / "manifest.json").read_text())["layers"]) == 3 * 7


def run(recipe, folder, stop=lambda: False):
    loaded = load_recipe(recipe)
    model = Path(loaded.recipe.model.path)
    return pipeline.execute(assign_methods(loaded), model, folder, pipeline.NoProgress(), "test", stop)


@pytest.mark.parametrize("number", [1, 12, 20, 30])
def test_a_full_disk_is_explained_and_the_run_continued(recipe, uninterrupted, tmp_path, monkeypatch, number):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_fsync(patch, number, fail(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises((ResumableError, OSError), match="No space left on device"):
            quantlab.run(recipe, output_dir=folder)
    assert contents(quantlab.run(recipe, output_dir=folder)) == uninterrupted


def test_a_file_that_cannot_grow_is_treated_like_a_full_disk(recipe, uninterrupted, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, limit[1]))
    try:
        with pytest.raises(ResumableError, match=r"cannot write .*free some space"):
            quantlab.run(recipe, output_dir=tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(quantlab.run(recipe, output_dir=tmp_path / "run")) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_the_current_block(recipe, uninterrupted, tmp_path, monkeypatch, capfd, number):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_fsync(patch, 10, lambda: os.kill(os.getpid(), number))
        assert invoke(["run", str(recipe), "--output-dir", str(folder), "-q"]) == 75
    message = capfd.readouterr().err
    assert "stopping after the current block" in message
    assert "stopped after block 1 of 3" in message
    assert f"{folder} keeps what is finished (1 blocks); the same command continues the run" in message
    assert invoke(["run", str(recipe), "--output-dir", str(folder), "-q"]) == 0
    assert contents(folder) == uninterrupted


def test_a_second_interrupt_ends_the_run_at_once(recipe, uninterrupted, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_fsync(patch, 10, interrupt_twice, of_any_thread=False)  # where Python handles signals one by one
        assert invoke(["run", str(recipe), "--output-dir", str(folder), "-q"]) == 130
    assert "keeps what is finished" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert contents(quantlab.run(recipe, output_dir=folder)) == uninterrupted


def test_a_run_is_stopped_during_the_evaluation_too(recipe, uninterrupted, tmp_path):
    answers = iter([False] * 3 + [True])
    with pytest.raises(ResumableError, match="stopped while measuring perplexity"):
        run(recipe, tmp_path / "run", stop=lambda: next(answers))
    assert contents(run(recipe, tmp_path / "run")) == uninterrupted


def test_a_run_killed_while_tidying_up_is_tidied_up(recipe, uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for left in ("work", "journal.jsonl"):
        with monkeypatch.context() as patch:
            patch.setattr("quantlab.workspace.shutil", SimpleNamespace(rmtree=fail(KeyboardInterrupt())))
            with pytest.raises(KeyboardInterrupt):
                quantlab.run(recipe, output_dir=folder)
        if left == "journal.jsonl":
            shutil.rmtree(folder / "work")
        assert (folder / left).exists()
        with pytest.raises(UsageError, match=r"seed: was 0, is 1"):
            quantlab.run(recipe, overrides=["seed=1"], output_dir=folder)
        assert contents(quantlab.run(recipe, output_dir=folder)) == uninterrupted
        shutil.rmtree(folder)


@pytest.fixture
def stopped(recipe, tmp_path):
    """A run folder that was stopped after its first block."""
    with pytest.raises(ResumableError):
        run(recipe, tmp_path / "run", stop=lambda: True)
    return tmp_path / "run"


def test_another_recipe_is_refused_with_the_differences(recipe, stopped):
    before = contents(stopped)
    with pytest.raises(UsageError) as caught:
        quantlab.run(recipe, overrides=["method.bits=4", "seed=1"], output_dir=stopped)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "method.bits: was 3, is 4" in lines
    assert "seed: was 0, is 1" in lines
    assert any(line.startswith("calibration.token_sha256: ") for line in lines)
    assert len(lines) == 5
    assert contents(stopped) == before


def test_where_hidden_states_are_kept_may_change(recipe, uninterrupted, stopped):
    folder = quantlab.run(recipe, overrides=["engine.activations=disk"], output_dir=stopped)
    assert contents(folder) == uninterrupted


def test_other_weights_are_refused(recipe, stopped, tiny_llama):
    weights = tiny_llama / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        with pytest.raises(UsageError, match=r"weights\.model\.safetensors: was"):
            quantlab.run(recipe, output_dir=stopped)
    finally:
        weights.write_bytes(original)


def test_a_damaged_shard_or_hidden_state_is_not_built_upon(recipe, stopped):
    for pattern in ("model/quantlab-block-00000.safetensors", "work/quantized/block-00001/*"):
        (file,) = stopped.glob(pattern)
        original = file.read_bytes()
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{file.name} is missing or not as it was written"):
            quantlab.run(recipe, output_dir=stopped)
        file.write_bytes(original)
    assert stopped.is_dir()


def test_a_torn_last_line_of_the_journal_is_ignored(recipe, uninterrupted, stopped):
    with (stopped / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"kind": "block", "shard"')
    assert contents(quantlab.run(recipe, output_dir=stopped)) == uninterrupted


def test_a_damaged_journal_is_refused(recipe, stopped):
    journal = stopped / "journal.jsonl"
    journal.write_bytes(b"{" + journal.read_bytes())
    with pytest.raises(UsageError, match=r"journal\.jsonl is damaged"):
        quantlab.run(recipe, output_dir=stopped)


def test_a_folder_has_one_writer(stopped):
    with (
        working_in(stopped),
        pytest.raises(UsageError, match="another process is working in"),
        working_in(stopped),
    ):
        pass


def test_an_error_in_a_continued_run_keeps_what_the_first_process_finished(recipe, uninterrupted, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stream, "quantize_block", fail(NumericalError("singular")))
        with pytest.raises(NumericalError, match="singular"):
            quantlab.run(recipe, output_dir=stopped)
    assert contents(quantlab.run(recipe, output_dir=stopped)) == uninterrupted


def test_a_run_that_cannot_succeed_leaves_nothing_however_far_it_was(recipe, tmp_path, monkeypatch):
    quantize_block = stream.quantize_block

    def fail_late(job):
        if job.place.index == 2:
            raise NumericalError("singular")
        return quantize_block(job)

    monkeypatch.setattr(stream, "quantize_block", fail_late)
    with pytest.raises(NumericalError, match="singular"):
        quantlab.run(recipe, output_dir=tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_allocation_that_fails_ends_with_advice_and_can_be_continued(
    recipe, uninterrupted, tmp_path, monkeypatch, capsys
):
    quantize_block = stream.quantize_block

    def allocate(job):
        if job.place.index == 1:
            torch.empty(1 << 60, dtype=torch.uint8)
        return quantize_block(job)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stream, "quantize_block", allocate)
        assert invoke(["run", str(recipe), "--output-dir", str(folder), "-q"]) == 4
    assert "--set engine.memory_budget=" in capsys.readouterr().err
    assert contents(quantlab.run(recipe, output_dir=folder)) == uninterrupted


def test_blocks_that_share_state_are_replayed(write_recipe, tmp_path):
    sizes = SIZES | {"num_hidden_layers": 4, "head_dim": 8, "num_key_value_heads": 2}
    layer_types = ["sliding_attention", "full_attention"] * 2
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
    config = Gemma4TextConfig(**sizes, num_kv_shared_layers=2, layer_types=layer_types, sliding_window=8, **per_layer)
    recipe = write_recipe(save_tiny(tmp_path / "gemma4", config))
    whole = contents(quantlab.run(recipe, output_dir=tmp_path / "whole"))
    answers = iter([False, True])
    with pytest.raises(ResumableError, match="stopped after block 2 of 4"):
        run(recipe, tmp_path / "run", stop=lambda: next(answers))
    assert contents(run(recipe, tmp_path / "run")) == whole
