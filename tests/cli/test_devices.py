"""A device that this machine does not have is refused in one sentence, before any work."""

import pytest

from quantlab.cli.app import invoke


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "demo", "--prompt", "def", "--device", "cuda:99"],
        ["profile", "demo", "--device", "cuda:99"],
        ["eval", "demo", "--device", "cuda:99"],
        ["run", "rtn_w4", "--set", "engine.device=cuda:99"],
        ["compare", "rtn", "--set", "engine.device=cuda:99"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_device_that_is_not_there(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(arguments) == 2
    assert "error: there is no device cuda:99: PyTorch" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_what_is_no_name_of_a_device(capsys):
    assert invoke(["eval", "demo", "--device", "gpu"]) == 2
    assert "'gpu', but must be cpu, cuda, or one of several GPUs such as cuda:1" in capsys.readouterr().err


def test_a_plan_for_a_device_that_is_elsewhere_tells_its_memory(capsys):
    assert invoke(["plan", "rtn_w4", "--set", "engine.device=cuda:99"]) == 0
    output = capsys.readouterr().out
    assert "peak GPU memory" in output
    assert "not estimated: this machine does not have the device" in output
