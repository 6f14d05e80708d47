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


def test_layer_errors_are_shown_and_kept_in_the_folder_of_the_run(run_folder, capsys):
    before = json.loads((run_folder / "eval.json").read_text())
    assert invoke(["eval", str(run_folder), *TINY, "--layers"]) == 0
    assert "layer errors  (1 windows of 32 tokens of stdlib (calibration), 1 windows of 64" in capsys.readouterr().out
    kept = json.loads((run_folder / "eval.json").read_text())
    layers = kept.pop("layers")
    assert kept == before
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert [layer["name"] for layer in layers["layers"]] == [layer["name"] for layer in manifest["layers"]]
    for layer, solved in zip(layers["layers"], manifest["layers"], strict=True):
        assert layer["calibration"]["error"] == pytest.approx(layer["calibration"]["rtn_error"], rel=0.02)
        if solved["name"].endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj")):  # nothing before them
            assert layer["calibration"]["error"] == pytest.approx(solved["relative_loss"], rel=1e-3)
            assert layer["calibration"]["accumulated"] == pytest.approx(layer["calibration"]["error"], rel=1e-3)


def test_layer_errors_of_a_checkpoint_without_its_run_are_refused(run_folder, capsys):
    assert invoke(["eval", str(run_folder / "model"), "--against", "demo", *TINY, "--layers"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


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
    assert "cuda_s" not in quantized
    assert json.loads((run_folder / "profile.json").read_text()) == results
    assert (results["device"], results["new_tokens"]) == ("cpu", 4)


def test_profile_of_a_checkpoint_or_to_another_file_leaves_nothing_in_the_folder(run_folder, tmp_path):
    (run_folder / "profile.json").unlink(missing_ok=True)
    command = ["--new-tokens", "2", "--repeats", "1", "-q"]
    assert invoke(["profile", str(run_folder / "model"), *command]) == 0
    assert invoke(["profile", str(run_folder), *command, "--output", str(tmp_path / "mine.json")]) == 0
    assert list(json.loads((tmp_path / "mine.json").read_text())["models"]) == ["demo", str(run_folder)]
    assert not list(run_folder.rglob("*profile.json*"))


def test_profile_prints_a_table_and_both_texts(run_folder, capsys):
    assert invoke(["profile", str(run_folder), "--new-tokens", "3", "--repeats", "1", "-q"]) == 0
    assert capsys.readouterr().out.count("import os") == 2


def test_profile_prints_the_time_of_kernels_on_a_device(run_folder, capsys, monkeypatch):
    import quantlab.evaluate.profile as module

    profile_subjects = module.profile_subjects

    def with_kernels(*arguments):
        results = profile_subjects(*arguments)
        results["models"]["demo"] |= {"cuda_s": 1.234, "device_peak_bytes": 5_000_000}
        return results

    monkeypatch.setattr(module, "profile_subjects", with_kernels)
    assert invoke(["profile", str(run_folder), "--new-tokens", "2", "--repeats", "1", "-q"]) == 0
    assert "demo: 1.23 s in kernels of one generation, peak memory 5 MB" in capsys.readouterr().out


def test_an_unknown_model_is_one_clear_error(capsys):
    assert invoke(["eval", "no-such-model", "-q"]) == 78
    assert "no model no-such-model" in capsys.readouterr().err


def test_one_block_at_a_time_gives_the_numbers_of_models_in_memory(run_folder, capsys):
    assert invoke(["eval", str(run_folder), *TINY, "--json"]) == 0
    in_memory = json.loads(capsys.readouterr().out)
    assert invoke(["eval", str(run_folder), *TINY, "--json", "--memory-budget", "2GiB"]) == 0
    streamed = json.loads(capsys.readouterr().out)
    assert (in_memory.pop("streamed"), streamed.pop("streamed")) == (False, True)
    assert streamed == in_memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_alone_is_streamed_too_in_any_dtype(run_folder, capsys, dtype):
    command = ["eval", str(run_folder / "model"), *TINY, "--json", "--dtype", dtype]
    assert invoke(command) == 0
    in_memory = json.loads(capsys.readouterr().out)["perplexity"]
    assert invoke([*command, "--memory-budget", "2 GiB"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == in_memory


def test_models_that_the_machine_cannot_hold_are_streamed(run_folder, capsys, monkeypatch):
    import quantlab.evaluate.evaluation as module

    monkeypatch.setattr(module, "capacity_bytes", lambda device: 2**20)
    assert invoke(["eval", str(run_folder), *TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["streamed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory-budget", "12"), "must be a number with one of the units"),
        (("--memory-budget", "100MiB"), "too small to evaluate these models; one block at a time they need"),
        (("--memory-budget", "2GiB", "--tasks", "stdlib_continuation"), "tasks need the whole model in memory"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(capsys, arguments, message):
    assert invoke(["eval", "demo", *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_run_evaluates_the_tasks_of_its_recipe_on_both_models(run_folder, tmp_path, capsys):
    settings = [
        *("calibration.num_samples=1", "calibration.sequence_length=32", "evaluation.perplexity=[]", "method.bits=2"),
        *("evaluation.tasks=[stdlib_continuation]", "evaluation.limit=4"),
    ]
    folder = tmp_path / "run"
    assert invoke(["run", "rtn_w4", *(f"--set={item}" for item in settings), "--output-dir", str(folder), "-q"]) == 0
    assert "accuracy" in capsys.readouterr().out
    evaluation = json.loads((folder / "eval.json").read_text())
    task = evaluation["tasks"]["stdlib_continuation"]
    assert (task["samples"], task["local"]) == (4, True)
    assert task["float"].keys() == task["quantized"].keys() == {"acc", "acc_norm"}
    assert task["float"] != task["quantized"]
    assert evaluation["lm_eval_version"]
    for model in ("demo", str(folder)):
        assert invoke(["eval", model, "--tasks", "stdlib_continuation", "--limit", "4", "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)["tasks"]["stdlib_continuation"]
        assert alone["metrics"] == task["float" if model == "demo" else "quantized"]


def test_a_run_whose_tasks_cannot_be_had_ends_before_the_work(tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.jsonl").write_text('{"a": 1}\n')
    settings = [f"evaluation.tasks_dir={tmp_path / 'tasks'}", "evaluation.tasks=[mine]"]
    command = ["run", "rtn_w4", *(f"--set={item}" for item in settings), "--output-dir", str(tmp_path / "run"), "-q"]
    assert invoke(command) != 0
    assert "no known layout" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tasks_within_a_memory_budget_are_refused_by_the_plan(capsys):
    settings = ["evaluation.tasks=[stdlib_continuation]", "engine.memory_budget=4GiB"]
    assert invoke(["plan", "rtn_w4", *(f"--set={item}" for item in settings)]) == 78
    assert "evaluation.tasks need the whole model in memory" in capsys.readouterr().err


def test_kernels_are_measured_beside_dense_layers_of_the_same_shapes(run_folder, capsys, monkeypatch):
    import quantlab.evaluate.kernels as module

    monkeypatch.setattr(module, "TURN_S", 0)
    monkeypatch.setattr(module, "COLD_BYTES", 1)
    assert invoke(["profile", str(run_folder), "--kernels", "--repeats", "2", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    shapes = [(layer["out_features"], layer["in_features"]) for layer in layers]
    assert len(shapes) == len(set(shapes)) > 1
    assert all((layer["bits"], layer["codebook"]) == (4, "uniform") for layer in layers)
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert sum(layer["count"] for layer in layers) == len(manifest["layers"])
    for layer in layers:
        assert list(layer["batches"]) == ["1", "4", "16", "64"]
        for values in layer["batches"].values():
            low, high = values["speedup_range"]
            assert 0 < low <= values["speedup"] <= high
            assert min(values["ms"], values["dense_ms"]) > 0
    assert invoke(["profile", str(run_folder), "--kernels", "--repeats", "1", "-q"]) == 0
    assert "uniform 4-bit" in capsys.readouterr().out


def test_kernels_of_a_float_model_are_refused(capsys):
    assert invoke(["profile", "demo", "--kernels", "-q"]) == 2
    assert "demo has no quantized layers" in capsys.readouterr().err
