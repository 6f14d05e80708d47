import pytest

from quantlab.cli.app import invoke
from quantlab.recipe import builtin_recipes


@pytest.mark.parametrize(("target", "written"), [("mine.yaml", "mine.yaml"), (".", "ganq_w4.yaml")])
def test_a_built_in_recipe_is_copied_to_a_file_or_a_folder(target, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert invoke(["cp", "ganq_w4", target]) == 0
    assert (tmp_path / written).read_bytes() == builtin_recipes()["ganq_w4"].read_bytes()
    assert f"quantlab run {written}" in capsys.readouterr().out


def test_an_existing_file_is_not_replaced(tmp_path, capsys):
    (tmp_path / "ganq_w4.yaml").write_text("my own")
    assert invoke(["cp", "ganq_w4", str(tmp_path)]) == 2
    assert "exists and is not replaced" in capsys.readouterr().err
    assert (tmp_path / "ganq_w4.yaml").read_text() == "my own"


def test_an_unknown_recipe_suggests_one(tmp_path, capsys):
    assert invoke(["cp", "gang_w4", str(tmp_path)]) == 78
    assert "did you mean ganq_w4?" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, capsys):
    assert invoke(["cp", "ganq_w4", str(tmp_path / "no" / "x.yaml")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
