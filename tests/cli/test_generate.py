import io
import sys

import pytest

from quantlab.cli.app import invoke

TWELVE = ("--max-new-tokens", "12")


def generated(capsys, *arguments):
    assert invoke(["generate", "demo", *TWELVE, *arguments]) == 0
    return capsys.readouterr()


def test_a_prompt_is_continued_and_the_result_alone_goes_to_stdout(capsys):
    captured = generated(capsys, "--prompt", "import os\n")
    assert captured.out.startswith("import os\n")
    assert len(captured.out) > len("import os\n") + 5
    assert captured.err.startswith("12 tokens in ")


def test_quiet_prints_nothing_else(capsys):
    assert generated(capsys, "--prompt", "import os\n", "-q").err == ""


def test_greedy_generation_is_what_the_forward_pass_finds_likeliest(capsys):
    import torch

    from quantlab.calibration.tokens import load_tokenizer
    from quantlab.evaluate.subject import find_subject

    subject = find_subject("demo")
    model, tokenizer = subject.load(), load_tokenizer(subject.folder)
    ids = torch.tensor([tokenizer("import os\n")["input_ids"]])
    with torch.inference_mode():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert generated(capsys, "--prompt", "import os\n").out == tokenizer.decode(ids[0]) + "\n"


def test_draws_depend_on_the_seed_alone(capsys):
    def drawn(seed):
        return generated(capsys, "--prompt", "def ", "--temperature", "1.5", "--top-p", "0.99", "--seed", seed).out

    assert drawn("1") == drawn("1")
    assert drawn("1") != drawn("2")


def test_the_prompt_may_come_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import sys\n"))
    assert generated(capsys, "--prompt", "-").out.startswith("import sys\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo", "--prompt", ""], 2, "the prompt has no tokens"),
        (["demo", "--prompt", "x", "--max-new-tokens", "100000"], 2, "exceeds the model's context of"),
        (["no-such-model", "--prompt", "x"], 78, "no model no-such-model"),
        (["demo"], 2, "--prompt"),
        (["demo", "--prompt", "x", "--top-p", "0"], 2, "--top-p"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_error(arguments, code, message, capsys):
    assert invoke(["generate", *arguments]) == code
    assert message in capsys.readouterr().err
