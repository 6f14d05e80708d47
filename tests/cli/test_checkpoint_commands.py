"""`verify`, `inspect` and `export` on a small checkpoint inside a run folder."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from quantlab.cli.app import invoke

FIXTURE = Path(__file__).parents[1] / "checkpoint" / "fixtures" / "format-2" / "model"


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint and a manifest."""
    folder = tmp_path / "run"
    shutil.copytree(FIXTURE, folder / "model")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "model").iterdir()}
    layers = [{"name": "model.layers.0.self_attn.q_proj", "relative_loss": 0.0123}]
    (folder / "manifest.json").write_text(json.dumps({"files": hashes, "layers": layers}))
    return folder


def test_verify_says_what_it_has_checked(run, capsys):
    assert invoke(["verify", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: ok (2 shards, 27 tensors, 7 quantized layers, 5 hashes)\n"
    assert invoke(["verify", str(run / "model")]) == 0
    assert "2 hashes" in capsys.readouterr().out


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: flip(run / "model/quantlab-block-00000.safetensors", -1), "not as it was written: its SHA-256"),
        (lambda run: flip(run / "model/generation_config.json", 5), "generation_config.json is not as it was written"),
        (lambda run: shutil.copy(run / "model/quantlab-rest.safetensors", run / "model/quantlab-old.safetensors"),
         "quantlab-old.safetensors belongs to no index"),
        (lambda run: (run / "model/quantlab-rest.safetensors").unlink(), "does not exist"),
        (lambda run: (run / "manifest.json").write_text('{"files": {"../x": "0"}}'), "which is not a file of the"),
        (lambda run: (run / "manifest.json").write_text('{"files": 3}'), "no object 'files'"),
        (lambda run: (run / "manifest.json").write_text('{"a": 1, "a": 2}'), "names 'a' twice"),
    ],
)  # fmt: skip
def test_verify_exits_78_with_what_is_wrong(run, capsys, damage, message):
    damage(run)
    assert invoke(["verify", str(run)]) == 78
    captured = capsys.readouterr()
    assert message in captured.err
    assert "ok" not in captured.out


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_manifest_that_leads_out_of_the_run_folder_is_not_read(run, tmp_path, capsys, command):
    shutil.move(run / "manifest.json", tmp_path / "outside.json")
    (run / "manifest.json").symlink_to(tmp_path / "outside.json")
    assert invoke([command, str(run)]) == 78
    assert "manifest.json is a link that leads out of the folder" in capsys.readouterr().err


def test_inspect_shows_every_layer_with_bits_and_loss(run, capsys):
    assert invoke(["inspect", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["architecture", "llama"]
    assert any(line.startswith("bits per weight") for line in lines)
    table = [line.split() for line in lines[lines.index("") + 2 :]]
    assert len(table) == 7
    assert table[0] == ["model.layers.0.self_attn.q_proj", "16x16", "2", "8", "lut", "0", table[0][6], "1.23e-02"]
    assert table[1][2:5] == ["3", "row", "uniform"]
    assert len(table[1]) == 7


def test_inspect_prints_json(run, capsys):
    assert invoke(["inspect", str(run / "model"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    config = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert summary["bits_per_weight"] == config["bits_per_weight"]
    assert [layer["name"] for layer in summary["layers"]] == list(config["modules"])
    assert summary["layers"][0]["relative_loss"] is None


def test_export_writes_beside_the_checkpoint_unless_told_where(run, capsys):
    assert invoke(["export", str(run), "--format", "dequantized"]) == 0
    folder = run.with_name("run-dequantized")
    assert str(folder) in capsys.readouterr().out
    assert (folder / "config.json").is_file()
    assert invoke(["export", str(run), "--format", "dequantized", "--output-dir", str(run.with_name("b"))]) == 0
    assert (run.with_name("b") / "model.safetensors.index.json").is_file()


def test_export_exits_2_for_what_the_format_cannot_hold(run, capsys):
    assert invoke(["export", str(run), "--format", "gptq"]) == 2
    assert "look-up tables" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["verify"], ["inspect"], ["export", "--format", "gptq"]])
def test_a_folder_that_is_no_checkpoint_exits_78(tmp_path, capsys, command):
    assert invoke([command[0], str(tmp_path), *command[1:]]) == 78
    assert "config.json does not exist" in capsys.readouterr().err
