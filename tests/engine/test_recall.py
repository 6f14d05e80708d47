"""Parts of a block that need not be run again."""

import pytest
import torch
from torch import nn

from quantlab.engine.recall import Recall


class Part(nn.Module):
    def __init__(self, answers=lambda output: output):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls, self.answers = 0, answers

    def forward(self, x):
        self.calls += 1
        return self.answers(self.linear(x))


class Block(nn.Module):
    def __init__(self, first=None, writes=False):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(4), first or Part(), Part()
        self.writes = writes

    def forward(self, x):
        output = self.attention(self.norm(x))
        output = output[0] if isinstance(output, tuple) else output
        x = output.add_(x) if self.writes else x + output
        return x + self.mlp(x)


LAYERS = ("attention.linear", "mlp.linear")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def run(block, recall, batches):
    outputs = []
    for number, batch in enumerate(batches):
        with recall.of_batch(number, batch):
            outputs.append(block(batch))
    return outputs


@pytest.fixture
def batches():
    return torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()


def test_a_part_is_run_once_more_after_its_last_layer_is_solved(batches):
    block = Block()
    recall = Recall(block, LAYERS)
    run(block, recall, batches)
    assert (block.attention.calls, block.mlp.calls) == (3, 3)
    block.attention.linear = nn.Linear(4, 4)
    recall.note_solved("attention.linear")
    expected = [block(batch) for batch in batches]
    block.attention.calls = 0
    for _ in range(3):
        assert all(map(torch.equal, run(block, recall, batches), expected))
    assert block.attention.calls == 3
    assert "forward" not in vars(block.attention)


def test_the_last_pass_keeps_nothing_and_gives_everything_away(batches):
    block = Block()
    recall = Recall(block, LAYERS)
    recall.note_solved("attention.linear")
    run(block, recall, batches)
    recall.note_solved("mlp.linear")
    recall.begin_last_pass()
    run(block, recall, batches)
    assert (block.attention.calls, block.mlp.calls) == (3, 6)
    assert recall._kept == {}


def test_an_answer_that_the_block_writes_to_is_not_taken_again(batches):
    block = Block(writes=True)
    recall = Recall(block, LAYERS)
    recall.note_solved("attention.linear")
    expected = [block(batch) for batch in batches]
    for _ in range(3):
        assert all(map(torch.equal, run(block, recall, batches), expected))
    assert block.attention.calls == 3 * 4


@pytest.mark.parametrize(
    ("answers", "is_kept"),
    [
        (lambda output: (output, None), True),
        (lambda output: (output, output.new_zeros(2, 5, 8)), False),  # larger than the hidden states by far
        (lambda output: (output, {"seen": 1}), False),  # may change
    ],
)
def test_what_else_a_part_answers_decides_whether_it_is_kept(batches, answers, is_kept):
    block = Block(first=Part(answers))
    recall = Recall(block, LAYERS)
    recall.note_solved("attention.linear")
    for _ in range(2):
        run(block, recall, batches)
    assert block.attention.calls == (3 if is_kept else 6)


def test_a_part_without_layers_to_solve_is_left_alone(batches):
    block = Block()
    recall = Recall(block, ["mlp.linear"])  # the attention keeps its weights, and nothing says when it is settled
    with recall.of_batch(0, batches[0]):
        assert "forward" not in vars(block.attention)


def test_an_error_inside_a_pass_leaves_the_parts_as_they_were(batches):
    block = Block(first=Part(lambda output: output.no_such_attribute))
    recall = Recall(block, LAYERS)
    recall.note_solved("attention.linear")
    with pytest.raises(AttributeError):
        run(block, recall, batches)
    assert "forward" not in vars(block.attention)
